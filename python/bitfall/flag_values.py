"""Command-line flags as values for the DeepSpeed config (`_core.parse_config`).

The key paths are those that Hugging Face's Trainer fills where the file says "auto"; facts of the
run that are no DeepSpeed keys go under "bitfall.".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitfall import _core
from bitfall.arguments import GlueArguments, warmup_step_count
from bitfall.errors import ArgumentsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitfall._core import CompletedConfig, FlagValue

# Config key -> flags it is made of (the first one names it in messages).
CONFIG_KEYS: dict[str, tuple[str, ...]] = {
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size",),
    "gradient_accumulation_steps": ("gradient_accumulation_steps",),
    "gradient_clipping": ("max_grad_norm",),
    "seed": ("seed",),
    "fp16.enabled": ("fp16",),
    "bf16.enabled": ("bf16",),
    "optimizer.params.lr": ("learning_rate",),
    "optimizer.params.betas": ("adam_beta1", "adam_beta2"),
    "optimizer.params.eps": ("adam_epsilon",),
    "optimizer.params.weight_decay": ("weight_decay",),
    "scheduler.params.warmup_max_lr": ("learning_rate",),
    "bitfall.lr_scheduler_type": ("lr_scheduler_type",),
}

PROVISIONAL_STEPS = 1_000_000_000  # longer than any warmup, so that no check of the two fails


def flag_values(
    arguments: GlueArguments, world_size: int, num_training_steps: int | None
) -> dict[str, FlagValue]:
    """All key paths with the JSON text of their values, and whether the user typed the flag.

    `num_training_steps` is None while the batch size, and so the number of steps, is unknown: then
    the values that depend on it cannot clash with the file.
    """
    values = {
        key: _flag_value(
            flags[0],
            _joined([getattr(arguments, flag) for flag in flags]),
            given=any(flag in arguments.given for flag in flags),
        )
        for key, flags in CONFIG_KEYS.items()
    }
    steps_known = num_training_steps is not None
    if num_training_steps is None:
        num_training_steps = PROVISIONAL_STEPS
    warmup_steps = warmup_step_count(arguments, num_training_steps)
    warmup_flag = "warmup_steps" if arguments.warmup_steps > 0 else "warmup_ratio"
    warmup_given = steps_known and warmup_flag in arguments.given
    steps_flag = "max_steps" if arguments.max_steps > 0 else "num_train_epochs"
    steps_given = steps_known and steps_flag in arguments.given
    values |= {
        "scheduler.params.warmup_min_lr": _flag_value("learning_rate", 0, given=False),
        "scheduler.params.warmup_num_steps": _flag_value(
            warmup_flag, max(1, warmup_steps), given=warmup_given
        ),
        "bitfall.world_size": _flag_value("world_size", world_size, given=True),
        "bitfall.num_training_steps": _flag_value(
            steps_flag, num_training_steps, given=steps_given
        ),
        "bitfall.warmup_steps": _flag_value(warmup_flag, warmup_steps, given=warmup_given),
    }
    return values


def complete_config(
    arguments: GlueArguments, world_size: int, steps_at_batch_size: Callable[[int], int]
) -> tuple[CompletedConfig, int]:
    """The completed config and the planned number of optimizer steps.

    `steps_at_batch_size` gives the number of steps for a train_batch_size, which the file may set:
    so the config is completed once with a provisional number of steps, and again with the true one.
    """
    text, source = "", "command line"
    if arguments.deepspeed:
        source = arguments.deepspeed
        text = _read_config(source)
    first = _core.parse_config(text, source, flag_values(arguments, world_size, None))
    num_training_steps = steps_at_batch_size(first.train_batch_size)
    values = flag_values(arguments, world_size, num_training_steps)
    return _core.parse_config(text, source, values), num_training_steps


def _read_config(path: str) -> str:
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentsError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text"
        ) from None


def _flag_value(flag: str, value: Any, given: bool) -> FlagValue:
    return {"flag": f"--{flag}", "json": json.dumps(value), "given": given}


def _joined(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
