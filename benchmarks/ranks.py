"""Two ranks with one thread each against one rank with one thread, in tokens per second."""

import os
import sys
from statistics import median

from results import Result
from workers.protocol import WORKERS, Worker, median_ratio, paired_seconds

ROUNDS = 5


def run(model: str) -> list[Result]:
    results = []
    for dtype in ("f32", "bf16"):
        worker = [
            sys.executable,
            str(WORKERS / "bitfall_ranks.py"),
            "--model",
            model,
            "--dtype",
            dtype,
        ]
        launcher = ["mpirun", "-np", "2", "--bind-to", "core", "--stdin", "0"]
        if os.geteuid() == 0:
            launcher.append("--allow-run-as-root")
        one = Worker(worker, threads=1)
        two = Worker([*launcher, *worker], threads=1)
        one_seconds, two_seconds = paired_seconds([one, two], ROUNDS)
        detail = f"{median(two_seconds):.3f} s a step beside {median(one_seconds):.3f} s alone"
        results.append(
            Result(
                f"two ranks, {dtype}, tokens/s",
                2 * median_ratio(one_seconds, two_seconds),
                1.8,
                detail,
            )
        )
        one.close()
        two.close()
    return results
