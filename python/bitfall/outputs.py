"""Result files as Hugging Face users look for them; each is written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bitfall.errors import ArgumentsError, DataError


def make_output_dir(path: Path) -> None:
    """Raises ArgumentsError if the folder cannot be made or nothing can be written to it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is not a folder" if path.exists() else error.strerror
        raise ArgumentsError(
            f"--output_dir {path}: {reason}; give a folder that can be made"
        ) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ArgumentsError(
            f"--output_dir {path}: no permission to write there; give another folder"
        )


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Errors of the operating system name `path`, which those of an open file do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write under a temporary name; it gets its own when all went well.

    A kill leaves the old file or the new one, and so does an error, which removes the temporary.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with named_errors(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` as the whole of `path`; see atomic_file."""
    with atomic_file(path) as file:
        file.write(data)


def finite_or_none(value: Any) -> Any:
    """`value` with NaN and infinities replaced by None: JSON has no name for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Indented, keys in the given order."""
    text = json.dumps(finite_or_none(value), indent=2, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises DataError unless the file holds one JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object")
    return value


def write_results(output_dir: Path, split: str, metrics: dict[str, Any]) -> None:
    """<split>_results.json, and the same values merged into all_results.json."""
    ordered = dict(sorted(metrics.items()))
    write_json(output_dir / f"{split}_results.json", ordered)
    everything = output_dir / "all_results.json"
    merged = read_json_object(everything) if everything.is_file() else {}
    write_json(everything, dict(sorted((merged | ordered).items())))


def write_predictions(
    output_dir: Path, name: str, predictions: npt.NDArray[Any], labels: tuple[str, ...]
) -> Path:
    """predict_results_<name>.txt: index and label name, or the value with three decimals."""
    lines = ["index\tprediction"]
    for index, prediction in enumerate(predictions):
        text = labels[int(prediction)] if labels else f"{np.float64(prediction):3.3f}"
        lines.append(f"{index}\t{text}")
    path = output_dir / f"predict_results_{name}.txt"
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return path


def add_labels_to_model_config(model_dir: Path, task: str, labels: tuple[str, ...]) -> None:
    """Names the labels in a saved config.json, so that from_pretrained and pipelines know them.

    Without `labels` the model has one output, a score.
    """
    path = model_dir / "config.json"
    config = read_json_object(path)
    names = labels or ("LABEL_0",)
    config["id2label"] = {str(label): name for label, name in enumerate(names)}
    config["label2id"] = {name: label for label, name in enumerate(names)}
    config["finetuning_task"] = task
    config["architectures"] = ["BertForSequenceClassification"]
    config["problem_type"] = "single_label_classification" if labels else "regression"
    write_json(path, config)
