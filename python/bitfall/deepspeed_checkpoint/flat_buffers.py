"""Cuts flat buffers into parameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from bitfall._core import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from bitfall.deepspeed_checkpoint.tensors import StoredTensor


def cut(
    parts: Sequence[StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    max_padding: int,
    where: object,
) -> dict[str, NDArray[np.float32]]:
    """Joins `parts` and cuts them into arrays of `shapes`, in their order; views of one buffer.

    Up to `max_padding` elements may be left at the end. Raises CheckpointError that names `where`.
    """
    needed = sum(math.prod(shape) for shape in shapes.values())
    available = sum(part.numel for part in parts)
    if not needed <= available <= needed + max_padding:
        raise CheckpointError(
            f"{where}: {available} elements are there for parameters of {needed} (up to"
            f" {max_padding} more for alignment); the files do not belong together"
        )
    if not all(part.is_floating for part in parts):
        raise CheckpointError(f"{where}: optimizer states that are not floating-point numbers")
    flat = np.concatenate([part.array().reshape(-1) for part in parts])
    result, offset = {}, 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        result[name] = flat[offset : offset + numel].reshape(shape)
        offset += numel
    return result
