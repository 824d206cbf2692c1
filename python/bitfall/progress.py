"""What the user sees during training: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import itertools
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bitfall._core import BitDrop, Eigenvalue, StepResult


class Progress:
    """Shows nothing: the progress of every rank but the first."""

    def start(self, total_steps: int, first_step: int) -> None:
        """Training begins after `first_step` of `total_steps`."""

    def step(self, step: int, result: StepResult, tokens_per_second: float, due: bool) -> None:
        """One step is done; `due`: its numbers belong into a plain log."""

    def message(self, text: str) -> None:
        """Text that stays visible."""

    def stop(self) -> None:
        """Training has ended; the terminal is left as it was."""


class PlainProgress(Progress):
    """Lines without control characters, for files and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._total_steps = 0

    def start(self, total_steps: int, first_step: int) -> None:  # noqa: ARG002
        self._total_steps = total_steps

    def step(self, step: int, result: StepResult, tokens_per_second: float, due: bool) -> None:
        if due:
            self.message(
                f"step {step}/{self._total_steps}  {format_numbers(result, tokens_per_second)}"
            )

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class LiveProgress(Progress):
    """A progress bar with loss, learning rate, tokens/s, bits per layer and the time left."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        self._console = Console(file=stream, highlight=False)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
        )
        self._numbers = Bar(TextColumn("{task.description}"), console=self._console)
        self._live: Any = None

    def start(self, total_steps: int, first_step: int) -> None:
        from rich.console import Group
        from rich.live import Live

        self._bar_task = self._bar.add_task("training", total=total_steps, completed=first_step)
        self._numbers_task = self._numbers.add_task("", total=None)
        self._live = Live(Group(self._bar, self._numbers), console=self._console)
        self._live.start()

    def step(
        self,
        step: int,
        result: StepResult,
        tokens_per_second: float,
        due: bool,  # noqa: ARG002
    ) -> None:
        self._bar.update(self._bar_task, completed=step)
        self._numbers.update(
            self._numbers_task, description=format_numbers(result, tokens_per_second)
        )

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def make_progress(rank: int, stream: TextIO | None = None) -> Progress:
    """Live on a terminal, plain otherwise, and silent on every rank but 0.

    mpirun gives each process a terminal of its own, whether or not its output goes to one: plain.
    """
    stream = stream or sys.stdout
    if rank != 0:
        return Progress()
    on_terminal = stream.isatty() and "OMPI_COMM_WORLD_SIZE" not in os.environ
    return LiveProgress(stream) if on_terminal else PlainProgress(stream)


def format_bits(bits: Mapping[str, int]) -> str:
    """Bits in the order of the states, runs shortened: "12x5 11 | other 12"."""
    names = list(bits)
    blocks = [bits[name] for name in names if not name.endswith("other")]
    runs = [(value, len(list(group))) for value, group in itertools.groupby(blocks)]
    parts = [" ".join(f"{value}x{count}" if count > 1 else str(value) for value, count in runs)]
    parts += [f"{name} {bits[name]}" for name in names if name.endswith("other")]
    return " | ".join(part for part in parts if part)


def format_drop(drop: BitDrop) -> str:
    """The line that quantize_verbose asks for."""
    threshold = drop["next_threshold"]
    following = f"next threshold {threshold:.0f}" if threshold > 0 else "target reached"
    return (
        f"step {drop['step']}: {drop['name']} {drop['old_bits']} -> {drop['new_bits']} bits,"
        f" {following}, factor {drop['factor']}"
    )


def format_eigenvalue(step: int, block: Eigenvalue) -> str:
    """The line per block that eigenvalue.verbose asks for."""
    state = "converged" if block["converged"] else "not converged"
    return (
        f"step {step}: {block['name']} eigenvalue {block['value']:.6g} after"
        f" {block['iterations']} iterations ({state}), ev {block['normalized']:.4f},"
        f" factor {block['factor']}"
    )


def format_numbers(result: StepResult, tokens_per_second: float | None = None) -> str:
    """Loss, rate, speed if it is known, bits; loss scale and overflow where fp16 has them."""
    parts = [f"loss {result['loss']:.4f}", f"lr {result['learning_rate']:.3g}"]
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:,.0f} tokens/s")
    if result["bits"]:
        parts.append(f"bits {format_bits(result['bits'])}")
    if result["loss_scale"] != 1:
        parts.append(f"loss scale {result['loss_scale']:g}")
    if result["skipped"]:
        parts.append("skipped (overflow)")
    return "  ".join(parts)
