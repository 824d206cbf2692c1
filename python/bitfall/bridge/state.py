"""State dicts as JSON and named tensors: what a checkpoint can hold without running code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from bitfall.errors import InputError

# Objects with one of these keys stand for what JSON has not.
TENSOR, TUPLE, ITEMS, FLOAT = "__tensor__", "__tuple__", "__items__", "__float__"
TAGS = {TENSOR, TUPLE, ITEMS, FLOAT}

DTYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

PackedTensor = tuple[str, list[int], Any]  # (safetensors dtype, shape, bytes)


def encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON; its tensors go into `tensors` under their path.

    None, booleans, numbers, strings, lists, tuples, dicts, numpy scalars and tensors are known;
    anything else raises InputError that names the path.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, np.generic):
        return encode(value.item(), path, tensors)
    if isinstance(value, float):
        return value if math.isfinite(value) else {FLOAT: repr(value)}
    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {TENSOR: path}
    if isinstance(value, (list, tuple)):
        items = [encode(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
        return {TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        encoded = [
            (encode(key, path, tensors), encode(item, f"{path}.{key}", tensors))
            for key, item in value.items()
        ]
        if all(isinstance(key, str) and key not in TAGS for key in value):
            return dict(encoded)
        return {ITEMS: encoded}
    raise InputError(
        f"{path} is a {type(value).__name__}: a checkpoint holds numbers, strings, lists, dicts and"
        " tensors; convert it, or save it in a file of your own"
    )


def decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What encode() was given. Raises KeyError for a tensor that is missing."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if FLOAT in value:
        return float(value[FLOAT])
    if TUPLE in value:
        return tuple(decode(item, tensors) for item in value[TUPLE])
    if ITEMS in value:
        return {decode(k, tensors): decode(item, tensors) for k, item in value[ITEMS]}
    return {key: decode(item, tensors) for key, item in value.items()}


def pack(name: str, tensor: torch.Tensor) -> PackedTensor:
    """A tensor as the engine writes it. Raises InputError for a dtype or layout it has not."""
    if tensor.dtype not in NAMES or tensor.layout != torch.strided:
        raise InputError(
            f"{name} is a {tensor.layout} tensor of {tensor.dtype}: a checkpoint holds dense"
            f" tensors of {', '.join(NAMES.values())}"
        )
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return NAMES[tensor.dtype], list(tensor.shape), data


def unpack(packed: PackedTensor) -> torch.Tensor:
    """The tensor of pack(), in memory of its own."""
    dtype, shape, data = packed
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if len(data) else torch.empty(0)
    return (
        flat.view(DTYPES[dtype]).reshape(shape)
        if len(data)
        else flat.to(DTYPES[dtype]).reshape(shape)
    )
