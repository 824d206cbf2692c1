"""engine.load_checkpoint for a checkpoint that DeepSpeed wrote."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitfall._core import CheckpointError
from bitfall.bridge.optimizer import NUMBERS, FusedAdam
from bitfall.deepspeed_checkpoint import DeepSpeedCheckpoint, read_deepspeed_checkpoint
from bitfall.deepspeed_checkpoint.convert import write_for_engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitfall.bridge.checkpoint import Wanted
    from bitfall.bridge.engine import DeepSpeedEngine

TEMPLATE, CONVERTED = "template", "converted"


def load_deepspeed_checkpoint(
    engine: DeepSpeedEngine, directory: Path, tag: str, wanted: Wanted
) -> tuple[str, dict[str, Any]]:
    """(DIRECTORY/TAG, client state). Collective.

    MoQ's schedule, which DeepSpeed does not save, stays as it is. Raises CheckpointError for
    damaged files and those of another model or optimizer; nothing has changed then.
    """
    optimizer = engine.optimizer
    if wanted.optimizer and not isinstance(optimizer, FusedAdam):
        raise CheckpointError(
            f"{directory / tag}: of DeepSpeed's checkpoints only the state of Adam and AdamW can be"
            " read; load_optimizer_states=False takes the weights only"
        )
    found = read_deepspeed_checkpoint(
        directory,
        tag,
        parameter_groups=_trained_names(engine) if isinstance(optimizer, FusedAdam) else None,
        optimizer_states=wanted.optimizer,
    )
    rest = _untrained(found, engine, wanted.strict)
    _restore_updater(found, engine, wanted.optimizer)
    with torch.no_grad():
        for tensor, value in rest:
            tensor.copy_(torch.from_numpy(value))
    if wanted.optimizer and optimizer is not None:
        for group, saved in zip(optimizer.param_groups, found.hyperparameters, strict=False):
            group |= {name: saved[name] for name in NUMBERS if name in saved}
    if wanted.lr_scheduler and engine.lr_scheduler is not None and found.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(found.lr_scheduler)
    if wanted.counters:
        engine.micro_steps = found.global_steps * engine.gradient_accumulation_steps()
        engine.global_samples = found.global_samples
    engine.zero_grad()
    return str(found.folder), found.client_state


def _trained_names(engine: DeepSpeedEngine) -> list[list[str]]:
    """Names of the parameters in each param group that require a gradient, in the group's order."""
    assert engine.optimizer is not None
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return [
        [names[p] for p in group["params"] if p.requires_grad]
        for group in engine.optimizer.param_groups
    ]


def _untrained(
    found: DeepSpeedCheckpoint, engine: DeepSpeedEngine, strict: bool
) -> Sequence[tuple[torch.Tensor, Any]]:
    """(tensor, its value) of the buffers and frozen parameters, which no updater owns."""
    trained = {entry.parameter for entry in engine.trained}
    pairs = []
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        value = found.weights.get(name)
        if tensor in trained or (value is None and not strict):
            continue
        if value is None or value.shape != tuple(tensor.shape):
            seen = "has no" if value is None else f"has shape {list(value.shape)} for"
            raise CheckpointError(
                f"{found.folder}: {seen} '{name}', which is {list(tensor.shape)} in the model; load"
                " it into the model that it was saved from"
            )
        pairs.append((tensor, value))
    return pairs


def _restore_updater(
    found: DeepSpeedCheckpoint, engine: DeepSpeedEngine, with_optimizer: bool
) -> None:
    """Masters, moments, counters and loss scale, through the updater's own format: it knows how
    ranks share them."""
    updater, communicator = engine.updater, engine.communicator
    assert updater is not None
    shapes = {entry.name: tuple(entry.parameter.shape) for entry in engine.trained}
    with tempfile.TemporaryDirectory(prefix="bitfall-") as name:
        folder = Path(name)
        updater.save_checkpoint(name, TEMPLATE, "{}", {})
        mine = folder / TEMPLATE / "state.json"
        state = communicator.broadcast(mine.read_bytes() if communicator.rank == 0 else b"")
        write_for_engine(found, shapes, state.decode(), folder / CONVERTED, with_optimizer)
        updater.load_checkpoint(name, CONVERTED, with_optimizer)
