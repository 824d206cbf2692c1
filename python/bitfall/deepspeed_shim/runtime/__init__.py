"""deepspeed.runtime: where scripts look for the engine's class and the schedulers' names."""

from .. import _refusal
from . import config, engine, lr_schedules, zero

__all__ = ["config", "engine", "lr_schedules", "zero"]

__getattr__ = _refusal.missing_attributes("deepspeed.runtime")
