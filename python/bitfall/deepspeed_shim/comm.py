"""deepspeed.comm: torch.distributed, set up for the processes that mpirun started.

Only what scripts and Hugging Face exchange goes this way. Gradients do not: the engine reduces them
over its own communicator.
"""

from __future__ import annotations

import datetime
import os
import sys
from typing import Any

import torch.distributed


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: datetime.timedelta = datetime.timedelta(minutes=30),
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Sets up torch.distributed once: the ranks of `bitfall run`, or a group of one.

    dist_backend, init_method and timeout are passed on; the launcher knows the rest. A single
    process gets RANK, LOCAL_RANK and WORLD_SIZE as from DeepSpeed's launcher: scripts read them.
    """
    del auto_mpi_discovery, distributed_port, verbose, dist_init_required, config, rank, world_size
    backend = dist_backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if "LOCAL_RANK" in os.environ:
        _give_accelerate_a_backend(backend)
    if torch.distributed.is_initialized():
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        torch.distributed.init_process_group(backend, init_method=init_method, timeout=timeout)
        return
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    alone = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=alone, rank=0, world_size=1, timeout=timeout)


def is_initialized() -> bool:
    """True after init_distributed."""
    return torch.distributed.is_initialized()


def is_available() -> bool:
    return torch.distributed.is_available()


def get_local_rank() -> int:
    """Rank among the processes of this machine, 0 for a single process."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def __getattr__(name: str) -> Any:
    """get_rank, get_world_size, barrier, all_reduce, broadcast, ReduceOp ...: torch's own."""
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(torch.distributed, name)


def _give_accelerate_a_backend(backend: str) -> None:
    """accelerate's PartialState calls init_distributed while it is being made. On a machine without
    GPU it has found no backend by then, and would go on to treat every process as the only one."""
    state = sys.modules.get("accelerate.state")
    if state is None:
        return
    shared = state.PartialState._shared_state
    if "backend" in shared and shared["backend"] is None:
        shared["backend"] = backend
