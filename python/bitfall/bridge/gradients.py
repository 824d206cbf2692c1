"""Gradients on their way from torch's backward pass into the engine's flat f32 buffer."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

import torch

from bitfall.bridge.layout import NO_BLOCK
from bitfall.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bitfall.bridge.layout import Trained

OUTSIDE_OF_BACKWARD = (
    "a backward pass reached '{name}' outside of engine.backward(): call engine.backward(loss)"
    " instead of loss.backward(), which knows nothing of loss scale and accumulation"
)
DROPPED = (
    "the gradient of '{name}' was taken out of the engine's memory between backward and step"
    " (zero_grad(set_to_none=True), or an assignment to .grad): leave .grad alone, engine.step()"
    " clears it; engine.zero_grad() throws accumulated gradients away"
)
TOO_LATE = (
    "a second backward pass changes '{name}', whose mean over ranks has begun: with several ranks"
    " call engine.step() after each backward(), or add the losses and call backward() once"
)


# Integers of the same size: those of 0.0 are 0, and reductions over them are faster.
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


class Gradients:
    """Sums gradients in f32 slices, and reports each block when nothing more is to come.

    A parameter's .grad is the slice itself where it is f32 and a gradient came, so that torch adds
    in place; in 16 bits, where torch demands .grad of the parameter's own dtype, it is None after
    every backward pass. So it is with ZeRO stage 2, where every backward pass is reduced by itself
    and blocks share memory: a gradient then waits in torch's memory until it is its block's turn.
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        slices: Sequence[torch.Tensor],
        start_reduction: Callable[[int, bool], None],
        zero_gradient: Callable[[int], None],
        overlap: bool,
        every_backward: bool,
    ) -> None:
        """`start_reduction(block, accumulate)` is called once per block and step, from the last
        block to NO_BLOCK, in `overlap` already during the backward pass that closes an
        accumulation; with `every_backward` in each, to `accumulate` after the first.
        `zero_gradient(index)` zeros a slice, and writes nothing where it is zero."""
        self._trained = trained
        self._slices = slices
        self._start_reduction = start_reduction
        self._zero_gradient = zero_gradient
        self._overlap = overlap
        self._every_backward = every_backward
        self._waiting: dict[int, torch.Tensor] = {}
        self._passes = 0  # since the last clear()
        self._filled = [False] * len(trained)
        self._reduction_order = [
            *sorted({t.block for t in trained if t.block != NO_BLOCK}, reverse=True),
            NO_BLOCK,
        ]
        self._in_backward = False
        self._closes_accumulation = False
        self._reset_counters()
        self._hooks = [
            entry.parameter.register_post_accumulate_grad_hook(
                functools.partial(self._receive, index)
            )
            for index, entry in enumerate(trained)
        ]

    @property
    def any_filled(self) -> bool:
        """True if a gradient came since the last clear()."""
        return any(self._filled) or self._passes > 0

    @contextlib.contextmanager
    def backward(self, closes_accumulation: bool) -> Iterator[None]:
        """Gradients are accepted in here; `closes_accumulation`: the step follows."""
        self._in_backward = True
        self._closes_accumulation = closes_accumulation
        try:
            yield
        finally:
            self._in_backward = False
        if self._every_backward:
            self._reduce_rest()
            self._filled = [False] * len(self._trained)
            self._reset_counters()
            self._passes += 1

    def finish(self) -> None:
        """All gradients are in: zeros where none came, and every reduction has begun."""
        for index, entry in enumerate(self._trained):
            self._check_in_place(index, entry)
            if not self._filled[index] and not self._every_backward:
                self._zero_gradient(index)
        if not self._every_backward:
            self._reduce_rest()

    def clear(self) -> None:
        """Forgets all gradients."""
        for index, entry in enumerate(self._trained):
            entry.parameter.grad = None
            self._filled[index] = False
        self._waiting.clear()
        self._passes = 0
        self._reset_counters()

    def remove(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _reset_counters(self) -> None:
        self._next_reduction = 0
        self._missing: dict[int, set[int]] = {block: set() for block in self._reduction_order}
        for index, entry in enumerate(self._trained):
            self._missing[entry.block].add(index)

    def _check_in_place(self, index: int, entry: Trained) -> None:
        gradient = entry.parameter.grad
        expected = self._slices[index] if self._stays(entry) and self._filled[index] else None
        if gradient is not expected and (
            gradient is None or expected is None or gradient.data_ptr() != expected.data_ptr()
        ):
            raise UsageError(DROPPED.format(name=entry.name))

    def _stays(self, entry: Trained) -> bool:
        return entry.parameter.dtype == torch.float32 and not self._every_backward

    @torch.no_grad()
    def _receive(self, index: int, parameter: torch.nn.Parameter) -> None:
        """Called by torch when a backward pass has put its gradient into parameter.grad."""
        entry, target, gradient = self._trained[index], self._slices[index], parameter.grad
        if not self._in_backward:
            parameter.grad = None
            raise UsageError(OUTSIDE_OF_BACKWARD.format(name=entry.name))
        if gradient is None:
            return
        if entry.block in self._reduction_order[: self._next_reduction]:
            raise UsageError(TOO_LATE.format(name=entry.name))
        if gradient.layout != torch.strided:
            gradient = gradient.to_dense()
        stays = self._stays(entry)
        if self._every_backward and (
            index in self._waiting or entry.block != self._reduction_order[self._next_reduction]
        ):
            earlier = self._waiting.get(index)
            self._waiting[index] = gradient if earlier is None else earlier.float() + gradient
            self._filled[index] = True
        elif not self._filled[index]:
            self._fill(index, gradient)
            self._filled[index] = True
        elif not stays:
            target.add_(gradient)
        elif gradient.data_ptr() != target.data_ptr():
            raise UsageError(DROPPED.format(name=entry.name))
        parameter.grad = target if stays else None
        self._arrived(index, entry.block)

    def _fill(self, index: int, gradient: torch.Tensor) -> None:
        """The slice = gradient; what stays zero, as most rows of an embedding, takes no memory."""
        target = self._slices[index]
        spares_memory = self._trained[index].is_embedding and not self._every_backward
        if not spares_memory or target.device.type != "cpu" or gradient.dtype not in BITS:
            target.copy_(gradient)
            return
        bits = gradient.contiguous().view(BITS[gradient.dtype])
        self._zero_gradient(index)
        used = torch.nonzero(bits.amin(1) | bits.amax(1)).flatten()
        target[used] = gradient[used].to(target.dtype)

    def _arrived(self, index: int, block: int) -> None:
        """A parameter has its gradient of this backward pass. If nothing more comes for it before
        its block is reduced, starts the reductions that can start, in order."""
        closes = self._overlap and self._closes_accumulation
        if not (closes or self._every_backward):
            return
        self._missing[block].discard(index)
        while (
            self._next_reduction < len(self._reduction_order)
            and not self._missing[self._reduction_order[self._next_reduction]]
        ):
            self._reduce_next()

    def _reduce_rest(self) -> None:
        while self._next_reduction < len(self._reduction_order):
            self._reduce_next()

    @torch.no_grad()
    def _reduce_next(self) -> None:
        block = self._reduction_order[self._next_reduction]
        if self._every_backward:
            self._complete_shared(block)
        self._start_reduction(block, self._passes > 0)
        self._next_reduction += 1

    def _complete_shared(self, block: int) -> None:
        """Gradients that waited and zeros, into memory that other blocks have used."""
        for index, entry in enumerate(self._trained):
            if entry.block != block:
                continue
            waited = self._waiting.pop(index, None)
            if waited is not None:
                self._slices[index].copy_(waited)
            elif not self._filled[index]:
                self._slices[index].zero_()
