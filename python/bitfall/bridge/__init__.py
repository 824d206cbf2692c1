"""Any torch.nn.Module as what the engine trains."""

from __future__ import annotations

from bitfall.errors import InputError

OLDEST_TORCH = (2, 1)


def _check_torch() -> None:
    try:
        import torch
    except ImportError:
        raise InputError(
            "bitfall.initialize needs PyTorch: pip install 'bitfall[torch]', or pip install torch"
        ) from None
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        raise InputError(
            f"bitfall.initialize needs PyTorch 2.1 or newer, found {torch.__version__}:"
            " pip install --upgrade torch"
        )


_check_torch()

from bitfall.bridge.engine import DeepSpeedEngine  # noqa: E402
from bitfall.bridge.initialize import initialize  # noqa: E402

__all__ = ["DeepSpeedEngine", "initialize"]
