"""Checkpoint folders in the output folder: which is last, which are too old, what a run refuses."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from bitfall.arguments import FALSE_WORDS, TRUE_WORDS, GlueArguments
from bitfall.errors import ArgumentsError

PREFIX = "checkpoint-"
LATEST = "latest"  # written by the engine after the checkpoint is complete


def checkpoint_tag(step: int) -> str:
    """Folder name of the checkpoint after `step` global batches."""
    return f"{PREFIX}{step}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-<step> folders in rising order of steps."""
    found = []
    for path in output_dir.glob(f"{PREFIX}*"):
        match = re.fullmatch(rf"{PREFIX}(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found)]


def last_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint that `latest` names: one that was written completely."""
    latest = output_dir / LATEST
    if not latest.is_file():
        return None
    path = output_dir / latest.read_text(encoding="utf-8", errors="replace").strip()
    return path if path.is_dir() else None


def remove_old_checkpoints(output_dir: Path, save_total_limit: int | None) -> None:
    """Keeps the `save_total_limit` folders that were written last, all for None.

    By time and not by number: after a resume from an earlier step, higher numbers are the older.
    """
    if save_total_limit is None:
        return
    by_age = sorted(list_checkpoints(output_dir), key=lambda path: path.stat().st_mtime_ns)
    for path in by_age[:-save_total_limit]:
        shutil.rmtree(path)


def checkpoint_to_resume(arguments: GlueArguments) -> Path | None:
    """The folder that --resume_from_checkpoint means, or the last one of an earlier run.

    As Hugging Face: a non-empty output folder is refused unless --overwrite_output_dir is given or
    it holds a checkpoint, from which training then goes on.
    """
    output_dir = Path(arguments.output_dir)
    asked = arguments.resume_from_checkpoint
    if asked is not None and asked.lower() in FALSE_WORDS:
        asked = None
    if asked is not None and asked.lower() not in TRUE_WORDS:
        path = Path(asked)
        if not path.is_dir():
            raise ArgumentsError(f"--resume_from_checkpoint {asked}: no such folder")
        return path
    last = last_checkpoint(output_dir)
    if asked is not None:
        if last is None:
            raise ArgumentsError(
                f"--resume_from_checkpoint {asked}: no complete checkpoint in {output_dir}"
            )
        return last
    if arguments.overwrite_output_dir or not output_dir.is_dir() or not any(output_dir.iterdir()):
        return None
    if last is None:
        raise ArgumentsError(
            f"--output_dir {output_dir}: the folder is not empty; give --overwrite_output_dir to"
            " train into it anyway, or another folder"
        )
    return last


def clear_earlier_run(output_dir: Path) -> None:
    """Removes checkpoints of a run that is overwritten, so that none of them is resumed later."""
    (output_dir / LATEST).unlink(missing_ok=True)
    for path in list_checkpoints(output_dir):
        shutil.rmtree(path)
