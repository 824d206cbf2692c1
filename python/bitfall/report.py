"""`bitfall report OUTPUT_DIR`: one self-contained HTML page about a training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bitfall.outputs import write_atomically
from bitfall.report_log import read_log
from bitfall.report_page import page
from bitfall.report_results import (
    config_section,
    error_section,
    metric_section,
    size_section,
    tiles,
)
from bitfall.report_training import bits_section, curve_section, eigenvalue_section
from bitfall.training_log import LOG_NAME

if TYPE_CHECKING:
    import argparse

REPORT_NAME = "report.html"


def write_report(output_dir: str | Path) -> Path:
    """Writes output_dir/report.html from output_dir/bitfall_log.jsonl and returns its path.

    Works on running and interrupted trainings too. Raises DataError, naming file and line, if the
    log is missing or is none.
    """
    output_dir = Path(output_dir)
    log = read_log(output_dir)
    model = log.start.get("model")
    facts = (log.start.get("task"), model.get("path") if isinstance(model, dict) else model)
    title = " · ".join(str(fact) for fact in facts if fact) or output_dir.name
    body = "".join(
        part(log)
        for part in (
            tiles,
            bits_section,
            eigenvalue_section,
            curve_section,
            metric_section,
            error_section,
            size_section,
            config_section,
        )
    )
    path = output_dir / REPORT_NAME
    write_atomically(path, page(title, str(output_dir), log.notes, body).encode())
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `bitfall report`."""
    parser.add_argument("output_dir", help=f"folder of a training: the one that has {LOG_NAME}")


def main(args: argparse.Namespace) -> int:
    """Writes the report and says where it is."""
    print(write_report(args.output_dir))
    return 0
