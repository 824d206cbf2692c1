"""engine.load_checkpoint for a checkpoint that DeepSpeed wrote."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitfall._core import CheckpointError
from bitfall.bridge.optimizer import NUMBERS
from bitfall.deepspeed_checkpoint import DeepSpeedCheckpoint, read_deepspeed_checkpoint
from bitfall.deepspeed_checkpoint.convert import write_for_engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitfall import _core
    from bitfall.bridge.engine import DeepSpeedEngine
    from bitfall.bridge.layout import Trained

TEMPLATE, CONVERTED = "template", "converted"


def load_deepspeed_checkpoint(
    engine: DeepSpeedEngine,
    directory: Path,
    tag: str | None,
    strict: bool = True,
    optimizer_states: bool = True,
    lr_scheduler_states: bool = True,
) -> tuple[str, dict[str, Any]]:
    """engine.load_checkpoint for DIRECTORY/TAG: (its folder, client state). Collective.

    Weights always; with `optimizer_states` Adam's moments, step and numbers, otherwise these begin
    anew; with `lr_scheduler_states` the scheduler. `strict`: frozen parameters and buffers must all
    be there. Raises CheckpointError for damaged files and those of another model.
    """
    assert engine.optimizer is not None
    found = read_deepspeed_checkpoint(
        directory,
        tag,
        parameter_groups=trained_names(engine.module, engine.optimizer.param_groups),
        optimizer_states=optimizer_states,
    )
    restore_updater(found, engine._updater, engine._trained, engine._communicator, True)
    restore_rest(found, engine.module, engine._trained, strict)
    restore_numbers(found, engine.optimizer.param_groups)
    if lr_scheduler_states and engine.lr_scheduler is not None and found.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(found.lr_scheduler)
    return str(found.folder), found.client_state


def trained_names(module: torch.nn.Module, groups: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Names of the parameters in each param group that require a gradient, in the group's order."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [[names[p] for p in group["params"] if p.requires_grad] for group in groups]


def restore_updater(
    found: DeepSpeedCheckpoint,
    updater: _core.Updater,
    trained: Sequence[Trained],
    communicator: _core.Communicator,
    with_moments: bool,
) -> None:
    """Masters, moments, counters and loss scale of `found` into `updater`. Collective.

    They go through the updater's own checkpoint format, which knows how ranks share them; the bit
    schedule, which DeepSpeed does not save, stays as it is. Raises CheckpointError on every rank if
    the checkpoint is of another model, with nothing changed.
    """
    shapes = {entry.name: tuple(entry.parameter.shape) for entry in trained}
    with tempfile.TemporaryDirectory(prefix="bitfall-") as name:
        folder = Path(name)
        updater.save_checkpoint(name, TEMPLATE, "{}")
        mine = folder / TEMPLATE / "state.json"
        state = communicator.broadcast(mine.read_bytes() if communicator.rank == 0 else b"")
        write_for_engine(found, shapes, state.decode(), folder / CONVERTED, with_moments)
        updater.load_checkpoint(name, CONVERTED)


def restore_rest(
    found: DeepSpeedCheckpoint,
    module: torch.nn.Module,
    trained: Sequence[Trained],
    strict: bool,
) -> None:
    """Buffers and frozen parameters, which no updater owns.

    Raises CheckpointError for other shapes and, if `strict`, for names that `found` does not have.
    """
    ours = {entry.parameter for entry in trained}
    for name, tensor in module.state_dict(keep_vars=True).items():
        value = found.weights.get(name)
        if tensor in ours or (value is None and not strict):
            continue
        if value is None or value.shape != tuple(tensor.shape):
            seen = "has no" if value is None else f"has shape {list(value.shape)} for"
            raise CheckpointError(
                f"{found.folder}: {seen} '{name}', which is {list(tensor.shape)} in the model; load"
                " it into the model that it was saved from"
            )
        tensor.data.copy_(torch.from_numpy(value))


def restore_numbers(found: DeepSpeedCheckpoint, groups: list[dict[str, Any]]) -> None:
    """Rates, betas, epsilon and decay into the param_groups of the engine's own Adam."""
    for group, saved in zip(groups, found.hyperparameters, strict=False):
        group |= {name: saved[name] for name in NUMBERS if name in saved}


def client_optimizer_state(
    found: DeepSpeedCheckpoint, groups: list[dict[str, Any]], names: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """For load_state_dict of a torch optimizer with `groups`, whose parameters have `names`."""
    states: dict[int, dict[str, torch.Tensor]] = {}
    saved_groups: list[dict[str, Any]] = []
    count = 0
    for index, (group, group_names) in enumerate(zip(groups, names, strict=True)):
        saved = found.hyperparameters[index] if found.hyperparameters else {}
        indices = range(count, count + len(group_names))
        count += len(group_names)
        for position, name in zip(indices, group_names, strict=True):
            if name in found.exp_avg:
                states[position] = {
                    "step": torch.tensor(float(found.optimizer_step)),
                    "exp_avg": torch.from_numpy(found.exp_avg[name]),
                    "exp_avg_sq": torch.from_numpy(found.exp_avg_sq[name]),
                }
        saved_groups.append({**group, **saved, "params": list(indices)})
    return {"state": states, "param_groups": saved_groups}
