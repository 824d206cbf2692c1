"""MRPC with the tutorial's flags, tokenization to metric, against a PyTorch loop (bf16 both)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from results import Result
from workers.protocol import WORKERS


def one_run(name: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(WORKERS / f"{name}.py"), *arguments]
    environment = dict(os.environ, OMP_NUM_THREADS="2", TOKENIZERS_PARALLELISM="true")
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout
    return json.loads(output.strip().splitlines()[-1])


def run(
    model: str, glue_dir: Path, epochs: int = 3, max_train_samples: int | None = None
) -> list[Result]:
    arguments = ["--model", model, "--data_dir", str(glue_dir / "MRPC"), "--epochs", str(epochs)]
    if max_train_samples is not None:
        arguments += ["--max_train_samples", str(max_train_samples)]
    ours = one_run("bitfall_mrpc", *arguments)
    results = []
    for padding, target in (("max_length", 4.0), ("longest", 2.0)):
        peer = one_run("torch_mrpc", *arguments, "--padding", padding)
        detail = (
            f"{ours['seconds']:.1f} s (accuracy {ours['accuracy']:.3f}) beside "
            f"{peer['seconds']:.1f} s (accuracy {peer['accuracy']:.3f})"
        )
        results.append(
            Result(
                f"MRPC beside PyTorch, padding {padding}",
                peer["seconds"] / ours["seconds"],
                target,
                detail,
            )
        )
    return results
