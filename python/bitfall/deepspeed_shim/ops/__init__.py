"""deepspeed.ops: optimizers under DeepSpeed's names."""

from .. import _refusal
from . import adam

__all__ = ["adam"]

__getattr__ = _refusal.missing_attributes("deepspeed.ops")
