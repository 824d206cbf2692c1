"""deepspeed.runtime.config: the error that a wrong config raises."""

from bitfall._core import ConfigError as DeepSpeedConfigError

from .. import _refusal

__all__ = ["DeepSpeedConfigError"]

__getattr__ = _refusal.missing_attributes("deepspeed.runtime.config")
