"""deepspeed.checkpoint: only the helper that accelerate uses."""

from .. import _refusal
from . import utils

__all__ = ["utils"]

__getattr__ = _refusal.missing_attributes("deepspeed.checkpoint")
