"""Ctrl-C, SIGTERM and SIGUSR1 as a request to stop after the current step.

SIGUSR1 is for mpirun, which passes it on and waits. Ctrl-C and SIGTERM it turns into SIGTERM and,
one second later, SIGKILL: too soon for the step and the checkpoint of a real model.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Context manager: the first signal sets `requested`, the second interrupts at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
