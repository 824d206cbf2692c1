"""On which device a run computes: the same one on every rank."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from bitfall import _core

if TYPE_CHECKING:
    from bitfall._core import Communicator


class DeviceChoice(NamedTuple):
    """ "cpu" or "cuda", and what was found that made it so."""

    device: str
    reason: str


def choose_device(wanted: str, communicator: Communicator) -> DeviceChoice:
    """What --device `wanted` comes to. "auto" is the GPU where every rank sees one.

    Raises BackendError for "cuda" without a usable GPU.
    """
    mine = json.dumps(_core.choose_device(wanted)).encode()
    choices = [DeviceChoice(*json.loads(text)) for text in communicator.all_gather(mine)]
    for rank, choice in enumerate(choices):
        if choice.device == "cpu":
            where = f"rank {rank}: " if len(choices) > 1 and wanted == "auto" else ""
            return DeviceChoice("cpu", where + choice.reason)
    return choices[communicator.rank]
