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

<<<<<<< /tmp/bu_cur
    A parameter's .grad is its f32 slice where the parameter is f32 and a gradient came, so that
    torch adds in place; in 16 bits, where torch demands a .grad of the parameter's own dtype, it is
    None after every backward pass.
=======
    A parameter's .grad is the slice itself where it is f32 and a gradient came, so that torch adds
    in place; in 16 bits, where torch demands .grad of the parameter's own dtype, it is None after
    every backward pass. So it is with ZeRO stage 2, where every backward pass is reduced by itself
    and blocks share memory: a gradient then waits in torch's memory until it is its block's turn.
>>>>>>> /tmp/bu_new
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        updater: Updater,
        slices: Sequence[torch.Tensor],
<<<<<<< /tmp/bu_cur
        native: Collection[str] = (),
        overlap: bool = False,
    ) -> None:
        """`slices` parallels `trained`. Parameters of `native` get their gradients added to their
        slices by the native encoder too. With `overlap`, reductions start during the backward pass
        that closes an accumulation."""
=======
        start_reduction: Callable[[int, bool], None],
        overlap: bool,
        every_backward: bool,
    ) -> None:
        """`start_reduction(block, accumulate)` is called once per block and step, from the last
        block to NO_BLOCK, in `overlap` already during the backward pass that closes an
        accumulation; with `every_backward` in each, to `accumulate` after the first."""
>>>>>>> /tmp/bu_new
        self._trained = trained
        self._slices = slices
        self._native = [entry.name in native for entry in trained]
        self._start_reduction = updater.start_reduction
        self._overlap = overlap
<<<<<<< /tmp/bu_cur
        blocks = {entry.block for entry in trained} - {NO_BLOCK}
        self._order = [*sorted(blocks, reverse=True), NO_BLOCK]
        self._members: dict[int, list[int]] = {block: [] for block in self._order}
        for index, entry in enumerate(trained):
            self._members[entry.block].append(index)
=======
        self._every_backward = every_backward
        self._waiting: dict[int, torch.Tensor] = {}
        self._passes = 0  # since the last clear()
        self._filled = [False] * len(trained)
        self._reduction_order = [
            *sorted({t.block for t in trained if t.block != NO_BLOCK}, reverse=True),
            NO_BLOCK,
        ]
>>>>>>> /tmp/bu_new
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
<<<<<<< /tmp/bu_cur
    def any_came(self) -> bool:
        """True if there was a backward pass since the last clear()."""
        return self._passes > 0
=======
    def any_filled(self) -> bool:
        """True if a gradient came since the last clear()."""
        return any(self._filled) or self._passes > 0
>>>>>>> /tmp/bu_new

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
                self._slices[index].zero_()
<<<<<<< /tmp/bu_cur
        while self._next < len(self._order):
            self._reduce_next()
=======
        if not self._every_backward:
            self._reduce_rest()
>>>>>>> /tmp/bu_new

    def clear(self) -> None:
        """Forgets all gradients."""
        self._passes = 0
        self._next = 0
        self._filled = list(self._native)
        self._missing = {block: set(members) for block, members in self._members.items()}
        for index, entry in enumerate(self._trained):
            entry.parameter.grad = None
<<<<<<< /tmp/bu_cur
            if self._native[index]:
                self._slices[index].zero_()
=======
            self._filled[index] = False
        self._waiting.clear()
        self._passes = 0
        self._reset_counters()
>>>>>>> /tmp/bu_new

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

<<<<<<< /tmp/bu_cur
=======
    def _stays(self, entry: Trained) -> bool:
        return entry.parameter.dtype == torch.float32 and not self._every_backward

>>>>>>> /tmp/bu_new
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
<<<<<<< /tmp/bu_cur
        self._take(index, parameter, gradient)
        if self._overlap and self._closes_accumulation:
            self._complete(index)

    def _take(self, index: int, parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
        name, block = self._trained[index].name, self._trained[index].block
        target, stays = self._slices[index], self._stays(index)
        if block in self._order[: self._next]:
            raise UsageError(TOO_LATE.format(name=name))
        if not self._filled[index]:
=======
        stays = self._stays(entry)
        if self._every_backward and (
            index in self._waiting or entry.block != self._reduction_order[self._next_reduction]
        ):
            earlier = self._waiting.get(index)
            self._waiting[index] = gradient if earlier is None else earlier.float() + gradient
            self._filled[index] = True
        elif not self._filled[index]:
>>>>>>> /tmp/bu_new
            target.copy_(gradient)
            self._filled[index] = True
        elif not stays:
            target.add_(gradient)
        elif gradient.data_ptr() != target.data_ptr():
            raise UsageError(DROPPED.format(name=name))
        parameter.grad = target if stays else None
<<<<<<< /tmp/bu_cur
=======
        if self._overlap and (self._closes_accumulation or self._every_backward):
            self._complete(index, entry.block)
>>>>>>> /tmp/bu_new

    def _complete(self, index: int) -> None:
        """Nothing more comes for this parameter; starts what can start, in order."""
        self._missing[self._trained[index].block].discard(index)
        while self._next < len(self._order) and not self._missing[self._order[self._next]]:
            self._reduce_next()

    def _reduce_rest(self) -> None:
        while self._next_reduction < len(self._reduction_order):
            self._reduce_next()

    @torch.no_grad()
    def _reduce_next(self) -> None:
<<<<<<< /tmp/bu_cur
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
=======
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
>>>>>>> /tmp/bu_new
