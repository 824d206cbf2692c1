"""The nine GLUE tasks: files, columns, label names in Hugging Face's order, and metrics."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from bitfall.errors import DataError

DATA_DIR_VARIABLE = "BITFALL_GLUE_DIR"


@dataclass(frozen=True)
class Task:
    """How the official TSV files of one task are laid out and scored.

    labels: names by label id, as in Hugging Face's GLUE datasets; empty for regression.
    label_texts: what the TSV file writes for each label id, if not the name itself.
    columns_without_header: column names of train and dev files that have no header line.
    skip_malformed_rows: the official files contain broken rows, which Hugging Face drops too.
    """

    name: str
    folder: str
    sentence_columns: tuple[str, ...]
    test_sentence_columns: tuple[str, ...] = ()
    label_column: str = "label"
    labels: tuple[str, ...] = ()
    label_texts: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    columns_without_header: tuple[str, ...] = ()
    dev_files: dict[str, str] = field(default_factory=dict)
    test_files: dict[str, str] = field(default_factory=dict)
    skip_malformed_rows: bool = False

    @property
    def is_regression(self) -> bool:
        return not self.labels

    def texts_to_label(self) -> dict[str, int]:
        """Text in the label column -> label id."""
        return {text: label for label, text in enumerate(self.label_texts or self.labels)}

    def split_files(self, split: str) -> dict[str, str]:
        """Result name ("mnli", "mnli-mm", otherwise the task) -> file, for train, dev or test."""
        if split == "train":
            return {self.name: "train.tsv"}
        files = self.dev_files if split == "dev" else self.test_files
        return files or {self.name: f"{split}.tsv"}

    def columns_for(self, split: str) -> tuple[str, ...]:
        """Sentence columns of a split: CoLA's test file names them otherwise than its others."""
        if split == "test" and self.test_sentence_columns:
            return self.test_sentence_columns
        return self.sentence_columns


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")

TASKS = {
    task.name: task
    for task in (
        Task(
            "cola",
            "CoLA",
            ("sentence",),
            labels=("unacceptable", "acceptable"),
            label_texts=("0", "1"),
            metrics=("matthews_correlation",),
            columns_without_header=("source", "label", "original_judgement", "sentence"),
        ),
        Task(
            "sst2",
            "SST-2",
            ("sentence",),
            labels=("negative", "positive"),
            label_texts=("0", "1"),
        ),
        Task(
            "mrpc",
            "MRPC",
            ("#1 String", "#2 String"),
            label_column="Quality",
            labels=("not_equivalent", "equivalent"),
            label_texts=("0", "1"),
            metrics=("accuracy", "f1"),
        ),
        Task("stsb", "STS-B", PAIR, label_column="score", metrics=("pearson", "spearmanr")),
        Task(
            "qqp",
            "QQP",
            ("question1", "question2"),
            label_column="is_duplicate",
            labels=("not_duplicate", "duplicate"),
            label_texts=("0", "1"),
            metrics=("accuracy", "f1"),
            skip_malformed_rows=True,
        ),
        Task(
            "mnli",
            "MNLI",
            PAIR,
            label_column="gold_label",
            labels=("entailment", "neutral", "contradiction"),
            dev_files={"mnli": "dev_matched.tsv", "mnli-mm": "dev_mismatched.tsv"},
            test_files={"mnli": "test_matched.tsv", "mnli-mm": "test_mismatched.tsv"},
        ),
        Task("qnli", "QNLI", ("question", "sentence"), labels=ENTAILMENT),
        Task("rte", "RTE", PAIR, labels=ENTAILMENT),
        Task(
            "wnli",
            "WNLI",
            PAIR,
            labels=("not_entailment", "entailment"),
            label_texts=("0", "1"),
        ),
    )
}


def task_directory(task: Task, data_dir: str | None) -> Path | None:
    """The folder with the task's TSV files: `data_dir` itself, or the task's folder in it.

    Without `data_dir`, $BITFALL_GLUE_DIR is used; None if neither is given: the data is then on the
    hub. Raises DataError if the folder holds no training or validation file of the task.
    """
    root = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if not root:
        return None
    candidates = [Path(root), Path(root) / task.folder, Path(root) / task.name]
    files = ["train.tsv", *task.split_files("dev").values(), *task.split_files("test").values()]
    # A folder of another task has a train.tsv too: prefer the one that carries the task's name.
    for candidate in sorted(candidates, key=lambda path: path.name not in (task.folder, task.name)):
        if any((candidate / file).is_file() for file in files):
            return candidate
    raise DataError(
        f"{root}: no {task.folder}/{files[0]} in it; expected the GLUE folder or the task's own"
    )
