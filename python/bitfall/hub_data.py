"""GLUE data from the Hugging Face hub, where run_glue.py gets it without --data_dir."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitfall.errors import DataError
from bitfall.readers import Examples
from bitfall.tasks import DATA_DIR_VARIABLE, PAIR, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bitfall._core import Communicator

DATASET = "nyu-mll/glue"
LABEL = "label"
# The sentence columns of the tasks that the hub names otherwise than the TSV files do.
COLUMNS = {"mrpc": PAIR, "mnli": ("premise", "hypothesis")}
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
MNLI_SUFFIXES = {"mnli": "_matched", "mnli-mm": "_mismatched"}


def hub_files(task: Task, split: str) -> dict[str, str]:
    """Result name -> parquet file in the dataset, as Task.split_files; split: train, dev, test."""
    return {
        name: f"{task.name}/{_hub_split(split, name)}-00000-of-00001.parquet"
        for name in task.split_files(split)
    }


def download(
    task: Task, splits: Sequence[str], communicator: Communicator
) -> dict[str, dict[str, Path]]:
    """Split -> {result name: file in the hub's cache}. All ranks call it.

    The first rank of each machine downloads what the cache lacks, then the others look there.
    Raises DataError, which says what to give instead, if the hub does not give a file.
    """
    is_first = communicator.local_rank == 0
    found = _locate(task, splits, local_files_only=False) if is_first else {}
    communicator.barrier()
    return found if is_first else _locate(task, splits, local_files_only=True)


def read_hub_file(path: Path, task: Task, split: str) -> Examples:
    """Examples of one parquet file; split is "train", "dev" or "test" (no labels).

    Raises DataError for a damaged file, missing columns, and labels outside the task.
    """
    import pyarrow
    from pyarrow import parquet

    names = list(COLUMNS.get(task.name, task.sentence_columns))
    if split != "test":
        names.append(LABEL)
    try:
        table = parquet.ParquetFile(path)
        missing = [name for name in names if name not in table.schema_arrow.names]
        if missing:
            found = ", ".join(table.schema_arrow.names)
            raise DataError(f"{path}: column '{missing[0]}' is missing; found {found}")
        columns = table.read(names).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a readable parquet file ({_first_line(error)}); remove it, and it will"
            " be downloaded again"
        ) from None
    labels = None if split == "test" else _labels(path, columns.pop(LABEL), task)
    texts = [_texts(path, name, column) for name, column in columns.items() if name != LABEL]
    if not texts[0]:
        raise DataError(f"{path}: no rows; expected at least one example")
    return Examples(texts[0], texts[1] if len(texts) == 2 else None, labels)


def _hub_split(split: str, name: str) -> str:
    suffix = MNLI_SUFFIXES.get(name, "") if split != "train" else ""
    return HUB_SPLITS[split] + suffix


def _locate(
    task: Task, splits: Sequence[str], local_files_only: bool
) -> dict[str, dict[str, Path]]:
    fetch = _fetcher(task)
    return {
        split: {
            name: fetch(file, local_files_only) for name, file in hub_files(task, split).items()
        }
        for split in splits
    }


def _fetcher(task: Task) -> Callable[[str, bool], Path]:
    """(file of the dataset, local_files_only) -> its path in the hub's cache."""
    advice = (
        f"give --data_dir, the folder that holds {task.folder}/train.tsv and"
        f" {task.folder}/{next(iter(task.split_files('dev').values()))} as GLUE publishes them, or"
        f" set {DATA_DIR_VARIABLE} to it"
    )
    try:
        import pyarrow.parquet  # noqa: F401  found missing before the download, not after it
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise DataError(
            f"--task_name {task.name} without --data_dir: downloading GLUE needs the packages"
            f" huggingface_hub and pyarrow ({error}); install them, or {advice}"
        ) from None

    logging.set_verbosity_error()  # without network its retries would bury the one message

    def fetch(file: str, local_files_only: bool) -> Path:
        try:
            path = hf_hub_download(
                DATASET, file, repo_type="dataset", local_files_only=local_files_only
            )
        except Exception as error:  # the library's errors have no common base
            raise DataError(
                f"--task_name {task.name} without --data_dir: the hub did not give {file} of"
                f" {DATASET} ({_first_line(error)}); {advice}"
            ) from None
        return Path(path)

    return fetch


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _texts(path: Path, name: str, values: list[Any]) -> list[str]:
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(f"{path} row {row}: {name} is {value!r}, expected text")
    return values


def _labels(path: Path, values: list[Any], task: Task) -> list[Any]:
    for row, value in enumerate(values):
        if task.is_regression:
            if not isinstance(value, float) or not math.isfinite(value):
                raise DataError(f"{path} row {row}: score {value!r} is not a number")
        elif not isinstance(value, int) or not 0 <= value < len(task.labels):
            raise DataError(
                f"{path} row {row}: label {value!r} is not one of {task.name}'s"
                f" (0 to {len(task.labels) - 1})"
            )
    return values
