"""deepspeed.runtime.zero.partition_parameters: for code that asks whether a weight is partitioned.

No weight is: code that compares `param.ds_status` with these first looks for that attribute.
"""

from enum import Enum

from ... import _refusal
from ...zero import GatheredParameters, Init

__all__ = ["GatheredParameters", "Init", "ZeroParamStatus"]

__getattr__ = _refusal.missing_attributes("deepspeed.runtime.zero.partition_parameters")


class ZeroParamStatus(Enum):
    """States of a weight in ZeRO stage 3."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3
