"""`bitfall check test.json [flags]`: the completed config, the origin of each value, warnings."""

from __future__ import annotations

import argparse
import json
import shutil
from typing import TYPE_CHECKING, Any

from bitfall import arguments

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bitfall._core import Communicator, CompletedConfig
    from bitfall.device import DeviceChoice

EPILOG = """The flags are those of 'bitfall glue': they fill "auto", and contradictions show.

example:
  bitfall check test.json --fp16 --learning_rate 2e-5 --per_device_train_batch_size 32"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the config and the flags of `bitfall glue`."""
    parser.epilog = EPILOG
    parser.add_argument("config", help="DeepSpeed JSON config")
    arguments.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Prints the completed config. Raises ConfigError for what training would refuse."""
    from bitfall import _core
    from bitfall.device import choose_device
    from bitfall.flag_values import complete_config

    parsed = _training_arguments(args)
    communicator = _core.make_communicator()
    steps = max(parsed.max_steps, 1)
    config, _ = complete_config(parsed, communicator.world_size, lambda _: steps)
    device = choose_device(parsed.device, communicator)
    if communicator.rank == 0:
        print("\n".join(_report(args.config, config, communicator, device)))
    return 0


def _training_arguments(args: argparse.Namespace) -> arguments.GlueArguments:
    """The typed flags; what a training needs and a check does not is filled in."""
    typed = vars(args)
    needed: dict[str, Any] = {"model_name_or_path": "model", "output_dir": "output"}
    if not any(typed.get(name) for name in ("do_train", "do_eval", "do_predict")):
        needed["do_train"] = True
    if not any(typed.get(f"{name}_file") for name in ("train", "validation", "test")):
        needed["task_name"] = "mrpc"
    return arguments.from_namespace(
        argparse.Namespace(**{**needed, **typed, "deepspeed": args.config})
    )


def _report(
    path: str, config: CompletedConfig, communicator: Communicator, device: DeviceChoice
) -> Iterator[str]:
    yield f"{path}: accepted"
    rows = [
        (key, *_value_and_origin(value, config.origins.get(key, "")))
        for key, value in flatten(json.loads(config.json))
    ]
    rows.sort(key=lambda row: _section(row[0]))  # stable; values outside sections come first
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    section = None
    for key, value, origin in rows:
        if _section(key) != section:
            yield ""
        section = _section(key)
        yield f"  {key:<{widths[0]}}  {value:<{widths[1]}}  {origin}".rstrip()
    yield ""
    yield from _machine(config, communicator, device)
    for warning in config.warnings:
        yield f"warning: {warning}"


def _value_and_origin(value: Any, origin: str) -> tuple[str, str]:
    if "--num_train_epochs" in origin:  # the number of examples decides
        return "(known with the data)", origin
    return json.dumps(value), origin


def _section(key: str) -> str:
    return key.split(".")[0] if "." in key else ""


def _machine(
    config: CompletedConfig, communicator: Communicator, device: DeviceChoice
) -> Iterator[str]:
    from bitfall import _core

    yield f"computes in      {config.compute_dtype}"
    yield f"device           {device.device}: {device.reason}"
    yield f"CPU kernels      {_core.cpu_isa()}"
    if communicator.world_size > 1:
        processes = f"{communicator.world_size} (MPI)"
    else:
        found = "mpirun is there" if shutil.which("mpirun") else "no mpirun found"
        processes = f"1 ({found})"
    yield f"processes        {processes}"


def flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key path, value) of every leaf of nested objects; an empty object is a leaf."""
    for key, child in value.items():
        if isinstance(child, dict) and child:
            yield from flatten(child, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", child
