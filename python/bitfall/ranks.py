"""The processes that mpirun started, described to torch.distributed in its variables."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from bitfall.errors import ArgumentsError

if TYPE_CHECKING:
    from bitfall._core import Communicator

# Set by Open MPI, and by MPICH and its relatives.
MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
LOCAL_SIZE_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def started_by_mpi() -> bool:
    """True in a process that mpirun has started."""
    return any(name in os.environ for name in MPI_VARIABLES)


def join_ranks() -> Communicator | None:
    """Joins the other processes of mpirun and describes them to torch.distributed. Collective.

    None for a single process. Raises ArgumentsError under a launcher that is not mpirun: every
    process would train alone.
    """
    if not started_by_mpi():
        size = os.environ.get("WORLD_SIZE", "1")
        if size != "1":
            raise ArgumentsError(
                f"WORLD_SIZE = {size}, but mpirun did not start this process: gradients travel over"
                f" MPI, so start the processes with 'bitfall run --np {size}' or 'mpirun -np {size}"
                " bitfall run' instead of torchrun, accelerate launch or deepspeed"
            )
        return None
    from bitfall import _core

    communicator = _core.make_communicator()
    if communicator.world_size == 1:
        return None
    os.environ.update(_torch_variables(communicator))
    return communicator


def _torch_variables(communicator: Communicator) -> dict[str, str]:
    size, local_size = communicator.world_size, _local_size(communicator)
    address, port = communicator.broadcast(_meeting_point(size == local_size)).decode().split()
    return {
        "RANK": str(communicator.rank),
        "LOCAL_RANK": str(communicator.local_rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", address),
        "MASTER_PORT": os.environ.get("MASTER_PORT", port),
    }


def _local_size(communicator: Communicator) -> int:
    for name in LOCAL_SIZE_VARIABLES:
        if name in os.environ:
            return int(os.environ[name])
    return communicator.world_size


def _meeting_point(one_machine: bool) -> bytes:
    """Address of this process and a port that is free now, for rank 0 to listen on."""
    address = "127.0.0.1" if one_machine else socket.getfqdn()
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return f"{address} {port}".encode()
