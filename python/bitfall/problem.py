"""Problem: what a run learns (labels, metrics) and the examples of its splits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitfall.arguments import GlueArguments
from bitfall.errors import DataError
from bitfall.hub_data import download, read_hub_file
from bitfall.readers import Examples, Table, read_glue_file, read_table
from bitfall.tasks import TASKS, Task, task_directory

if TYPE_CHECKING:
    from bitfall._core import Communicator

CUSTOM = "custom"  # name of the problem that own files define
LABEL = "label"


@dataclass
class Problem:
    """labels: names by id, empty for regression. splits: "train", "dev", "test" ->
    {result name: examples}; MNLI has two dev and two test sets."""

    name: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: dict[str, dict[str, Examples]] = field(default_factory=dict)

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def num_labels(self) -> int:
        return len(self.labels) or 1


def load_problem(
    arguments: GlueArguments, model_config: dict[str, Any], communicator: Communicator
) -> Problem:
    """Reads the splits that the flags ask for, cut to --max_..._samples. All ranks call it.

    `model_config` is the model's config.json: its label order is kept where it names the same
    labels. A GLUE task without --data_dir is downloaded. Raises DataError for unusable files.
    """
    if arguments.task_name:
        return _load_task(TASKS[arguments.task_name], arguments, model_config, communicator)
    return _load_own_files(arguments, model_config)


def label_order(labels: tuple[str, ...], model_config: dict[str, Any]) -> tuple[str, ...]:
    """`labels` in the order of the model's id2label if that names the same labels."""
    names = model_config.get("id2label") or {}
    try:
        ordered = tuple(str(names[key]).lower() for key in sorted(names, key=int))
    except (TypeError, ValueError, AttributeError):
        return labels
    return ordered if sorted(ordered) == sorted(labels) else labels


def _wanted_splits(arguments: GlueArguments) -> list[tuple[str, int | None]]:
    wanted = (
        ("train", arguments.do_train, arguments.max_train_samples),
        ("dev", arguments.do_eval, arguments.max_eval_samples),
        ("test", arguments.do_predict, arguments.max_predict_samples),
    )
    return [(split, count) for split, is_wanted, count in wanted if is_wanted]


def _load_task(
    task: Task,
    arguments: GlueArguments,
    model_config: dict[str, Any],
    communicator: Communicator,
) -> Problem:
    wanted = _wanted_splits(arguments)
    directory = task_directory(task, arguments.data_dir)
    if directory is None:
        read, files = read_hub_file, download(task, [split for split, _ in wanted], communicator)
    else:
        read, files = (
            read_glue_file,
            {split: _in_folder(task, directory, split) for split, _ in wanted},
        )
    labels = label_order(task.labels, model_config)
    problem = Problem(task.name, labels, task.metrics)
    for split, count in wanted:
        problem.splits[split] = {}
        for name, path in files[split].items():
            examples = read(path, task, split).head(count)
            if labels != task.labels and examples.labels is not None:
                examples.labels = [labels.index(task.labels[int(i)]) for i in examples.labels]
            problem.splits[split][name] = examples
    return problem


def _in_folder(task: Task, directory: Path, split: str) -> dict[str, Path]:
    return {name: directory / file for name, file in task.split_files(split).items()}


def _load_own_files(arguments: GlueArguments, model_config: dict[str, Any]) -> Problem:
    files = {
        "train": arguments.train_file,
        "dev": arguments.validation_file,
        "test": arguments.test_file,
    }
    wanted = dict(_wanted_splits(arguments))
    tables = {
        split: read_table(Path(file))
        for split, file in files.items()
        if file and (split in wanted or split == "train")
    }
    labels = _own_labels(tables.get("train"), model_config)
    problem = Problem(CUSTOM, labels, ("accuracy",) if labels else ("mse",))
    columns = _sentence_columns(next(iter(tables.values())))
    for split, count in wanted.items():
        examples = _own_examples(tables[split], columns, labels, with_labels=split != "test")
        problem.splits[split] = {CUSTOM: examples.head(count)}
    return problem


