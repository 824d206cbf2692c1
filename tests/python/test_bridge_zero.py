"""A torch module over two ranks: ZeRO stages 1 and 2 train as stage 0 does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

pytest.importorskip("torch")


def test_stages_give_the_same_weights() -> None:
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("mpirun is not installed")
    worker = Path(__file__).parent / "bridge_zero_worker.py"
    done = subprocess.run(
        [
            *(mpirun, "--allow-run-as-root", "--oversubscribe", "-np", "2"),
            *(sys.executable, str(worker)),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.strip().splitlines()[-1])
    for name, difference in differences.items():
        setting, what = name.split()
        if what == "moved":
            assert difference > 1e-2, name
        elif what == "2" and setting == "accumulated":  # means are summed, not sums averaged
            assert difference < 1e-5, name
        else:
            assert difference == 0, name
