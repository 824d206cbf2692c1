"""The DeepSpeed config of `bitfall.initialize`: a dict or a file, through the engine's reader."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitfall import _core
from bitfall.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bitfall._core import CompletedConfig

NEVER_PRINT = 10**15  # steps; accelerate sets steps_per_print to infinity, which JSON has not

# What fills an "auto" of a config, for the message about one that is left.
HUGGING_FACE_FLAGS = {
    "train_batch_size": "the three batch sizes follow from each other; leave one out",
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
    "optimizer.params.lr": "--learning_rate",
    "optimizer.params.betas": "--adam_beta1 and --adam_beta2",
    "optimizer.params.eps": "--adam_epsilon",
    "optimizer.params.weight_decay": "--weight_decay",
    "scheduler.params.warmup_max_lr": "--learning_rate",
    "scheduler.params.warmup_num_steps": "--warmup_steps",
    "scheduler.params.total_num_steps": "--max_steps or --num_train_epochs",
    "fp16.enabled": "--fp16",
    "bf16.enabled": "--bf16",
}

# Ignored by the engine itself, but not here: no warning.
READ_BY_THE_BRIDGE = ("fp16.auto_cast", "zero_allow_untested_optimizer")


def read_config(
    config: dict[str, Any] | str | Path, world_size: int, optimizer: dict[str, Any] | None = None
) -> CompletedConfig:
    """The completed config of a dict, or of a JSON file (comments and trailing commas allowed).
    `optimizer` stands for the section of that name where it is absent.

    Raises ConfigError for everything that `bitfall check` refuses, and for an "auto" that is left;
    InputError for a file that cannot be read and for values that are no JSON.
    """
    if isinstance(config, dict):
        source, text = "config", _to_json(config)
    else:
        source, text = str(config), _read(Path(config))
    flags: dict[str, Any] = {
        "bitfall.world_size": {
            "flag": "number of ranks",
            "json": json.dumps(world_size),
            "given": True,
        }
    }
    for key, value in (optimizer or {}).items():
        flags[f"optimizer.{key}"] = {
            "flag": "optimizer",
            "json": json.dumps(value),
            "given": False,
        }
    try:
        return _core.parse_config(text, source, flags)
    except _core.ConfigError as error:
        hint = _auto_hint(text)
        if hint and '= "auto"' in str(error):
            raise _core.ConfigError(f"{error}. {hint}") from None
        raise


def has_section(config: CompletedConfig, section: str) -> bool:
    """Whether the user's config says something in a section."""
    return any(
        key.startswith(f"{section}.") and origin == "file" for key, origin in config.origins.items()
    )


def relevant_warnings(config: CompletedConfig) -> list[str]:
    """Warnings of the reader, without those about keys that the bridge reads itself."""
    return [
        text
        for text in config.warnings
        if not any(f" {key}:" in text for key in READ_BY_THE_BRIDGE)
    ]


def _to_json(config: dict[str, Any]) -> str:
    if config.get("steps_per_print") == math.inf:
        config = {**config, "steps_per_print": NEVER_PRINT}
    try:
        return json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"config: it holds a value that is no JSON ({error})") from None


def _read(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"config: no file {path}; give a dict or the path of a JSON file")
    return path.read_text(encoding="utf-8-sig")


def _auto_hint(text: str) -> str | None:
    try:
        config = json.loads(text)
    except ValueError:
        return None
    for path in _autos(config, ""):
        flag = HUGGING_FACE_FLAGS.get(path)
        if flag:
            return (
                f'Hugging Face\'s Trainer fills "{path}" ({flag}) when the config goes to'
                " TrainingArguments(deepspeed=...); without it, write the value"
            )
    return None


def _autos(value: Any, path: str) -> Iterator[str]:
    if value == "auto":
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _autos(item, f"{path}.{key}" if path else str(key))
