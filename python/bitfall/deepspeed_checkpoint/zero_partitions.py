"""ZeRO stages 1 and 2: every rank's file holds its slice of each param group's flat buffers.

Source: deepspeed/runtime/zero/stage_1_and_2.py and bf16_optimizer.py, method state_dict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitfall._core import CheckpointError
from bitfall.deepspeed_checkpoint.fields import expect, field, items
from bitfall.deepspeed_checkpoint.flat_buffers import cut
from bitfall.deepspeed_checkpoint.optimizer_state import (
    EXP_AVG,
    EXP_AVG_SQ,
    TrainedState,
    hyperparameters,
    loss_scale_of_scaler,
    moment,
    optimizer_step,
    tensor_states,
)
from bitfall.deepspeed_checkpoint.tensors import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from bitfall.deepspeed_checkpoint.torch_file import TorchFile

    Shapes = dict[str, tuple[int, ...]]

MASTERS = "single_partition_of_fp32_groups"
BASE = "base_optimizer_state"
ALIGNMENT = 2  # elements per rank to which DeepSpeed pads a group


def read_partitions(
    ranks: Sequence[TorchFile], param_shapes: Any, model_path: Path, optimizer_states: bool
) -> TrainedState:
    """Joins the slices of all ranks and cuts them into parameters.

    `param_shapes` is the model file's entry of that name: one dictionary name -> shape per param
    group, in the order of the flat buffers. Raises CheckpointError for missing ranks, groups that
    differ and sizes that do not add up.
    """
    shapes = _checked_shapes(param_shapes, model_path)
    states = [field(rank.content, "optimizer_state_dict", dict, rank.path) for rank in ranks]
    paths = [rank.path for rank in ranks]
    for state, path in zip(states, paths, strict=True):
        _check_partition_count(state, len(ranks), path)

    masters = [_masters(state, path) for state, path in zip(states, paths, strict=True)]
    groups = [list(group) for group in shapes]
    first, path = states[0], paths[0]
    if not optimizer_states:
        return TrainedState(groups, _merge(masters, shapes, paths), {}, {})
    exp_avg, exp_avg_sq = (
        [_moments(state, key, path) for state, path in zip(states, paths, strict=True)]
        for key in (EXP_AVG, EXP_AVG_SQ)
    )
    base = field(first, BASE, object, path)
    return TrainedState(
        groups,
        _merge(masters, shapes, paths),
        _merge(exp_avg, shapes, paths),
        _merge(exp_avg_sq, shapes, paths),
        optimizer_step(base, first.get("base_optimizer_state_step"), path),
        hyperparameters(base, path),
        loss_scale_of_scaler(first.get("loss_scaler"), path),
    )


def _checked_shapes(param_shapes: Any, path: Path) -> list[Shapes]:
    groups = items(param_shapes, dict, "'param_shapes'", path)
    for group in groups:
        for name, shape in group.items():
            expect(name, str, "a name in 'param_shapes'", path)
            sizes = items(shape, int, f"the shape of '{name[:80]}'", path)
            if any(size < 0 for size in sizes):
                raise CheckpointError(f"{path}: the shape of '{name[:80]}' has a negative size")
    return [{name: tuple(shape) for name, shape in group.items()} for group in groups]


def _check_partition_count(state: dict[str, Any], files: int, path: Path) -> None:
    partitions = state.get("partition_count", files)
    counts = [partitions] if isinstance(partitions, int) else partitions
    expected = max(items(counts, int, "'partition_count'", path), default=files)
    if expected != files:
        raise CheckpointError(
            f"{path}: {expected} ranks wrote this checkpoint, but the files of {files} are there;"
            " copy the files of all ranks of one run"
        )


def _masters(state: dict[str, Any], path: Path) -> Sequence[StoredTensor | None]:
    return items(field(state, MASTERS, object, path), StoredTensor, f"'{MASTERS}'", path)


def _moments(state: dict[str, Any], key: str, path: Path) -> Sequence[StoredTensor | None]:
    """One flat tensor per param group; None for groups that were never updated."""
    found = []
    for group in tensor_states(field(state, BASE, object, path), path):
        if len(group) != 1:
            raise CheckpointError(
                f"{path}: a param group of {len(group)} tensors in '{BASE}'; expected one flat one"
            )
        found.append(moment(group[0], key, path))
    return found


def _merge(
    by_rank: Sequence[Sequence[StoredTensor | None]],
    shapes: Sequence[Shapes],
    paths: Sequence[Path],
) -> dict[str, NDArray[np.float32]]:
    """Slices [rank][group] joined over ranks; name -> array of its shape."""
    for groups, path in zip(by_rank, paths, strict=True):
        if len(groups) != len(shapes):
            raise CheckpointError(
                f"{path}: has {len(groups)} param groups, but the file of the model names"
                f" {len(shapes)}"
            )
    merged: dict[str, NDArray[np.float32]] = {}
    for index, group_shapes in enumerate(shapes):
        slices = [groups[index] for groups in by_rank]
        present = [tensor for tensor in slices if tensor is not None]
        if len(present) == len(slices):
            padding = ALIGNMENT * len(slices) - 1
            merged |= cut(present, group_shapes, padding, paths[0].parent)
        elif present:
            raise CheckpointError(
                f"{paths[0].parent}: only some ranks hold a state for param group {index}"
            )
    return merged
