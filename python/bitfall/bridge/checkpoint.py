"""Checkpoints of a torch module in training: the engine's own, with what torch keeps beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitfall import _core
from bitfall.bridge.deepspeed_loading import load_deepspeed_checkpoint
from bitfall.bridge.optimizer import ClientOptimizer
from bitfall.bridge.state import decode, encode, pack, unpack
from bitfall.deepspeed_checkpoint import is_deepspeed_checkpoint
from bitfall.errors import UsageError
from bitfall.outputs import atomic_file

if TYPE_CHECKING:
    from bitfall.bridge.engine import DeepSpeedEngine

LATEST = "latest"
STATE_FILE = "state.json"
FORMAT = "bitfall.bridge 1"


@dataclass(frozen=True)
class Wanted:
    """What load() restores beside the trained weights."""

    strict: bool = True  # every other weight and buffer must be in the checkpoint
    optimizer: bool = True
    lr_scheduler: bool = True
    counters: bool = True


def save(
    engine: DeepSpeedEngine,
    directory: str | Path,
    tag: str | None,
    client_state: dict[str, Any],
    exclude_frozen_parameters: bool,
) -> None:
    """Writes DIRECTORY/TAG and DIRECTORY/latest; see DeepSpeedEngine.save_checkpoint."""
    if engine.updater is None:
        raise UsageError("save_checkpoint(): the engine has no optimizer, so it trains nothing")
    tensors: dict[str, torch.Tensor] = {}
    state = {
        "format": FORMAT,
        "micro_steps": engine.micro_steps,
        "global_samples": engine.global_samples,
        "module": encode(_untrained(engine, exclude_frozen_parameters), "module", tensors),
        "optimizer": encode(_optimizer_state(engine), "optimizer", tensors),
        "lr_scheduler": encode(_state_of(engine.lr_scheduler), "lr_scheduler", tensors),
        "client_state": encode(client_state, "client_state", tensors),
    }
    packed = {name: pack(name, tensor) for name, tensor in tensors.items()}
    tag = tag or f"global_step{engine.global_steps}"
    engine.updater.save_checkpoint(str(directory), str(tag), json.dumps(state), packed)


def load(
    engine: DeepSpeedEngine, directory: str | Path, tag: str | None, wanted: Wanted
) -> tuple[str | None, dict[str, Any]]:
    """(path, client_state), or (None, {}) if there is nothing; see DeepSpeedEngine."""
    directory = Path(directory)
    if tag is None and not (directory / LATEST).is_file():
        return None, {}
    tag = tag or (directory / LATEST).read_text(encoding="utf-8").strip()
    if engine.updater is None:
        raise UsageError("load_checkpoint(): the engine has no optimizer, so it trains nothing")
    if is_deepspeed_checkpoint(directory / tag):
        return load_deepspeed_checkpoint(engine, directory, tag, wanted)
    text, packed = _core.read_client_checkpoint(str(directory), tag)
    state = _parse(text, directory / tag)
    tensors = {name: unpack(value) for name, value in packed.items()}
    try:
        module, optimizer, lr_scheduler, client_state = (
            decode(state[key], tensors)
            for key in ("module", "optimizer", "lr_scheduler", "client_state")
        )
    except KeyError as error:
        raise _core.CheckpointError(f"{directory / tag}: has no tensor {error}") from None
    _check_fits(engine, module, optimizer, directory / tag, wanted)
    engine.updater.load_checkpoint(str(directory), tag, wanted.optimizer)
    _apply_module(engine, module)
    if wanted.optimizer:
        _apply_optimizer(engine, optimizer)
    if wanted.lr_scheduler and lr_scheduler is not None and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(lr_scheduler)
    if wanted.counters:
        engine.micro_steps = int(state["micro_steps"])
        engine.global_samples = int(state["global_samples"])
    engine.zero_grad()
    return str(directory / tag), client_state


def save_weights(engine: DeepSpeedEngine, directory: str | Path, filename: str) -> None:
    """The module's state_dict as the forward pass uses it; rank 0 writes."""
    if engine.communicator.rank == 0:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / filename) as file:
            if filename.endswith(".safetensors"):
                from safetensors.torch import save_model

                save_model(engine.module, file.name, metadata={"format": "pt"})
            else:
                torch.save({n: t.detach() for n, t in engine.module.state_dict().items()}, file)
    engine.communicator.barrier()


def _untrained(engine: DeepSpeedEngine, without_frozen: bool) -> dict[str, torch.Tensor]:
    """Buffers and parameters that the engine does not own."""
    trained = {entry.parameter for entry in engine.trained}
    parameters = {
        name: parameter
        for name, parameter in engine.module.named_parameters()
        if parameter not in trained and not (without_frozen and not parameter.requires_grad)
    }
    return {**parameters, **dict(engine.module.named_buffers())}


def _optimizer_state(engine: DeepSpeedEngine) -> dict[str, Any]:
    optimizer = engine.optimizer
    if isinstance(optimizer, ClientOptimizer):
        return {
            "type": type(optimizer.optimizer).__name__,
            "state_dict": optimizer.optimizer.state_dict(),
        }
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups  # type: ignore[union-attr]
    ]
    return {"type": "engine", "param_groups": groups}


def _state_of(lr_scheduler: Any) -> Any:
    return lr_scheduler.state_dict() if hasattr(lr_scheduler, "state_dict") else None


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        state = json.loads(text)
    except ValueError:
        state = None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise _core.CheckpointError(
            f"{path}: written by 'bitfall glue', not by bitfall.initialize; go on with"
            " --resume_from_checkpoint, or load its weights with from_pretrained"
        )
    return state


def _check_fits(
    engine: DeepSpeedEngine,
    module: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    path: Path,
    wanted: Wanted,
) -> None:
    current = _untrained(engine, without_frozen=False)
    missing = sorted(set(current) - set(module))
    unknown = sorted(set(module) - set(current))
    if wanted.strict and (missing or unknown):
        raise _core.CheckpointError(
            f"{path}: another model (missing: {missing[:3] or 'none'}, too many:"
            f" {unknown[:3] or 'none'}); load_module_strict=False takes what fits"
        )
    for name in set(current) & set(module):
        if current[name].shape != module[name].shape:
            raise _core.CheckpointError(
                f"{path}: '{name}' is {list(module[name].shape)}, the model has"
                f" {list(current[name].shape)}"
            )
    if not wanted.optimizer:
        return
    mine = _optimizer_state(engine)
    if mine["type"] != optimizer["type"]:
        raise _core.CheckpointError(
            f"{path}: its optimizer is {optimizer['type']}, this run has {mine['type']};"
            " load_optimizer_states=False takes the weights only"
        )
    if mine["type"] == "engine" and len(mine["param_groups"]) != len(optimizer["param_groups"]):
        raise _core.CheckpointError(
            f"{path}: {len(optimizer['param_groups'])} parameter groups, this run has"
            f" {len(mine['param_groups'])}; load_optimizer_states=False takes the weights only"
        )


def _apply_module(engine: DeepSpeedEngine, module: dict[str, torch.Tensor]) -> None:
    current = _untrained(engine, without_frozen=False)
    with torch.no_grad():
        for name in set(current) & set(module):
            current[name].copy_(module[name])


def _apply_optimizer(engine: DeepSpeedEngine, state: dict[str, Any]) -> None:
    optimizer = engine.optimizer
    if isinstance(optimizer, ClientOptimizer):
        optimizer.optimizer.load_state_dict(state["state_dict"])
        return
    assert optimizer is not None
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group.update(saved)
