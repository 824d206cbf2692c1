"""Helpers on top of the Communicator: objects between ranks, and errors that end all ranks."""

from __future__ import annotations

import contextlib
import io
import traceback
from typing import TYPE_CHECKING

import numpy as np

from bitfall.cli import describe, is_known

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bitfall._core import Communicator


@contextlib.contextmanager
def abort_on_error(communicator: Communicator) -> Iterator[None]:
    """Ends every rank with this rank's message, so that no rank waits for one that has failed."""
    try:
        yield
    except Exception as error:
        if communicator.world_size > 1:
            message = describe(error) if is_known(error) else traceback.format_exc()
            communicator.abort(message)
        raise


def share(total: int, rank: int, world_size: int) -> range:
    """Contiguous part of range(total) that belongs to `rank`; sizes differ by at most one."""
    return range(total * rank // world_size, total * (rank + 1) // world_size)


def gather_concatenated(
    communicator: Communicator, arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Every rank's arrays concatenated along the first axis in rank order, on every rank."""
    if communicator.world_size == 1:
        return arrays
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    parts = []
    for data in communicator.all_gather(buffer.getvalue()):
        with np.load(io.BytesIO(data), allow_pickle=False) as part:
            parts.append({name: part[name] for name in arrays})
    return {name: np.concatenate([part[name] for part in parts]) for name in arrays}


def any_rank(communicator: Communicator, flag: bool) -> bool:
    """True on every rank if `flag` is true on at least one."""
    if communicator.world_size == 1:
        return flag
    return b"\1" in communicator.all_gather(b"\1" if flag else b"\0")
