"""Typed access to what a checkpoint file holds: anything unexpected is an error that names it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from bitfall._core import CheckpointError
from bitfall.deepspeed_checkpoint.pickle_machine import Inert
from bitfall.deepspeed_checkpoint.tensors import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

T = TypeVar("T")

MAX_VALUES = 1_000_000
MAX_DEPTH = 64


def field(content: Any, key: Any, kind: type[T], path: Path) -> T:
    """content[key], which must be a `kind`. Raises CheckpointError that names file and key."""
    if not isinstance(content, dict) or key not in content:
        raise CheckpointError(
            f"{path}: has no '{key}'; expected a checkpoint that DeepSpeed 0.6 to 0.19 wrote"
        )
    return expect(content[key], kind, f"'{key}'", path)


def expect(value: Any, kind: type[T], what: str, path: Path) -> T:
    """`value`, which must be a `kind`. Raises CheckpointError that names file and `what`."""
    if not isinstance(value, kind):
        raise CheckpointError(
            f"{path}: {what} is a {type(value).__name__}; expected a {kind.__name__}"
        )
    return value


def items(value: Any, kind: type[T], what: str, path: Path) -> Sequence[T]:
    """`value`, which must be a list or tuple of `kind`. Raises CheckpointError."""
    if not isinstance(value, (list, tuple)):
        raise CheckpointError(f"{path}: {what} is a {type(value).__name__}; expected a list")
    return [expect(item, kind, f"an element of {what}", path) for item in value]


def count(content: Any, key: str, path: Path, otherwise: int = 0) -> int:
    """A natural number; `otherwise` where the key is absent. Raises CheckpointError."""
    value = content.get(key, otherwise)
    if type(value) is not int or not 0 <= value < 2**62:
        raise CheckpointError(f"{path}: '{key}' is not a natural number")
    return value


def plain(value: Any, what: str, path: Path) -> Any:
    """`value` with tensors as numpy arrays and objects as dictionaries of their attributes.

    Raises CheckpointError for values that are nested too deeply or refer to themselves.
    """
    remaining = MAX_VALUES

    def convert(value: Any, depth: int) -> Any:
        nonlocal remaining
        remaining -= 1
        if remaining < 0 or depth > MAX_DEPTH:
            raise CheckpointError(f"{path}: {what} is nested too deeply or holds too many values")
        if isinstance(value, dict):
            return {key: convert(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(convert(item, depth + 1) for item in value)
        if isinstance(value, Inert):
            return convert(value.state if value.state else value.arguments, depth + 1)
        if isinstance(value, StoredTensor):
            return value.array()
        if value is None or isinstance(value, (bool, int, float, str, bytes, set)):
            return value
        raise CheckpointError(f"{path}: {what} holds a {type(value).__name__}")

    return convert(value, 0)
