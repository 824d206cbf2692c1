"""The quickstart: one small model, one task, with and without MoQ, side by side.

Run by scripts/quickstart.sh as `python -m bitfall.quickstart` in the project's root. Every training
is an ordinary `bitfall glue` command, printed before it runs; a training whose command, config and
data are those of a finished one is not repeated.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfall import _core
from bitfall.cli import describe, is_known
from bitfall.errors import DataError
from bitfall.outputs import read_json_object, write_json
from bitfall.progress import format_bits
from bitfall.quickstart_data import fetch_model, fetch_task
from bitfall.report import REPORT_NAME
from bitfall.report_log import read_log
from bitfall.report_results import megabytes

CACHE = Path(".cache")
OUTPUT = Path("output/quickstart")
CONFIG = Path("configs/quickstart.json")
STAMP_NAME = "quickstart_stamp.json"
TRAINING_FLAGS = {
    "--max_seq_length": "64",
    "--per_device_train_batch_size": "32",
    "--per_device_eval_batch_size": "64",
    "--learning_rate": "5e-5",
    "--num_train_epochs": "1",
    "--warmup_ratio": "0.1",
    "--logging_steps": "50",
    "--save_strategy": "no",
    "--seed": "42",
}


@dataclass(frozen=True)
class Run:
    """One line of the table and the command that makes it."""

    name: str
    folder: Path
    command: list[str]

    @property
    def accuracy(self) -> float:
        return read_json_object(self.folder / "eval_results.json")["eval_accuracy"]


def main() -> int:
    """Fetches, trains what is not there yet, prints the table; 1 and a message if that fails."""
    try:
        model = fetch_model(CACHE)
        train, dev = fetch_task(CACHE)
        runs = plan_runs(model, train, dev)
        for run in runs:
            carry_out(run, inputs=(model / "model.safetensors", train, dev))
        print("\n".join(summary(runs, model)))
    except Exception as error:
        if not is_known(error):
            raise
        print(f"bitfall quickstart: {describe(error)}", file=sys.stderr)
        return 1
    return 0


def plan_runs(model: Path, train: Path, dev: Path) -> list[Run]:
    """Untrained, trained without quantization, trained with MoQ: otherwise the same."""
    common = ["--model_name_or_path", str(model), "--train_file", str(train)]
    common += ["--validation_file", str(dev), "--do_eval"]
    common += [word for flag in TRAINING_FLAGS.items() for word in flag]
    if _core.cpu_isa().startswith("avx512"):  # elsewhere bf16 is slower than f32
        common.append("--bf16")
    extra: dict[str, list[str]] = {
        "untrained": [],
        "unquantized": ["--do_train", "--overwrite_output_dir"],
        "MoQ": ["--do_train", "--overwrite_output_dir", "--deepspeed", str(CONFIG)],
    }
    runs = []
    for name, flags in extra.items():
        folder = OUTPUT / name.lower()
        runs.append(Run(name, folder, [*common, *flags, "--output_dir", str(folder)]))
    return runs


def carry_out(run: Run, inputs: tuple[Path, ...]) -> None:
    """Runs the command unless the same one has finished before. Raises DataError if it fails."""
    stamp = _stamp(run, inputs)
    path = run.folder / STAMP_NAME
    if path.is_file() and read_json_object(path) == stamp:
        print(f"{run.name}: {run.folder} (already there; remove it to train again)", flush=True)
        return
    path.unlink(missing_ok=True)
    print(f"\n{run.name}: bitfall glue {shlex.join(run.command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "bitfall", "glue", *run.command]).returncode
    if code != 0:
        raise DataError(f"the {run.name} run failed with exit code {code}; its message is above")
    write_json(path, stamp)


def _stamp(run: Run, inputs: tuple[Path, ...]) -> dict[str, Any]:
    files = (*inputs, CONFIG)
    digests = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {"version": _core.__version__, "command": run.command, "sha256": digests}


def summary(runs: list[Run], model: Path) -> list[str]:
    """Accuracies, bits per layer, sizes, and where to look further."""
    moq = runs[-1].folder
    bits = read_log(moq).steps[-1]["bits"]
    before = (model / "model.safetensors").stat().st_size
    after = (moq / "quantized.safetensors").stat().st_size
    lines = ["", "Movie-review snippets, positive or negative:", ""]
    lines += [f"  {run.name:<12} accuracy {run.accuracy:.3f}" for run in runs]
    lines += [
        "",
        f"  bits per layer at the end: {format_bits(bits)}",
        f"  size on disk: {megabytes(before)} as f32, {megabytes(after)} quantized"
        f" ({before / after:.2f} times smaller)",
        "",
        f"  report:    {moq / REPORT_NAME}",
        f"  model:     {moq} (loads with transformers; true integers in quantized.safetensors)",
        f"  next:      .venv/bin/bitfall schedule {CONFIG} --model {model}",
    ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
