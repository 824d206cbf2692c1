"""One-line protocol between a benchmark and the process it measures.

The worker prints {"ready": true}, then answers every line on standard input with one JSON line.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

WORKERS = Path(__file__).resolve().parent


def serve(measure: Callable[[], dict[str, Any]]) -> None:
    """Answers each input line with `measure()`, adding the peak memory of the process."""
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        result = measure()
        result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result), flush=True)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Worker:
    """A loaded process that waits for the next measurement."""

    def __init__(self, command: list[str], threads: int = 2) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()

    def measure(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")


def python_worker(name: str, *arguments: str, threads: int = 2) -> Worker:
    """Starts workers/NAME.py under this interpreter."""
    return Worker([sys.executable, str(WORKERS / f"{name}.py"), *arguments], threads)


def paired_seconds(workers: list[Worker], rounds: int) -> list[list[float]]:
    """`rounds` measurements of each worker, taken in turn: one list of seconds per worker."""
    seconds: list[list[float]] = [[] for _ in workers]
    for _ in range(rounds):
        for index, worker in enumerate(workers):
            seconds[index].append(worker.measure()["seconds"])
    return seconds


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the pairwise ratios."""
    return median(a / b for a, b in zip(numerator, denominator, strict=True))
