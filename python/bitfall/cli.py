"""The command `bitfall`: finds the subcommand, parses its flags and turns errors into messages."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, NoReturn

from bitfall.errors import ArgumentsError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Subcommand -> (module with add_arguments(parser) and main(args) -> int, what it does).
COMMANDS = {
    "glue": ("bitfall.glue", "fine-tune a BERT on a GLUE task or own data, with MoQ if configured"),
    "run": ("bitfall.launcher", "run a script that uses DeepSpeed with bitfall in its place"),
    "schedule": ("bitfall.schedule", "show the bits of every layer by step, without training"),
    "report": ("bitfall.report", "make the HTML report of a finished or running training"),
    "check": ("bitfall.check", "check a DeepSpeed config and show where each value comes from"),
    "to-fp32": ("bitfall.to_fp32", "write the f32 weights of a DeepSpeed or bitfall checkpoint"),
}

PYTHON_FORMATWARNING = warnings.formatwarning

# Exit codes as a shell reports the signals SIGINT and SIGPIPE.
INTERRUPTED = 130
BROKEN_PIPE = 141

HELP = """usage: bitfall COMMAND [flags]

Mixed-precision quantization training (MoQ) of BERT encoders, driven by DeepSpeed configs.

commands:
{commands}

examples:
  bitfall check test.json
  bitfall schedule test.json --layers 12 --steps 345
  bitfall glue --model_name_or_path bert-base-cased --task_name mrpc --data_dir glue \\
      --do_train --do_eval --max_seq_length 128 --per_device_train_batch_size 32 \\
      --learning_rate 2e-5 --num_train_epochs 3 --output_dir out/mrpc --fp16 --deepspeed test.json
  mpirun -np 2 bitfall glue ...      the same on two processes
  bitfall run run_glue.py ... --deepspeed test.json      an own script, unchanged
  bitfall report out/mrpc
  bitfall to-fp32 out/checkpoint-500 model.safetensors

'bitfall COMMAND --help' explains the flags of a command.
BITFALL_DEBUG=1 shows the traceback of an error."""


class CommandParser(argparse.ArgumentParser):
    """Raises ArgumentsError instead of printing usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentsError(f"{message}; see '{self.prog} --help'")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """After --help. Flushes where a broken pipe is still handled."""
        sys.stdout.flush()
        super().exit(status, message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit code. Known errors become one message on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = lambda message, *_, **__: f"bitfall: warning: {message}\n"
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE
    except Exception as error:
        if not is_known(error):
            raise
        if os.environ.get("BITFALL_DEBUG") == "1":
            traceback.print_exc()
        if _process_rank() == 0 or not isinstance(error, ArgumentsError):
            print(f"bitfall: error: {describe(error)}", file=sys.stderr)
        return 1


def is_known(error: BaseException) -> bool:
    """True if the message alone tells the user what is wrong."""
    core = sys.modules.get("bitfall._core")
    if core is not None and isinstance(error, core.Error):
        return True
    return isinstance(error, (InputError, OSError)) or _is_missing_core(error)


def describe(error: BaseException) -> str:
    """One message, with the file for errors of the operating system."""
    if _is_missing_core(error):
        return "the compiled part of bitfall is missing: run 'pip install .' in its source folder"
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        advice = "; free some disk space and try again" if error.errno == errno.ENOSPC else ""
        return f"{place}{error.strerror}{advice}"
    return str(error)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        commands = "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
        print(HELP.format(commands=commands))
        return 0 if argv else 1
    if argv[0] == "--version":
        from bitfall import __version__

        print(f"bitfall {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        raise ArgumentsError(f"unknown command '{name}'{_nearest(name, list(COMMANDS))}")
    module_name, description = COMMANDS[name]
    module = importlib.import_module(module_name)
    parser = CommandParser(
        prog=f"bitfall {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    args, unknown = parser.parse_known_args(argv[1:])
    if unknown:
        flag = unknown[0].split("=")[0]
        known_flags = list(parser._option_string_actions)
        raise ArgumentsError(
            f"unknown argument '{flag}'{_nearest(flag, known_flags)}; see '{parser.prog} --help'"
        )
    return module.main(args)


def _nearest(word: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=1)
    return (
        f": did you mean '{matches[0]}'?" if matches else f": expected {', '.join(known[:4])} ..."
    )


def _discard_output() -> None:
    """Nobody reads on (`bitfall check ... | head`): what is left to print goes nowhere, so that the
    interpreter does not fail over it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _process_rank() -> int:
    return int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))


def _is_missing_core(error: BaseException) -> bool:
    return isinstance(error, ImportError) and "_core" in str(error) and "bitfall" in str(error)
