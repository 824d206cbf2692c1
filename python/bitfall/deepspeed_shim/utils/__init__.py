"""deepspeed.utils: the logger, and refusals of what stage 3 and model parallelism need."""

from .. import _refusal
from .logging import log_dist, logger

__all__ = ["groups", "log_dist", "logger", "set_z3_leaf_modules"]

__getattr__ = _refusal.missing_attributes("deepspeed.utils")

set_z3_leaf_modules = _refusal.refused("deepspeed.utils.set_z3_leaf_modules", _refusal.STAGE_3)
