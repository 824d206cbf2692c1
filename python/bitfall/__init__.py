"""bitfall: DeepSpeed-compatible mixed-precision quantization training of BERT encoders.

fake_quantize and quantize come from the compiled module, which is loaded on first use so that
`bitfall --help` stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitfall._core import __version__, fake_quantize, quantize

__all__ = ["__version__", "fake_quantize", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bitfall' has no attribute '{name}'")
    from bitfall import _core

    return getattr(_core, name)
