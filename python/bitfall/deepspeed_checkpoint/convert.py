"""Writes a DeepSpeed checkpoint in bitfall's format, for an engine to load."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from bitfall._core import CheckpointError
from bitfall.safetensors_file import write_safetensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from bitfall.deepspeed_checkpoint.checkpoint import DeepSpeedCheckpoint

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def write_for_engine(
    checkpoint: DeepSpeedCheckpoint,
    shapes: Mapping[str, tuple[int, ...]],
    state: str,
    folder: Path,
    with_moments: bool,
) -> None:
    """Fills `folder` with the files of engine/checkpoint.h.

    `shapes` of the parameters that the engine trains. `state`: text of a state.json of this very
    engine, whose config and bit schedule are kept: DeepSpeed saves no bits, so the schedule is the
    engine's. `with_moments` False: the engine's caller has the optimizer. Raises CheckpointError if
    the checkpoint is of another model.
    """
    folder.mkdir(parents=True)
    _check(checkpoint, shapes)
    weights = {name: checkpoint.weights[name] for name in shapes}
    moments = _moments(checkpoint, shapes) if with_moments else {}
    write_safetensors(folder / FILES[0], weights, {"format": "pt"})
    write_safetensors(folder / FILES[1], moments, {"format": "pt"})
    (folder / FILES[2]).write_text(json.dumps(_state(checkpoint, json.loads(state))))
    sums = {}
    for name in FILES:
        data = (folder / name).read_bytes()
        sums[name] = {"bytes": len(data), "crc32": f"{zlib.crc32(data):x}"}
    (folder / "checksums.json").write_text(json.dumps(sums))


def _check(checkpoint: DeepSpeedCheckpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        found = checkpoint.weights.get(name)
        if found is None or found.shape != tuple(shape) or found.dtype != np.float32:
            seen = "is not there" if found is None else f"is {found.dtype} {list(found.shape)}"
            raise CheckpointError(
                f"{checkpoint.folder}: '{name}' {seen}, but the model has float32 {list(shape)};"
                " load it into the model that it was saved from"
            )


def _moments(
    checkpoint: DeepSpeedCheckpoint, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[Any]]:
    return {
        f"{name}.{key}": found.get(name, np.zeros(shape, np.float32))
        for key, found in (
            ("exp_avg", checkpoint.exp_avg),
            ("exp_avg_sq", checkpoint.exp_avg_sq),
        )
        for name, shape in shapes.items()
    }


def _state(checkpoint: DeepSpeedCheckpoint, state: dict[str, Any]) -> dict[str, Any]:
    state["global_step"] = max(checkpoint.global_steps - checkpoint.skipped_steps, 0)
    state["skipped_steps"] = checkpoint.skipped_steps
    state["boundaries"] = checkpoint.global_steps
    state["optimizer_steps"] = checkpoint.optimizer_step
    state["client_state"] = "{}"
    fp16 = state["config"].get("fp16", {})
    dynamic = fp16.get("enabled") is True and fp16.get("loss_scale") == 0
    scale = checkpoint.loss_scale
    if dynamic and scale is not None and scale.dynamic:
        state["loss_scaler"] |= {
            "scale": scale.scale,
            "iteration": scale.iteration,
            "last_overflow_iteration": scale.last_overflow_iteration,
        }
        if scale.hysteresis is not None:
            state["loss_scaler"]["hysteresis"] = scale.hysteresis
    return state
