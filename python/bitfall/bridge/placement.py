"""Where an engine and its module are: on the CPU, or on the GPU that DeepSpeed would choose."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bitfall import _core
from bitfall.errors import InputError, UsageError

if TYPE_CHECKING:
    from bitfall._core import Communicator

CoreDevice = tuple[str, int, int | None]
CPU: CoreDevice = ("cpu", 0, None)


class Placement(NamedTuple):
    """`core`: as _core takes it, (name, number of the GPU, stream).

    On a GPU the engine works on the stream that was torch's current one when it was made: then
    neither has to wait for the other. torch runs backward passes on the stream of the forward pass.
    """

    device: torch.device
    core: CoreDevice

    def check_stream(self) -> None:
        """Raises UsageError where torch's current stream is another one by now."""
        if self.device.type != "cuda":
            return
        if torch.cuda.current_stream(self.device).cuda_stream != self.core[2]:
            raise UsageError(
                "training on another CUDA stream than initialize(): call forward, backward and"
                " step under the torch.cuda.stream() that initialize() was called under"
            )


def choose(args: Any, communicator: Communicator) -> Placement:
    """What Hugging Face's accelerate has chosen, where a script uses it (--use_cpu). Otherwise the
    GPU args.local_rank or LOCAL_RANK, the CPU if torch has none or DS_ACCELERATOR is cpu.

    Raises BackendError if that GPU, or bitfall's CUDA library, is not there.
    """
    device = _accelerates_device()
    if device is None and accelerator_name() == "cuda":
        device = torch.device("cuda", _local_rank(args, communicator))
    if device is None or device.type == "cpu":
        return Placement(torch.device("cpu"), CPU)
    if device.type != "cuda":
        raise InputError(
            f"initialize: device {device}, expected cpu or cuda (Hugging Face's Trainer: --use_cpu)"
        )
    try:
        index = _core.gpu_index(device.index or 0)
    except _core.BackendError as error:
        raise _core.BackendError(
            f"{error}. To train on the CPU set DS_ACCELERATOR=cpu (Hugging Face's Trainer:"
            " --use_cpu)"
        ) from None
    torch.cuda.set_device(index)
    stream = torch.cuda.current_stream(index).cuda_stream
    return Placement(torch.device("cuda", index), ("cuda", index, stream))


def accelerator_name() -> str:
    """ "cuda" where torch has a GPU, unless DS_ACCELERATOR says cpu; otherwise "cpu"."""
    wanted = os.environ.get("DS_ACCELERATOR", "cuda")
    return "cuda" if wanted == "cuda" and torch.cuda.is_available() else "cpu"


def _accelerates_device() -> torch.device | None:
    state = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized():
        return None
    return state.AcceleratorState().device  # type: ignore[no-any-return]


def _local_rank(args: Any, communicator: Communicator) -> int:
    given = getattr(args, "local_rank", None)
    if isinstance(given, int) and given >= 0:
        return given
    return int(os.environ.get("LOCAL_RANK", communicator.local_rank))
