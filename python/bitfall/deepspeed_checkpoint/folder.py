"""Which files make up a DeepSpeed checkpoint."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitfall._core import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

LATEST = "latest"
MODEL_STATES = "mp_rank_00_model_states.pt"
OPTIMIZER_STATES = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
MAX_TAG_LENGTH = 200


@dataclass(frozen=True)
class CheckpointFiles:
    """`optimizer_states` by rank; empty without ZeRO, where model_states holds the optimizer."""

    folder: Path
    model_states: Path
    optimizer_states: list[Path]


def checkpoint_folder(directory: Path, tag: str | None) -> Path:
    """DIRECTORY/TAG, with the tag of DIRECTORY/latest for None. Raises CheckpointError."""
    if tag is None:
        latest = directory / LATEST
        if not latest.is_file():
            raise CheckpointError(
                f"{directory}: no checkpoint here (no file 'latest'); give the folder that holds"
                " it, or the tag"
            )
        with latest.open("rb") as file:
            tag = file.read(MAX_TAG_LENGTH + 1).decode("utf-8", errors="replace").strip()
    if not tag or len(tag) > MAX_TAG_LENGTH or tag.startswith(".") or re.search(r"[/\n\r\0]", tag):
        raise CheckpointError(
            f"{directory}: '{tag[:60]}' is no checkpoint tag; expected a name like global_step100"
        )
    folder = directory / tag
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint")
    return folder


def is_deepspeed_checkpoint(folder: Path) -> bool:
    """True if `folder` holds .pt files as DeepSpeed names them."""
    return any(folder.glob("*_model_states.pt")) or any(folder.glob("*_optim_states.pt"))


def checkpoint_files(folder: Path) -> CheckpointFiles:
    """The files of stages 0 to 2. Raises CheckpointError for missing ranks and other layouts."""
    if any(folder.glob("zero_pp_rank_*_model_states.pt")):
        raise CheckpointError(
            f"{folder}: a ZeRO stage 3 checkpoint, which bitfall does not read; convert it with the"
            " zero_to_fp32.py that lies beside it"
        )
    others = [path.name for path in folder.glob("mp_rank_*") if path.name != MODEL_STATES]
    if others:
        raise CheckpointError(
            f"{folder}: a checkpoint of a model in parts ({others[0]}: tensor or pipeline"
            " parallelism), which bitfall does not read"
        )
    if not (folder / MODEL_STATES).is_file():
        raise CheckpointError(f"{folder / MODEL_STATES}: missing; copy the checkpoint anew")
    return CheckpointFiles(folder, folder / MODEL_STATES, _optimizer_files(folder))


def _optimizer_files(folder: Path) -> list[Path]:
    by_rank: dict[int, Path] = {}
    for path in sorted(folder.glob("*_optim_states.pt")):
        match = OPTIMIZER_STATES.fullmatch(path.name)
        if match is None or int(match[3]) != 0:
            raise CheckpointError(f"{path}: belongs to a model in parts, which bitfall cannot read")
        rank = int(match[2])
        if rank in by_rank:
            raise CheckpointError(
                f"{path}: rank {rank} is there twice, as {by_rank[rank].name} too; two runs wrote"
                " into this folder, remove the files of one"
            )
        by_rank[rank] = path
    for rank in range(len(by_rank)):
        if rank not in by_rank:
            raise CheckpointError(
                f"{folder}: the file of rank {rank} is missing"
                f" (zero_pp_rank_{rank}_mp_rank_00_optim_states.pt); copy the files of all ranks"
            )
    return [by_rank[rank] for rank in range(len(by_rank))]