def _sentence_columns(table: Table) -> list[str]:
    """sentence1 and sentence2, else the first two columns besides the label, else the only one."""
    columns = [name for name in table.columns if name != LABEL]
    if not columns:
        raise DataError(f"{table.path} line 1: no column with text, only '{LABEL}'")
    if {"sentence1", "sentence2"} <= set(columns):
        return ["sentence1", "sentence2"]
    return columns[:2]


def _own_labels(train: Table | None, model_config: dict[str, Any]) -> tuple[str, ...]:
    """Sorted label names of the training file, or those of the model; empty for regression."""
    if train is None:
        if model_config.get("problem_type") == "regression":
            return ()
        names = model_config.get("id2label")
        if not names:
            raise DataError("the model's config.json names no labels: give --train_file too")
        return tuple(str(names[key]) for key in sorted(names, key=int))
    values = [_label_value(train, value, line) for value, line in _labels_with_lines(train)]
    if any(isinstance(value, float) for value in values):
        if not all(isinstance(value, (int, float)) for value in values):
            raise DataError(f"{train.path}: column '{LABEL}' mixes numbers and names")
        return ()
    if len(set(values)) == 1:
        raise DataError(
            f"{train.path}: every label is {values[0]!r}; expected two or more different ones, or"
            " numbers with a decimal point for regression"
        )
    if all(isinstance(value, int) for value in values):
        return tuple(str(value) for value in sorted(set(values)))
    return tuple(sorted({str(value) for value in values}))


def _labels_with_lines(table: Table) -> list[tuple[Any, int]]:
    if LABEL not in table.columns:
        raise DataError(
            f"{table.path} line 1: column '{LABEL}' is missing; found {', '.join(table.columns)}"
        )
    return list(zip(table.column(LABEL), table.lines, strict=True))


def _label_value(table: Table, value: Any, line: int) -> int | float | str:
    """A label as int, float or text: files without types (csv, tsv) are read by appearance."""
    if isinstance(value, str) and table.path.suffix in (".csv", ".tsv"):
        for number_type in (int, float):
            try:
                value = number_type(value)
                break
            except ValueError:
                continue
    is_number = isinstance(value, float) and math.isfinite(value)
    if is_number or isinstance(value, int) or (isinstance(value, str) and value):
        return value
    raise DataError(f"{table.path} line {line}: label {value!r} is neither a name nor a number")


def _own_examples(
    table: Table, columns: list[str], labels: tuple[str, ...], with_labels: bool
) -> Examples:
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise DataError(
            f"{table.path} line 1: column '{missing[0]}' of the training file is missing; found"
            f" {', '.join(table.columns)}"
        )
    texts = [table.column(name) for name in columns]
    for name, column in zip(columns, texts, strict=True):
        for value, line in zip(column, table.lines, strict=True):
            if not isinstance(value, str):
                raise DataError(f"{table.path} line {line}: {name} is {value!r}, expected text")
    ids = _own_label_ids(table, labels) if with_labels else None
    return Examples(texts[0], texts[1] if len(texts) == 2 else None, ids)


def _own_label_ids(table: Table, labels: tuple[str, ...]) -> list[Any]:
    known = {name: label for label, name in enumerate(labels)}
    ids: list[Any] = []
    for text, line in _labels_with_lines(table):
        value = _label_value(table, text, line)
        if not labels:
            if isinstance(value, str):
                raise DataError(f"{table.path} line {line}: label {value!r}, expected a number")
            ids.append(float(value))
        elif str(value) in known:
            ids.append(known[str(value)])
        else:
            raise DataError(
                f"{table.path} line {line}: label {value!r} is not one of the training file's"
                f" ({', '.join(labels)})"
            )
    return ids
