"""What a training says: what runs at its start, then bits, eigenvalues and numbers of its steps."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from bitfall.bridge.config import NEVER_PRINT, relevant_warnings
from bitfall.plan_table import format_plan
from bitfall.progress import PlainProgress, Progress, format_numbers
from bitfall.recorder import VerboseLines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitfall._core import CompletedConfig, StepResult, Updater
    from bitfall.bridge.layout import Trained


class Announcer:
    """Writes lines to stderr on rank 0."""

    def __init__(self, config: CompletedConfig, rank: int) -> None:
        self._progress = PlainProgress(sys.stderr) if rank == 0 else Progress()
        self._config = config
        self._verbose = VerboseLines(json.loads(config.json))
        asked = config.origins.get("steps_per_print") == "file"
        self._steps_per_print = config.steps_per_print if asked else NEVER_PRINT

    def start(
        self, updater: Updater, trained: Sequence[Trained], runs: str, optimizer: str, ranks: int
    ) -> None:
        """One line on what runs, then the plan of bits. `runs`: by what the module is computed."""
        config = self._config
        stage = json.loads(config.json).get("zero_optimization", {}).get("stage", 0)
        numel = sum(entry.parameter.numel() for entry in trained)
        moq = "MoQ on" if config.quantize_enabled else "MoQ off"
        self._progress.message(
            f"bitfall: {numel:,} parameters in {config.compute_dtype} on"
            f" {trained[0].parameter.device}, {runs}, {optimizer}, {moq},"
            f" ZeRO stage {stage}, {ranks} rank{'s' if ranks > 1 else ''}"
        )
        for text in relevant_warnings(config):
            self._progress.message(f"bitfall: warning: {text}")
        if config.quantize_enabled:
            self._progress.message("bitfall: first optimizer step at each width")
            self._progress.message(format_plan(updater.plan()))

    def step(self, step: int, result: StepResult) -> None:
        """The lines that quantize_verbose, eigenvalue.verbose and steps_per_print ask for."""
        for line in self._verbose.of(result):
            self._progress.message(line)
        if step % self._steps_per_print == 0:
            self._progress.message(f"step {step}  {format_numbers(result)}")
