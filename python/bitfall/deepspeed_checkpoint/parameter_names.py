"""Finds the names of the optimizer's tensors where a checkpoint only has their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitfall._core import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from bitfall.deepspeed_checkpoint.tensors import StoredTensor

HALF_PRECISION_ERROR = 2.0**-8  # relative, of a master beside its bf16 copy


@dataclass
class UnnamedGroup:
    """A param group: its masters in one piece, or in f32 training the shapes of its tensors.

    The shape of a tensor that was never updated is None: not known.
    """

    shapes: Sequence[tuple[int, ...] | None] = ()
    flat: NDArray[np.float32] | None = None
    used: int = 0  # tensors, or elements of `flat`, that have got their names

    def fits(self, tensor: StoredTensor, values: NDArray[Any] | None) -> bool:
        """True if `tensor` of the model can be the next of this group, by its shape or, where only
        `flat` is known, by its size and `values` [numel] (None: by its size alone)."""
        if self.flat is None:
            next_shapes = self.shapes[self.used : self.used + 1]
            return any(shape in (None, tensor.shape) for shape in next_shapes)
        masters = self.flat[self.used : self.used + tensor.numel]
        if masters.size != tensor.numel or values is None:
            return masters.size == tensor.numel
        return np.allclose(values, masters, rtol=HALF_PRECISION_ERROR, atol=1e-7, equal_nan=True)

    def use(self, tensor: StoredTensor) -> None:
        self.used += 1 if self.flat is None else tensor.numel

    @property
    def is_complete(self) -> bool:
        return self.used == (len(self.shapes) if self.flat is None else self.flat.size)


def name_groups(
    groups: Sequence[UnnamedGroup],
    parameters: Mapping[str, StoredTensor],
    parameter_groups: Sequence[Sequence[str]] | None,
    path: Path,
) -> list[list[str]]:
    """The names of each group's tensors, in order.

    `parameters` are the model's, in its order, tied ones once. With `parameter_groups`, the names
    that the live optimizer has, it is only checked that these fit. Without, each group is taken to
    keep the model's order, as optimizers are made. Then one group that is as large as the model is
    the model; otherwise shapes, or masters that are near the model's values, must leave exactly one
    way. Parameters near no master are frozen. Raises CheckpointError otherwise.
    """
    if parameter_groups is not None:
        _check_given(groups, parameters, parameter_groups, path)
        return [list(names) for names in parameter_groups]
    result: list[list[str]] = [[] for _ in groups]
    if not groups:
        return result
    by_value = groups[0].flat is not None and not _is_whole(groups, parameters)
    for name, tensor in parameters.items():
        values = tensor.array().reshape(-1) if by_value else None
        fitting = [index for index, group in enumerate(groups) if group.fits(tensor, values)]
        if len(fitting) > 1 or (not fitting and not by_value):
            raise _ambiguous(path, name)
        for index in fitting:
            groups[index].use(tensor)
            result[index].append(name)
    if not all(group.is_complete for group in groups):
        raise _ambiguous(path, "the end")
    return result


def _is_whole(groups: Sequence[UnnamedGroup], parameters: Mapping[str, StoredTensor]) -> bool:
    total = sum(tensor.numel for tensor in parameters.values())
    return len(groups) == 1 and groups[0].flat is not None and groups[0].flat.size == total


def _ambiguous(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot tell which tensor of the optimizer belongs to which parameter (at"
        f" '{name[:80]}'): without ZeRO the file does not say; load it with load_checkpoint into an"
        " engine made by bitfall.initialize with the same optimizer"
    )


def _check_given(
    groups: Sequence[UnnamedGroup],
    parameters: Mapping[str, StoredTensor],
    parameter_groups: Sequence[Sequence[str]],
    path: Path,
) -> None:
    if len(groups) != len(parameter_groups):
        raise CheckpointError(
            f"{path}: has {len(groups)} param groups, but the optimizer {len(parameter_groups)}"
        )
    for group, names in zip(groups, parameter_groups, strict=True):
        for name in names:
            tensor = parameters.get(name)
            if tensor is None or not group.fits(tensor, None):
                shape = "no parameter" if tensor is None else list(tensor.shape)
                raise CheckpointError(
                    f"{path}: '{name}' ({shape} in the checkpoint) does not fit the optimizer's"
                    " next tensor; the checkpoint is of another model or optimizer"
                )
            group.use(tensor)
        if not group.is_complete:
            raise CheckpointError(
                f"{path}: a param group has more tensors than the optimizer's {len(names)}"
            )
