"""`bitfall run`: runs a Python script in whose process `import deepspeed` gives bitfall."""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bitfall import deepspeed_import
from bitfall.cli import PYTHON_FORMATWARNING
from bitfall.errors import ArgumentsError
from bitfall.ranks import join_ranks, started_by_mpi

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from bitfall._core import Communicator

EXAMPLES = """The script and its arguments stay as they are. If it trains with DeepSpeed, or through
Hugging Face's Trainer with --deepspeed CONFIG, it trains with bitfall and MoQ. That needs PyTorch:
pip install 'bitfall[torch]'. An installed DeepSpeed is neither needed nor touched. A script that
does not use DeepSpeed runs as under python.

examples:
  Hugging Face's own script, as it is
    bitfall run run_glue.py --model_name_or_path bert-base-cased --task_name mrpc \\
        --do_train --do_eval --per_device_train_batch_size 32 --output_dir out/mrpc \\
        --deepspeed test.json
  the same on two processes of this machine
    bitfall run --np 2 run_glue.py ...
  with mpirun's own options, or on several machines
    mpirun -np 4 --hostfile hosts bitfall run run_glue.py ...

On a machine without GPU, Hugging Face asks for --use_cpu where a flag says --bf16.
Under several processes RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set for
torch.distributed. --np gives each process its share of the cores, unless OMP_NUM_THREADS is set. An
error in one process ends all of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments and examples to the parser of the subcommand."""
    parser.usage = "bitfall run [--np N] SCRIPT [arguments of the script]"
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--np", type=_count, metavar="N", help="start N processes with mpirun (default: one)"
    )
    parser.add_argument("script", metavar="SCRIPT", help="the Python file to run")
    rest = parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER)
    rest.required = False  # so that a missing script is named alone


def main(args: argparse.Namespace) -> int:
    """Runs the script; returns 0, or 1 after its error. Its own exit code passes through."""
    if not Path(args.script).is_file():
        raise ArgumentsError(
            f"no file '{args.script}': expected a Python script after 'bitfall run'"
            " (flags of bitfall stand before it, the script's own behind it)"
        )
    if args.np is not None:
        start_ranks(args.np, [args.script, *args.arguments])
    communicator = join_ranks()
    deepspeed_import.install()
    warnings.formatwarning = PYTHON_FORMATWARNING  # what the script warns of is not bitfall's
    return run_script(args.script, args.arguments, communicator)


def start_ranks(count: int, words: Sequence[str]) -> NoReturn:
    """Becomes `mpirun -np count` of the same command. OMP_NUM_THREADS becomes a share of the cores.

    Raises ArgumentsError where there is no mpirun, and in a process that mpirun has started.
    """
    if started_by_mpi():
        raise ArgumentsError("--np inside mpirun: use 'mpirun -np N bitfall run' without --np")
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise ArgumentsError(
            f"--np {count} needs mpirun, which is not on the PATH: install openmpi-bin, or run one"
            " process without --np"
        )
    share = max(1, len(os.sched_getaffinity(0)) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    # mpirun would bind each of two processes to one core, and their threads with them.
    launch = [mpirun, "-np", str(count), "--bind-to", "none"]
    sys.stdout.flush()
    os.execv(mpirun, [*launch, sys.executable, "-m", "bitfall", "run", *words])


def run_script(script: str, arguments: list[str], communicator: Communicator | None) -> int:
    """Runs `script` as `python script arguments...` would. Returns 0, or 1 after an exception.

    An exception or an exit code other than 0 ends all ranks.
    """
    sys.argv = [script, *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as request:
        if communicator is not None and request.code not in (None, 0):
            code = request.code
            communicator.abort(code if isinstance(code, str) else f"{script}: exit code {code}")
        raise
    except Exception as error:
        error.__traceback__ = _from_script(error.__traceback__, script)
        sys.excepthook(type(error), error, error.__traceback__)
        if communicator is not None:
            communicator.abort("".join(traceback.format_exception_only(error)).strip())
        return 1
    return 0


def _from_script(trace: TracebackType | None, script: str) -> TracebackType | None:
    """The traceback without the launcher's frames; None for an error in the script's syntax."""
    while trace is not None and trace.tb_frame.f_code.co_filename != script:
        trace = trace.tb_next
    return trace


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a number of processes, 1 or more")
    return int(text)
