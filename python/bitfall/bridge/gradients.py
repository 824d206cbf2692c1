"""Gradients on their way from torch's backward pass into the engine's f32 memory."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

import torch

from bitfall.bridge.layout import NO_BLOCK
from bitfall.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from bitfall._core import Updater
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


class Gradients:
    """Sums the gradients of an accumulation, and starts each block's mean over ranks.

    A parameter's .grad is its f32 slice where the parameter is f32 and a gradient came, so that
    torch adds in place; in 16 bits, where torch demands a .grad of the parameter's own dtype, it is
    None after every backward pass.
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        updater: Updater,
        slices: Sequence[torch.Tensor],
        native: Collection[str] = (),
        overlap: bool = False,
    ) -> None:
        """`slices` parallels `trained`. Parameters of `native` get their gradients added to their
        slices by the native encoder too. With `overlap`, reductions start during the backward pass
        that closes an accumulation."""
        self._trained = trained
        self._slices = slices
        self._native = [entry.name in native for entry in trained]
        self._start_reduction = updater.start_reduction
        self._overlap = overlap
        blocks = {entry.block for entry in trained} - {NO_BLOCK}
        self._order = [*sorted(blocks, reverse=True), NO_BLOCK]
        self._members: dict[int, list[int]] = {block: [] for block in self._order}
        for index, entry in enumerate(trained):
            self._members[entry.block].append(index)
        self._in_backward = False
        self._closes_accumulation = False
        self._hooks = [
            entry.parameter.register_post_accumulate_grad_hook(
                functools.partial(self._receive, index)
            )
            for index, entry in enumerate(trained)
        ]
        self.clear()

    @property
    def any_came(self) -> bool:
        """True if there was a backward pass since the last clear()."""
        return self._passes > 0

    @contextlib.contextmanager
    def backward(self, closes_accumulation: bool) -> Iterator[None]:
        """Gradients are accepted in here; `closes_accumulation`: the step follows."""
        self._in_backward = True
        self._closes_accumulation = closes_accumulation
        try:
            yield
            self._passes += 1
        finally:
            self._in_backward = False

    def finish(self) -> None:
        """All gradients are in: zeros where none came, and every reduction has begun."""
        for index, entry in enumerate(self._trained):
            self._check_in_place(index, entry)
            if not self._filled[index]:
                self._slices[index].zero_()
        while self._next < len(self._order):
            self._reduce_next()

    def clear(self) -> None:
        """Forgets all gradients."""
        self._passes = 0
        self._next = 0
        self._filled = list(self._native)
        self._missing = {block: set(members) for block, members in self._members.items()}
        for index, entry in enumerate(self._trained):
            entry.parameter.grad = None
            if self._native[index]:
                self._slices[index].zero_()

    def remove(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _stays(self, index: int) -> bool:
        """Whether .grad is the slice."""
        f32 = self._trained[index].parameter.dtype == torch.float32
        return f32 and not self._native[index]

    def _check_in_place(self, index: int, entry: Trained) -> None:
        gradient = entry.parameter.grad
        if self._stays(index) and self._filled[index]:
            ours = gradient is not None and gradient.data_ptr() == self._slices[index].data_ptr()
        else:
            ours = gradient is None
        if not ours:
            raise UsageError(DROPPED.format(name=entry.name))

    @torch.no_grad()
    def _receive(self, index: int, parameter: torch.nn.Parameter) -> None:
        """Called by torch when a backward pass has put its gradient into parameter.grad."""
        name, gradient = self._trained[index].name, parameter.grad
        if not self._in_backward:
            parameter.grad = None
            raise UsageError(OUTSIDE_OF_BACKWARD.format(name=name))
        if gradient is None:
            return
        if gradient.layout != torch.strided:
            gradient = gradient.to_dense()
        self._take(index, parameter, gradient)
        if self._overlap and self._closes_accumulation:
            self._complete(index)

    def _take(self, index: int, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        name, block = self._trained[index].name, self._trained[index].block
        target, stays = self._slices[index], self._stays(index)
        if block in self._order[: self._next]:
            raise UsageError(TOO_LATE.format(name=name))
        if not self._filled[index]:
            target.copy_(gradient)
            self._filled[index] = True
        elif not stays:
            target.add_(gradient)
        elif gradient.data_ptr() != target.data_ptr():
            raise UsageError(DROPPED.format(name=name))
        parameter.grad = target if stays else None

    def _complete(self, index: int) -> None:
        """Nothing more comes for this parameter; starts what can start, in order."""
        self._missing[self._trained[index].block].discard(index)
        while self._next < len(self._order) and not self._missing[self._order[self._next]]:
            self._reduce_next()

    @torch.no_grad()
    def _reduce_next(self) -> None:
        self._start_reduction(self._order[self._next])
        self._next += 1


class PartitionedGradients(Gradients):
    """The same for ZeRO stage 2: every backward pass is reduced, and blocks share memory.

    A block's gradients stay in torch's own .grad until the blocks above have left their memory.
    """

    def __init__(
        self, trained: Sequence[Trained], updater: Updater, slices: Sequence[torch.Tensor]
    ) -> None:
        super().__init__(trained, updater, slices, overlap=True)

    @contextlib.contextmanager
    def backward(self, closes_accumulation: bool) -> Iterator[None]:
        """As the base's; at its end every block is on its way."""
        del closes_accumulation
        self._next = 0
        self._missing = {block: set(members) for block, members in self._members.items()}
        with super().backward(closes_accumulation=True):
            yield
            while self._next < len(self._order):
                self._reduce_next()

    def finish(self) -> None:
        """Everything was sent by backward()."""
        for entry in self._trained:
            if entry.parameter.grad is not None:
                raise UsageError(DROPPED.format(name=entry.name))

    def _take(self, index: int, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        if self._trained[index].block in self._order[: self._next]:
            raise UsageError(TOO_LATE.format(name=self._trained[index].name))
        parameter.grad = gradient

    @torch.no_grad()
    def _reduce_next(self) -> None:
        block = self._order[self._next]
        for index in self._members[block]:
            parameter, target = self._trained[index].parameter, self._slices[index]
            if parameter.grad is None:
                target.zero_()
            else:
                target.copy_(parameter.grad)
                parameter.grad = None
        self._start_reduction(block, self._passes > 0)
        self._next += 1
