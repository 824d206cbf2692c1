"""Storages and tensors of a torch.save file as numpy arrays, read when they are asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bitfall._core import CheckpointError
from bitfall.deepspeed_checkpoint.pickle_machine import PickleError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

MAX_DIMENSIONS = 32
MAX_COPIES = 16  # of each element; tied and once converted tensors need a few
MAX_ELEMENTS = 2**48

# torch dtype -> how its bytes are read; bfloat16 has no numpy dtype and is widened afterwards.
DTYPES = {
    "float32": "<f4",
    "float64": "<f8",
    "float16": "<f2",
    "bfloat16": "<u2",
    "int64": "<i8",
    "int32": "<i4",
    "int16": "<i2",
    "int8": "i1",
    "uint8": "u1",
    "bool": "?",
}
FLOATING = ("float32", "float64", "float16", "bfloat16")

# The class that torch.save names for a storage -> dtype.
STORAGE_TYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


@dataclass(frozen=True)
class StorageType:
    """Element type of a storage, as a pickle names it."""

    dtype: str

    @property
    def item_bytes(self) -> int:
        return np.dtype(DTYPES[self.dtype]).itemsize


@dataclass(eq=False)
class Storage:
    """Flat memory of a file that tensors share: `numel` elements of `dtype`, read on first use."""

    file: Path
    dtype: str
    numel: int
    read: Callable[[], bytes]
    _values: NDArray[Any] | None = field(default=None, init=False)
    _copied: int = field(default=0, init=False)

    def values_for(self, numel: int) -> NDArray[Any]:
        """[self.numel] of the dtype, bfloat16 as its bits in uint16, to copy `numel` of them.

        Raises CheckpointError if so many tensors lie upon each other that copies of them would
        fill the memory.
        """
        self._copied += numel
        if self._copied > MAX_COPIES * self.numel:
            raise CheckpointError(f"{self.file}: too many tensors in the same memory")
        if self._values is None:
            self._values = np.frombuffer(self.read(), DTYPES[self.dtype])
        return self._values


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A view of a storage. The constructor checks that it lies within it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or len(self.shape) > MAX_DIMENSIONS:
            raise PickleError("a tensor whose shape and strides do not fit each other")
        if any(type(number) is not int or number < 0 for number in numbers):
            raise PickleError("a tensor with a shape, stride or offset that is no natural number")
        if math.prod(size for size in self.shape if size > 0) > MAX_ELEMENTS:
            raise PickleError(f"a tensor of more than {MAX_ELEMENTS} elements")
        last = self.offset + sum(
            (size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)
        )
        if self.numel > 0 and (last >= self.storage.numel or self.numel > self.storage.numel):
            raise PickleError(
                f"a tensor of shape {list(self.shape)} reaches beyond its storage of"
                f" {self.storage.numel} elements"
            )

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_floating(self) -> bool:
        return self.storage.dtype in FLOATING

    @property
    def place(self) -> tuple[Any, ...]:
        """Equal for two names of one tensor, such as tied weights."""
        return id(self.storage), self.offset, self.shape, self.strides

    def array(self) -> NDArray[Any]:
        """A contiguous copy: f32 for floating dtypes, otherwise the tensor's own dtype."""
        if self.numel == 0:
            view = np.empty(self.shape, DTYPES[self.storage.dtype])
        else:
            values = self.storage.values_for(self.numel)[self.offset :]
            strides = [stride * values.itemsize for stride in self.strides]
            view = np.lib.stride_tricks.as_strided(values, self.shape, strides, writeable=False)
        if self.storage.dtype == "bfloat16":
            bits = np.array(view, np.uint32, order="C")
            bits <<= 16
            return bits.view(np.float32)
        return np.array(view, np.float32 if self.is_floating else None, order="C")
