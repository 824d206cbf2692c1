"""Flags of `bitfall glue`: Hugging Face's run_glue.py spelling, meaning and defaults.

Fields of GlueArguments are the flags; `given` holds the names that the user typed, so that a typed
flag can clash with the DeepSpeed config while a default only fills its gaps.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitfall.errors import ArgumentsError

TASK_NAMES = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
LR_SCHEDULER_TYPES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
STRATEGIES = ("no", "steps", "epoch")
DEVICES = ("auto", "cpu", "cuda")
ALIASES = {"eval_strategy": ["--evaluation_strategy"]}
TRUE_WORDS = ("yes", "true", "t", "y", "1")
FALSE_WORDS = ("no", "false", "f", "n", "0")


def _flag(default: Any, text: str, **options: Any) -> Any:
    return field(default=default, metadata={"help": text, **options})


@dataclass(frozen=True)
class GlueArguments:
    """One run of `bitfall glue`; defaults as in Hugging Face."""

    model_name_or_path: str = _flag("", "folder of a Hugging Face BERT, or its name on the hub")
    output_dir: str = _flag("", "where model, results, checkpoints and report go")
    task_name: str | None = _flag(None, "GLUE task", choices=TASK_NAMES, type=str.lower)
    data_dir: str | None = _flag(None, "GLUE data: the folder with CoLA/, MRPC/ ... or one of them")
    train_file: str | None = _flag(None, "own training data: csv, tsv or json")
    validation_file: str | None = _flag(None, "own validation data: csv, tsv or json")
    test_file: str | None = _flag(None, "own test data: csv, tsv or json")
    max_seq_length: int = _flag(128, "tokens per example, special tokens included", minimum=3)
    max_train_samples: int | None = _flag(None, "use only the first N training examples", minimum=1)
    max_eval_samples: int | None = _flag(None, "use only the first N examples", minimum=1)
    max_predict_samples: int | None = _flag(None, "use only the first N test examples", minimum=1)
    do_train: bool = _flag(False, "train")
    do_eval: bool = _flag(False, "evaluate on the validation data")
    do_predict: bool = _flag(False, "write predictions for the test data")
    per_device_train_batch_size: int = _flag(8, "examples per process and micro-batch", minimum=1)
    per_device_eval_batch_size: int = _flag(8, "examples per process in evaluation", minimum=1)
    gradient_accumulation_steps: int = _flag(1, "micro-batches per optimizer step", minimum=1)
    learning_rate: float = _flag(5e-5, "peak learning rate", minimum=0.0)
    weight_decay: float = _flag(0.0, "weight decay", minimum=0.0)
    adam_beta1: float = _flag(0.9, "decay of the first moment", minimum=0.0)
    adam_beta2: float = _flag(0.999, "decay of the second moment", minimum=0.0)
    adam_epsilon: float = _flag(1e-8, "added to the root of the second moment", minimum=0.0)
    max_grad_norm: float = _flag(1.0, "gradient clipping; 0 switches it off", minimum=0.0)
    num_train_epochs: float = _flag(3.0, "passes over the training data", minimum=0.0)
    max_steps: int = _flag(-1, "optimizer steps; overrides --num_train_epochs when positive")
    warmup_steps: float = _flag(0, "warmup steps, or their share of all when below 1", minimum=0.0)
    warmup_ratio: float = _flag(0.0, "share of the steps used for warmup", minimum=0.0)
    lr_scheduler_type: str = _flag("linear", "learning-rate schedule", choices=LR_SCHEDULER_TYPES)
    seed: int = _flag(42, "of data order, dropout and the new head", minimum=0)
    fp16: bool = _flag(False, "compute in fp16 with loss scaling")
    bf16: bool = _flag(False, "compute in bf16")
    device: str = _flag("auto", "where to compute; auto: a GPU if one is usable", choices=DEVICES)
    overwrite_output_dir: bool = _flag(False, "train into an output folder that is not empty")
    logging_steps: float = _flag(500, "log every N steps, or share of all steps", minimum=0.0)
    eval_strategy: str = _flag("no", "when to evaluate in training", choices=STRATEGIES)
    eval_steps: float | None = _flag(None, "default: --logging_steps", minimum=0.0)
    save_strategy: str = _flag("steps", "when to write a checkpoint", choices=STRATEGIES)
    save_steps: float = _flag(500, "checkpoint every N steps, or share of all", minimum=0.0)
    save_total_limit: int | None = _flag(None, "keep only the newest N checkpoints", minimum=1)
    resume_from_checkpoint: str | None = _flag(
        None, "a checkpoint folder, or true for the last one in --output_dir"
    )
    report_to: tuple[str, ...] = _flag(
        ("none",), "also log to", choices=("tensorboard", "all", "none")
    )
    deepspeed: str | None = _flag(None, "DeepSpeed JSON config: quantize_training, fp16, ...")
    given: frozenset[str] = frozenset()

    def uses_tensorboard(self) -> bool:
        return "tensorboard" in self.report_to or "all" in self.report_to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds every flag with argparse.SUPPRESS as default: the namespace holds typed flags only."""
    hints = typing.get_type_hints(GlueArguments)
    for spec in _flag_fields():
        value_type = _value_type(hints[spec.name])
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help_text(spec)}
        if value_type is bool:
            options.update(nargs="?", const=True, type=parse_bool, metavar="true|false")
        elif spec.name == "report_to":
            options.update(nargs="+", choices=spec.metadata["choices"])
        else:
            options["type"] = spec.metadata.get("type", value_type)
            options["choices"] = spec.metadata.get("choices")
            if options["choices"] is None:
                options["metavar"] = {int: "N", float: "X", str: "TEXT"}[value_type]
        parser.add_argument(f"--{spec.name}", *ALIASES.get(spec.name, []), **options)


