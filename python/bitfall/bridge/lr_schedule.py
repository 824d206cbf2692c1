"""Schedulers that the config names: DeepSpeed's interface over the engine's formulas."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from bitfall import _core
from bitfall.errors import InputError

if TYPE_CHECKING:
    from bitfall._core import CompletedConfig


class ConfiguredSchedule:
    """Writes the rate of the next step into every param_group. Its subclasses carry the names of
    DeepSpeed's classes, which Hugging Face compares."""

    def __init__(self, optimizer: Any, config: CompletedConfig) -> None:
        """Rates that a formula scales are those of the groups as they are now."""
        self.optimizer = optimizer
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.last_batch_iteration = -1
        self._config = config
        self._write()

    def step(self, last_batch_iteration: int | None = None) -> None:
        """After each update that was not skipped."""
        following = self.last_batch_iteration + 1
        self.last_batch_iteration = (
            following if last_batch_iteration is None else last_batch_iteration
        )
        self._write()

    def get_lr(self) -> list[float]:
        """Rate of the next step per group."""
        completed = self.last_batch_iteration + 1
        return [_core.scheduled_rate(self._config, base, completed) for base in self.base_lrs]

    def get_last_lr(self) -> list[float]:
        """The rates in the groups, as torch's schedulers have it."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"last_batch_iteration": self.last_batch_iteration, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_batch_iteration = state["last_batch_iteration"]
        self.base_lrs = list(state.get("base_lrs", self.base_lrs))
        self._write()

    def _write(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate


def make_schedule(given: Any, optimizer: Any, config: CompletedConfig) -> Any:
    """`given` (a scheduler, or a function that makes one of the optimizer), otherwise the one that
    the config names, otherwise None.

    Raises InputError for anything else, ConfigError if the config's needs a number of steps.
    """
    if hasattr(given, "step"):
        return given
    if callable(given):
        return given(getattr(optimizer, "optimizer", optimizer))  # torch's, for torch's schedulers
    if given is not None:
        raise InputError(
            f"initialize(lr_scheduler={type(given).__name__}): expected an object with step(), or"
            " a function that takes the optimizer and returns one"
        )
    if config.origins.get("scheduler.type") != "file":
        return None
    name = json.loads(config.json)["scheduler"]["type"]
    return type(name, (ConfiguredSchedule,), {})(optimizer, config)
