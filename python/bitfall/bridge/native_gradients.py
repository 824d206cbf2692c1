"""Gradients of which some are written by the native encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitfall.bridge.gradients import OUTSIDE_OF_BACKWARD, Gradients
from bitfall.bridge.native_encoder import GradientSink
from bitfall.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection

SECOND_PASS = (
    "two forward passes of the BertModel in one backward pass: with several ranks the mean of its"
    ' gradients has begun after the first; set "bitfall": {"native_encoder": false} in the config'
)


class NativeGradients(Gradients, GradientSink):
    """As Gradients; the native encoder writes those of `native_names` straight into the slices."""

    def __init__(self, native_names: Collection[str], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        names = set(native_names)
        self._native = [i for i, entry in enumerate(self._trained) if entry.name in names]

    def begin(self) -> bool:
        """False: overwrite the slices; True: add to them, which hold gradients or zeros."""
        if not self._in_backward:
            name = self._trained[self._native[0]].name
            raise UsageError(OUTSIDE_OF_BACKWARD.format(name=name))
        if self._next_reduction > 0:
            raise UsageError(SECOND_PASS)
        if self._every_backward or not any(self._filled[index] for index in self._native):
            return False
        for index in self._native:
            if not self._filled[index]:
                self._slices[index].zero_()
        return True

    def complete(self, block: int) -> None:
        """The slices of `block` hold this pass's gradients."""
        for index in self._native:
            entry, target = self._trained[index], self._slices[index]
            if entry.block != block:
                continue
            earlier = self._waiting.pop(index, None)  # PyTorch's part of a tied parameter
            if earlier is not None:
                target.add_(earlier)
            self._filled[index] = True
            entry.parameter.grad = target if self._stays(entry) else None
            self._arrived(index, block)
