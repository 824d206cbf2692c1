"""Which classes and functions a DeepSpeed checkpoint may name, and what is done in their place."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitfall.deepspeed_checkpoint.pickle_machine import (
    Constructor,
    Inert,
    PickleError,
    hashable,
)
from bitfall.deepspeed_checkpoint.tensors import (
    DTYPES,
    STORAGE_TYPES,
    Storage,
    StorageType,
    StoredTensor,
)

# Objects of these only hold values (a loss scaler, a slice mapping, a script's arguments).
INERT_CLASSES = ("argparse.Namespace", "types.SimpleNamespace")
INERT_PACKAGES = ("deepspeed.",)

# Classes that appear as arguments only.
NAMES = (
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.strided",
    *(f"torch.{dtype}" for dtype in DTYPES),
)

NUMPY_SCALARS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


def resolve(name: str) -> Any:
    """The value of the global `name`. Raises PickleError that names it if it is not allowed."""
    if name in FUNCTIONS:
        return Constructor(name, FUNCTIONS[name])
    module, _, last = name.rpartition(".")
    if module in ("torch", "torch.storage") and last in STORAGE_TYPES:
        return StorageType(STORAGE_TYPES[last])
    if name in ("torch.storage.UntypedStorage", "torch.UntypedStorage"):
        return StorageType("uint8")
    if name in NAMES:
        return name
    if name in INERT_CLASSES or name.startswith(INERT_PACKAGES):
        return Constructor(name, lambda *arguments: Inert(name, arguments))
    raise PickleError(
        f"it holds an object of '{name}', which is none of PyTorch's tensors, plain containers or"
        " DeepSpeed's own classes; nothing of it was run"
    )


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, Storage) or not _is_tuple(shape) or not _is_tuple(strides):
        raise PickleError("a tensor without a storage, shape or strides")
    return StoredTensor(storage, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise PickleError("a parameter without a tensor")
    return data


def _tensor_of_class(function: Any, kind: Any, arguments: Any, _state: Any) -> StoredTensor:
    """A tensor with attributes of its own, which say nothing here."""
    plain = kind in ("torch.Tensor", "torch.nn.parameter.Parameter")
    if not plain or not isinstance(function, Constructor) or not _is_tuple(arguments):
        raise PickleError("a tensor of a class of its own")
    return _parameter(function.call(*arguments))


def _bytes(text: Any, encoding: Any) -> bytes:
    """Protocol 2 writes bytes as Latin-1 text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise PickleError("bytes that are not written as Latin-1")
    try:
        return text.encode("latin1")
    except UnicodeEncodeError:
        raise PickleError("bytes that are not written as Latin-1") from None


def _set(items: Any = ()) -> set[Any]:
    if not isinstance(items, (list, tuple)):
        raise PickleError("a set that is not made from a list")
    return {hashable(item) for item in items}


def _dict(items: Any = None) -> dict[Any, Any]:
    """OrderedDict, given its pairs or filled afterwards."""
    if items is None:
        return {}
    if not isinstance(items, list) or any(
        not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in items
    ):
        raise PickleError("a dictionary that is not made from pairs")
    return {hashable(key): value for key, value in items}


def _list(items: Any = ()) -> list[Any]:
    if not isinstance(items, (list, tuple)):
        raise PickleError("a list that is not made from a list")
    return list(items)


def _size(items: Any) -> tuple[Any, ...]:
    if not _is_tuple(items) or any(type(item) is not int for item in items):
        raise PickleError("a torch.Size that does not hold integers")
    return tuple(items)


def _attribute(owner: Any, name: Any) -> Inert:
    """Some Python versions write an enumeration's member as getattr(class, name)."""
    if not isinstance(owner, Constructor) or not isinstance(name, str):
        raise PickleError("getattr of something that is not a class")
    if not owner.name.startswith(INERT_PACKAGES):
        raise PickleError(f"getattr of '{owner.name}'")
    return Inert(owner.name, (name,))


def _numpy_dtype(kind: Any, *_: Any) -> Inert:
    if kind not in NUMPY_SCALARS:
        raise PickleError("a numpy value that is no number")
    return Inert("numpy.dtype", (kind,))


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, Inert) or dtype.class_name != "numpy.dtype":
        raise PickleError("a numpy value without a dtype")
    kind = np.dtype(dtype.arguments[0]).newbyteorder("<")
    if not isinstance(data, bytes) or len(data) != kind.itemsize:
        raise PickleError("a numpy value of the wrong size")
    return np.frombuffer(data, kind)[0].item()


def _is_tuple(value: Any) -> bool:
    return isinstance(value, tuple)


FUNCTIONS = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_class,
    "torch.Size": _size,
    "torch.device": lambda kind, *_: kind,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda *_: {},
    "_codecs.encode": _bytes,
    **{
        f"{module}.{name}": function
        for module in ("__builtin__", "builtins")
        for name, function in (
            ("set", _set),
            ("frozenset", _set),
            ("dict", _dict),
            ("list", _list),
            ("getattr", _attribute),
        )
    },
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
