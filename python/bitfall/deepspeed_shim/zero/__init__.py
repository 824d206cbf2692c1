"""deepspeed.zero: what scripts wrap around stage 3, which does nothing in stages 0 to 2."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from .. import _refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

__getattr__ = _refusal.missing_attributes("deepspeed.zero")

register_external_parameter = _refusal.refused(
    "deepspeed.zero.register_external_parameter", _refusal.STAGE_3
)


@contextlib.contextmanager
def Init(*_: Any, enabled: bool = True, **__: Any) -> Iterator[None]:  # noqa: N802
    """Partitions a model while it is built: refused unless enabled=False."""
    if enabled:
        _refusal.refused("deepspeed.zero.Init", _refusal.STAGE_3)()
    yield


@contextlib.contextmanager
def GatheredParameters(*_: Any, **__: Any) -> Iterator[None]:  # noqa: N802
    """Nothing to gather: in stages 0 to 2 every rank holds all weights, as in DeepSpeed itself."""
    yield
