"""The command line as other programs see it: pipes that end early."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bitfall.cli import BROKEN_PIPE, describe
from bitfall.training_log import TrainingLog
from conftest import environment


@pytest.mark.parametrize("command", [["--help"], ["glue", "--help"], ["check"], ["schedule"]])
def test_a_reader_that_stops_gets_no_traceback(tmp_path: Path, command: list[str]):
    config = tmp_path / "test.json"
    config.write_text('{"train_batch_size": 8, "quantize_training": {"enabled": true}}')
    words = command if "--help" in command else [*command, str(config)]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bitfall", *words],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            check=False,
        )
    finally:
        os.close(writing)
    assert done.stderr == ""
    if "--help" not in command:  # argparse itself may have swallowed it
        assert done.returncode == BROKEN_PIPE


def test_full_disk_names_the_file(tmp_path: Path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    log = TrainingLog(tmp_path / "log.jsonl")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        log.sync()
    monkeypatch.undo()
    log.close()
    message = describe(error.value)
    assert message.startswith(f"{tmp_path / 'log.jsonl'}: No space left on device; free some disk")
