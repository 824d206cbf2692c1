"""Arrays in a safetensors file.

Source: README of huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from bitfall.outputs import atomic_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

DTYPE_NAMES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
NUMPY_NAMES = {file: numpy for numpy, file in DTYPE_NAMES.items()}
HEADER_ALIGNMENT = 8
LENGTH_BYTES = 8


def write_safetensors(
    path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> None:
    """Writes `arrays` by name, row-major and little-endian; `path` appears when it is complete."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": DTYPE_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)


def read_safetensors(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of a whole file, as views of `data`; bf16, which numpy has not, as f32.

    Raises ValueError for a malformed file.
    """
    size = int.from_bytes(data[:LENGTH_BYTES], "little")
    begin = LENGTH_BYTES + size
    try:
        header = json.loads(data[LENGTH_BYTES:begin])
        header.pop("__metadata__", None)
        return {name: _array(memoryview(data)[begin:], tensor) for name, tensor in header.items()}
    except (AttributeError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"malformed header ({error})") from None


def _array(data: memoryview, tensor: dict[str, Any]) -> NDArray[Any]:
    first, last = tensor["data_offsets"]
    if not 0 <= first <= last <= len(data):
        raise ValueError("a tensor outside of the file")
    if tensor["dtype"] == "BF16":
        bits = np.frombuffer(data[first:last], "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor["shape"])
    kind = np.dtype(NUMPY_NAMES[tensor["dtype"]]).newbyteorder("<")
    return np.frombuffer(data[first:last], kind).reshape(tensor["shape"])
