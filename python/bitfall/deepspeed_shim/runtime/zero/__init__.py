"""deepspeed.runtime.zero: the same names as deepspeed.zero."""

from ... import _refusal
from ...zero import GatheredParameters, Init
from . import partition_parameters

__all__ = ["GatheredParameters", "Init", "partition_parameters"]

__getattr__ = _refusal.missing_attributes("deepspeed.runtime.zero")
