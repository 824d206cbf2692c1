"""Reads OUTPUT_DIR/bitfall_log.jsonl, the log of a training, into what the report shows.

training_log.py describes its events. A log in which steps come again (a run that was resumed
without it) is read too: the later version of a step replaces the first.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bitfall.errors import DataError
from bitfall.training_log import LOG_NAME

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass
class TrainingLog:
    """Everything that was logged; lists are in rising order of steps."""

    start: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    drops: list[dict[str, Any]] = field(default_factory=list)
    eigenvalues: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last optimizer step that was logged, 0 before the first."""
        return self.steps[-1]["step"] if self.steps else 0

    def state_names(self) -> list[str]:
        """Names of the bit states in the order of the log."""
        return list(dict.fromkeys(name for step in self.steps for name in step["bits"]))

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every step that has a finite number under `key`."""
        return finite_points((step["step"], step.get(key)) for step in self.steps)

    def bit_runs(self, state: str) -> list[tuple[int, int, int]]:
        """(bits, first step, last step) of each stretch of steps at one width."""
        runs: list[tuple[int, int, int]] = []
        for step in self.steps:
            bits = step["bits"].get(state)
            if bits is None:
                continue
            if runs and runs[-1][0] == bits:
                runs[-1] = (bits, runs[-1][1], step["step"])
            else:
                runs.append((bits, step["step"], step["step"]))
        return runs


def finite_points(pairs: Any) -> list[tuple[float, float]]:
    """The pairs whose two members are finite numbers."""
    return [
        (float(x), float(y))
        for x, y in pairs
        if isinstance(y, int | float) and not isinstance(y, bool) and math.isfinite(y)
    ]


def read_log(output_dir: Path) -> TrainingLog:
    """Reads the log of a finished or unfinished run.

    Raises DataError, naming file and line, if there is no log or a line is no event. A last line
    that was cut off, as a killed run leaves it, becomes a note.
    """
    path = output_dir / LOG_NAME
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; give the --output_dir of a training by 'bitfall glue'"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8: this is no log") from None
    log = TrainingLog()
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not text.endswith("\n"):
                log.notes.append(f"The last line of the log (line {number}) was cut off.")
                break
            raise DataError(f"{path}:{number}: not JSON: {error.msg}") from None
        _add(log, event, f"{path}:{number}")
    if not log.start and not log.steps and not log.evaluations:
        raise DataError(f"{path}: the log holds no event; the run ended before it began")
    _name_evaluations(log)
    if log.end is None or log.end.get("finished") is False:
        log.notes.append(f"This run has not ended: the log stops at step {log.last_step}.")
    return log


def _add(log: TrainingLog, event: Any, where: str) -> None:
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise DataError(f'{where}: expected an object with "event", saw {str(event)[:60]}')
    handlers: dict[str, Callable[[TrainingLog, dict[str, Any], str], None]] = {
        "start": _add_start,
        "resume": _add_resume,
        "step": _add_step,
        "drop": _add_drop,
        "eigenvalues": _add_eigenvalues,
        "evaluate": _add_evaluate,
        "end": _add_end,
    }
    handler = handlers.get(event["event"])
    if handler is None:
        known = ", ".join(handlers)
        raise DataError(f'{where}: unknown event "{event["event"]}"; known are {known}')
    handler(log, event, where)


def _field(event: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = event.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(
            f'{where}: "{key}" of a {event["event"]} event: expected {kind.__name__}, saw {value!r}'
        )
    return value


def _add_start(log: TrainingLog, event: dict[str, Any], _where: str) -> None:
    log.start = event


def _add_resume(log: TrainingLog, event: dict[str, Any], _where: str) -> None:
    log.end = None
    log.notes.append(f"Resumed from {event.get('checkpoint')} after step {log.last_step}.")


def _add_step(log: TrainingLog, event: dict[str, Any], where: str) -> None:
    step = _field(event, "step", int, where)
    _field(event, "bits", dict, where)
    if step <= log.last_step:
        for events in (log.steps, log.drops, log.eigenvalues, log.evaluations):
            events[:] = [old for old in events if old["step"] < step]
    log.steps.append(event)


def _add_drop(log: TrainingLog, event: dict[str, Any], where: str) -> None:
    _field(event, "step", int, where)
    log.drops.append(event)


def _add_eigenvalues(log: TrainingLog, event: dict[str, Any], where: str) -> None:
    _field(event, "step", int, where)
    for block in _field(event, "blocks", list, where):
        if not isinstance(block, dict) or not isinstance(block.get("name"), str):
            raise DataError(f'{where}: each of "blocks" needs a "name", saw {str(block)[:60]}')
    log.eigenvalues.append(event)


def _add_evaluate(log: TrainingLog, event: dict[str, Any], where: str) -> None:
    event.setdefault("step", log.last_step)
    _field(event, "metrics", dict, where)
    log.evaluations.append(event)


def _add_end(log: TrainingLog, event: dict[str, Any], _where: str) -> None:
    log.end = event


def _name_evaluations(log: TrainingLog) -> None:
    """With several evaluation sets (MNLI), metrics carry their name, and equal steps are joined."""
    if len({event.get("name") for event in log.evaluations}) < 2:
        return
    joined: dict[int, dict[str, Any]] = {}
    for event in log.evaluations:
        target = joined.setdefault(event["step"], {**event, "metrics": {}})
        for key, value in event["metrics"].items():
            target["metrics"][f"{key} ({event.get('name')})"] = value
    log.evaluations = list(joined.values())
