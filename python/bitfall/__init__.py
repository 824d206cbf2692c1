"""bitfall: DeepSpeed-compatible mixed-precision quantization training.

Everything is loaded on first use: fake_quantize and quantize come from the compiled module,
initialize needs PyTorch, and `bitfall --help` stays fast.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Read by libgomp when the compiled module loads it. By default its threads spin for milliseconds at
# the end of every parallel loop, which makes a step several times slower as soon as anything else
# runs on the machine; this many cost nothing on an idle one and a third of that on a busy one.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

if TYPE_CHECKING:
    from bitfall._core import __version__, fake_quantize, quantize
    from bitfall.bridge import initialize

__all__ = ["__version__", "fake_quantize", "initialize", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bitfall' has no attribute '{name}'")
    if name == "initialize":
        from bitfall.bridge import initialize

        return initialize
    from bitfall import _core

    return getattr(_core, name)
