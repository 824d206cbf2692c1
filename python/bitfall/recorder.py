"""Recorder: one place that tells a training's events to the log, TensorBoard and the screen."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from bitfall.progress import format_drop, format_eigenvalue

if TYPE_CHECKING:
    from bitfall._core import CompletedConfig, StepResult
    from bitfall.progress import Progress
    from bitfall.tensorboard import TensorBoard
    from bitfall.training_log import TrainingLog


class VerboseLines:
    """What quantize_verbose and eigenvalue.verbose of a completed config ask for."""

    def __init__(self, completed: dict[str, Any]) -> None:
        self._shows_drops = bool(find_value(completed, "quantize_verbose"))
        eigenvalue = find_value(completed, "eigenvalue")
        self._shows_eigenvalues = isinstance(eigenvalue, dict) and eigenvalue.get("verbose", False)

    def of(self, result: StepResult) -> list[str]:
        """Of one step: a line per eigenvalue, then one per drop."""
        blocks = result["eigenvalues"] if self._shows_eigenvalues else []
        drops = result["drops"] if self._shows_drops else []
        lines = [format_eigenvalue(result["step"], block) for block in blocks]
        return lines + [format_drop(drop) for drop in drops]


class Recorder:
    """On ranks other than 0, `log` and `tensorboard` are None and `progress` is silent."""

    def __init__(
        self,
        config: CompletedConfig,
        progress: Progress,
        log: TrainingLog | None,
        tensorboard: TensorBoard | None,
    ) -> None:
        self.progress = progress
        self._log = log
        self._tensorboard = tensorboard
        self._steps_per_print = config.steps_per_print
        completed = json.loads(config.json)
        self._shows_phases = completed.get("wall_clock_breakdown", False)
        self._verbose = VerboseLines(completed)

    @property
    def log_offset(self) -> int:
        """Bytes of the log so far, on the disk; 0 where there is none."""
        if self._log is None:
            return 0
        self._log.sync()
        return self._log.offset

    def event(self, event: str, **fields: Any) -> None:
        """An event that only the log keeps."""
        if self._log is not None:
            self._log.write(event, **fields)

    def step(
        self, step: int, epoch: float, result: StepResult, tokens: int, seconds: float, due: bool
    ) -> None:
        """A training step of `tokens` tokens on all ranks; `due`: --logging_steps is reached."""
        tokens_per_second = tokens / max(seconds, 1e-9)
        numbers = ("loss", "learning_rate", "grad_norm", "loss_scale", "skipped", "bits")
        clock = {"step": step, "optimizer_step": result["step"]}
        self.event(
            "step",
            **clock,
            epoch=epoch,
            **{name: result[name] for name in numbers},  # type: ignore[literal-required]
            tokens=tokens,
            tokens_per_second=round(tokens_per_second, 1),
        )
        if result["eigenvalues"]:
            self.event("eigenvalues", **clock, blocks=result["eigenvalues"])
        for drop in result["drops"]:
            self.event("drop", **{**drop, **clock})
        if self._tensorboard is not None:
            self._tensorboard.step(step, result)
        self._show(step, result, tokens_per_second, due)

    def evaluation(self, step: int, epoch: float, name: str, metrics: dict[str, Any]) -> None:
        """Scores of the evaluation set `name`."""
        self.event("evaluate", step=step, epoch=epoch, name=name, metrics=metrics)
        if self._tensorboard is not None:
            self._tensorboard.metrics(step, metrics)
        shown = [f"{key} {value:.4f}" for key, value in metrics.items() if _is_score(key, value)]
        self.progress.message(f"step {step}: evaluation of {name}: {'  '.join(shown)}")

    def shows_phases(self, step: int) -> bool:
        """True when wall_clock_breakdown wants the phases' seconds after this step."""
        return self._shows_phases and step % self._steps_per_print == 0

    def phases(self, step: int, seconds: dict[str, float]) -> None:
        """Seconds by phase since the last time."""
        text = "  ".join(f"{phase} {value:.3f} s" for phase, value in seconds.items())
        self.progress.message(f"step {step}: {text}")

    def close(self) -> None:
        """Brings everything to the disk."""
        self.progress.stop()
        if self._log is not None:
            self._log.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _show(self, step: int, result: StepResult, tokens_per_second: float, due: bool) -> None:
        due = due or step % self._steps_per_print == 0
        self.progress.step(step, result, tokens_per_second, due)
        for line in self._verbose.of(result):
            self.progress.message(line)


def find_value(section: dict[str, Any], name: str) -> Any:
    """The value of key `name` in a config, wherever it is nested; None if it is absent."""
    if name in section:
        return section[name]
    for value in section.values():
        if isinstance(value, dict):
            found = find_value(value, name)
            if found is not None:
                return found
    return None


def _is_score(key: str, value: Any) -> bool:
    return isinstance(value, float) and not key.endswith(("runtime", "_per_second"))
