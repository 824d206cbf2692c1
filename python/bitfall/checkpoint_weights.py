"""The f32 weights of a checkpoint, bitfall's own or DeepSpeed's, without torch or DeepSpeed."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bitfall._core import CheckpointError
from bitfall.deepspeed_checkpoint import (
    checkpoint_folder,
    is_deepspeed_checkpoint,
    read_deepspeed_checkpoint,
)
from bitfall.safetensors_file import read_safetensors

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MODEL_FILE = "model.safetensors"
CLIENT_FILE = "client.safetensors"
MODULE = "module."  # begins the names of frozen parameters and buffers in it


class CheckpointWeights(NamedTuple):
    """`arrays` by the names of the model's state_dict: f32, integer buffers in their own dtype."""

    folder: Path
    source: str  # "bitfall" or "DeepSpeed 0.14.4"
    step: int
    arrays: dict[str, NDArray[Any]]


def read_checkpoint_weights(directory: Path, tag: str | None) -> CheckpointWeights:
    """DIRECTORY/TAG, with the tag of DIRECTORY/latest for None.

    Raises CheckpointError that names the file and what is wrong with it.
    """
    folder = checkpoint_folder(directory, tag)
    if is_deepspeed_checkpoint(folder):
        found = read_deepspeed_checkpoint(directory, folder.name, optimizer_states=False)
        source = f"DeepSpeed {found.version}"
        return CheckpointWeights(folder, source, found.global_steps, found.weights)
    if not (folder / "state.json").is_file():
        raise CheckpointError(
            f"{folder}: neither a checkpoint of DeepSpeed (mp_rank_00_model_states.pt) nor of"
            " bitfall (state.json)"
        )
    state = _read_json(folder / "state.json")
    sums = _read_json(folder / "checksums.json")
    arrays = _read_arrays(folder / MODEL_FILE, sums)
    if CLIENT_FILE in sums:  # what bitfall.initialize keeps beside the trained weights
        for name, array in _read_arrays(folder / CLIENT_FILE, sums).items():
            if name.startswith(MODULE):
                widened = array.astype(np.float32) if array.dtype == np.float16 else array
                arrays.setdefault(name.removeprefix(MODULE), widened)
    return CheckpointWeights(folder, "bitfall", state.get("global_step", 0), arrays)


def _read_arrays(path: Path, sums: dict[str, Any]) -> dict[str, NDArray[Any]]:
    data = path.read_bytes()
    if sums.get(path.name) != {"bytes": len(data), "crc32": f"{zlib.crc32(data):x}"}:
        raise _damaged(path)
    try:
        return read_safetensors(data)
    except ValueError:
        raise _damaged(path) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise _damaged(path)
    return document


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: changed or cut short since it was written; use an earlier one")
