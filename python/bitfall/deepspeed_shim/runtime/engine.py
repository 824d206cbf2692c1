"""deepspeed.runtime.engine: the class that deepspeed.initialize returns an instance of."""

from bitfall.bridge import DeepSpeedEngine

from .. import _refusal

__all__ = ["DeepSpeedEngine"]

__getattr__ = _refusal.missing_attributes("deepspeed.runtime.engine")
