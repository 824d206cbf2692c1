"""Without ZeRO the model's file holds the optimizer, whose tensors have no names.

f32: the state_dict of a torch optimizer, one state per parameter. fp16 and bf16: the same for f32
masters, which are one flat tensor per param group ("fused") or one per parameter.
Source: deepspeed/runtime/fp16/fused_optimizer.py and unfused_optimizer.py, method state_dict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bitfall._core import CheckpointError
from bitfall.deepspeed_checkpoint.fields import field, items
from bitfall.deepspeed_checkpoint.flat_buffers import cut
from bitfall.deepspeed_checkpoint.optimizer_state import (
    EXP_AVG,
    EXP_AVG_SQ,
    LossScale,
    TrainedState,
    hyperparameters,
    loss_scale_of_fields,
    moment,
    optimizer_step,
    tensor_states,
)
from bitfall.deepspeed_checkpoint.parameter_names import UnnamedGroup, name_groups
from bitfall.deepspeed_checkpoint.tensors import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[np.float32]]

WRAPPED = "optimizer_state_dict"
FUSED = "fp32_groups_flat"
UNFUSED = "fp32_groups"


def read_whole_optimizer(
    optimizer: dict[str, Any],
    parameters: Mapping[str, StoredTensor],
    parameter_groups: Sequence[Sequence[str]] | None,
    path: Path,
) -> TrainedState:
    """Names, masters and moments of an optimizer that is not cut into slices.

    `optimizer` and `parameters` are of the model's file `path`: its entry 'optimizer', and the
    model's parameters with tied ones once. `parameter_groups`: see name_groups. Masters are empty
    in f32 training, where the model's own values are the masters. Raises CheckpointError.
    """
    base = field(optimizer, WRAPPED, dict, path) if WRAPPED in optimizer else optimizer
    states = tensor_states(base, path)
    masters = _masters(optimizer, path)
    if masters is not None and [len(group) for group in masters] != [len(one) for one in states]:
        raise CheckpointError(f"{path}: the optimizer's masters and states differ in number")

    fused = FUSED in optimizer
    groups = [
        UnnamedGroup(shapes=_shapes(group, path))
        if masters is None
        else UnnamedGroup(flat=_joined(masters[index]))
        for index, group in enumerate(states)
    ]
    names = name_groups(groups, parameters, parameter_groups, path)
    shapes = [{name: parameters[name].shape for name in group} for group in names]
    moments: dict[str, Arrays] = {}
    for key in (EXP_AVG, EXP_AVG_SQ):
        tensors = [[moment(state, key, path) for state in group] for group in states]
        moments[key] = _by_name(tensors, shapes, fused, path)
    return TrainedState(
        names,
        {} if masters is None else _by_name(masters, shapes, fused, path),
        moments[EXP_AVG],
        moments[EXP_AVG_SQ],
        optimizer_step(base, None, path),
        hyperparameters(base, path),
        _loss_scale(optimizer, path),
    )


def _masters(optimizer: dict[str, Any], path: Path) -> list[Sequence[StoredTensor]] | None:
    """The f32 masters of every param group, in one piece for fused ones; None in f32 training."""
    if FUSED in optimizer:
        flats = items(optimizer[FUSED], StoredTensor, f"'{FUSED}'", path)
        return [[flat] for flat in flats]
    if UNFUSED in optimizer:
        groups = items(optimizer[UNFUSED], list, f"'{UNFUSED}'", path)
        return [items(group, StoredTensor, f"'{UNFUSED}'", path) for group in groups]
    return None


def _joined(tensors: Sequence[StoredTensor]) -> NDArray[np.float32]:
    return np.concatenate([np.empty(0, np.float32), *(one.array().reshape(-1) for one in tensors)])


def _shapes(states: Sequence[dict[str, Any]], path: Path) -> list[tuple[int, ...] | None]:
    tensors = [moment(state, EXP_AVG, path) for state in states]
    return [None if tensor is None else tensor.shape for tensor in tensors]


def _by_name(
    groups: Sequence[Sequence[StoredTensor | None]],
    shapes: Sequence[dict[str, tuple[int, ...]]],
    fused: bool,
    path: Path,
) -> Arrays:
    """Arrays of the shapes' names; tensors that were never updated are left out."""
    result: Arrays = {}
    for tensors, group_shapes in zip(groups, shapes, strict=True):
        pieces = [group_shapes] if fused else [{name: group_shapes[name]} for name in group_shapes]
        for tensor, piece in zip(tensors, pieces, strict=True):
            if tensor is not None:
                result |= cut([tensor], piece, 0, path)
    return result


def _loss_scale(optimizer: dict[str, Any], path: Path) -> LossScale | None:
    if "cur_scale" not in optimizer:
        return None
    return loss_scale_of_fields(optimizer, optimizer.get("dynamic_loss_scale") is True, None, path)