def from_namespace(namespace: argparse.Namespace) -> GlueArguments:
    """Completes typed flags with defaults. Raises ArgumentsError for what cannot work."""
    names = {spec.name for spec in _flag_fields()}
    typed = {name: value for name, value in vars(namespace).items() if name in names}
    if "report_to" in typed:
        typed["report_to"] = tuple(typed["report_to"])
    if typed.get("eval_strategy", "no") != "no":
        typed["do_eval"] = True  # as Hugging Face
    arguments = GlueArguments(**typed, given=frozenset(typed))
    _check_numbers(arguments)
    _check_combinations(arguments)
    return arguments


def parse_bool(text: str) -> bool:
    """The words that Hugging Face's argument parser takes for a boolean."""
    if text.lower() in TRUE_WORDS:
        return True
    if text.lower() in FALSE_WORDS:
        return False
    raise argparse.ArgumentTypeError(f"'{text}': expected true or false")


def steps_or_share(value: float, total_steps: int) -> int:
    """A number of steps from `value`: itself from 1 on, otherwise a share of `total_steps`."""
    return int(value) if value >= 1 else max(1, math.ceil(total_steps * value))


def warmup_step_count(arguments: GlueArguments, total_steps: int) -> int:
    """--warmup_steps wins over --warmup_ratio, as in Hugging Face; a share is rounded up."""
    if arguments.warmup_steps >= 1:
        return int(arguments.warmup_steps)
    share = arguments.warmup_steps if arguments.warmup_steps > 0 else arguments.warmup_ratio
    return math.ceil(total_steps * share)


def _flag_fields() -> list[dataclasses.Field[Any]]:
    return [spec for spec in dataclasses.fields(GlueArguments) if spec.name != "given"]


def _value_type(hint: Any) -> type:
    if isinstance(hint, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    return hint


def _help_text(spec: dataclasses.Field[Any]) -> str:
    if spec.default in (None, "", False):
        return spec.metadata["help"]
    default = " ".join(spec.default) if isinstance(spec.default, tuple) else spec.default
    return f"{spec.metadata['help']} (default: {default})"


def _check_numbers(arguments: GlueArguments) -> None:
    for spec in _flag_fields():
        value = getattr(arguments, spec.name)
        minimum = spec.metadata.get("minimum")
        if minimum is None or value is None:
            continue
        if not math.isfinite(value) or value < minimum:
            raise ArgumentsError(f"--{spec.name} {value}: expected {minimum} or more")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(arguments, name) >= 1:
            raise ArgumentsError(f"--{name} {getattr(arguments, name)}: expected less than 1")
    if arguments.warmup_ratio > 1:
        raise ArgumentsError(f"--warmup_ratio {arguments.warmup_ratio}: expected 0 to 1")
    for name in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
        value = getattr(arguments, name)
        if value is None or (name == "warmup_steps" and value == 0):
            continue
        if value == 0 or (value > 1 and value != int(value)):
            raise ArgumentsError(
                f"--{name} {value}: expected a whole number of steps, or a share between 0 and 1"
            )


def _check_combinations(arguments: GlueArguments) -> None:
    for name in ("model_name_or_path", "output_dir"):
        if not getattr(arguments, name):
            raise ArgumentsError(f"--{name} is missing; see 'bitfall glue --help'")
    if not (arguments.do_train or arguments.do_eval or arguments.do_predict):
        raise ArgumentsError("nothing to do: give --do_train, --do_eval or --do_predict")
    if arguments.fp16 and arguments.bf16:
        raise ArgumentsError("--fp16 and --bf16: only one compute type is possible; drop one")
    if arguments.do_train and arguments.max_steps <= 0 and arguments.num_train_epochs <= 0:
        raise ArgumentsError("--num_train_epochs 0: expected more than 0, or give --max_steps")
    _check_data_flags(arguments)


def _check_data_flags(arguments: GlueArguments) -> None:
    files = ("train_file", "validation_file", "test_file")
    given_files = [name for name in files if getattr(arguments, name)]
    if arguments.task_name and given_files:
        raise ArgumentsError(
            f"--task_name {arguments.task_name} and --{given_files[0]}: GLUE data and own files"
            " exclude each other; drop one"
        )
    if arguments.task_name:
        return
    if not given_files:
        raise ArgumentsError(
            f"no data: give --task_name ({', '.join(TASK_NAMES)}) or --train_file and"
            " --validation_file"
        )
    if arguments.data_dir:
        raise ArgumentsError("--data_dir is for GLUE tasks: give --task_name too, or drop it")
    for flag, name in (
        ("do_train", "train_file"),
        ("do_eval", "validation_file"),
        ("do_predict", "test_file"),
    ):
        if getattr(arguments, flag) and not getattr(arguments, name):
            raise ArgumentsError(f"--{flag} needs --{name}")
    for name in given_files:
        suffix = Path(getattr(arguments, name)).suffix
        if suffix not in (".csv", ".tsv", ".json", ".jsonl"):
            raise ArgumentsError(
                f"--{name} {getattr(arguments, name)}: expected a .csv, .tsv or .json file"
            )
