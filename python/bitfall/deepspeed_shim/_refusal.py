"""Answers for the names of DeepSpeed that bitfall does not provide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from bitfall._core import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

STAGE_3 = (
    "it belongs to ZeRO stage 3, and bitfall has stages 0 to 2, where every rank holds all weights:"
    ' set "zero_optimization": {"stage": 2}'
)


def refused(name: str, reason: str) -> Callable[..., NoReturn]:
    """A function that can be imported, but raises UnsupportedError when called."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UnsupportedError(f"{name}: not in bitfall; {reason}")

    refuse.__name__ = name.rsplit(".", 1)[-1]
    return refuse


def missing_attributes(module: str) -> Callable[[str], NoReturn]:
    """A module's __getattr__ for names that are not there: an AttributeError that says so."""

    def __getattr__(name: str) -> NoReturn:  # noqa: N807
        raise AttributeError(
            f"bitfall does not provide '{module}.{name}'. It stands in for the training engine of"
            " DeepSpeed with ZeRO stages 0 to 2 and MoQ; for anything else run the script with"
            " python and a real DeepSpeed"
        )

    return __getattr__
