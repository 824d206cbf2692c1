"""Readers of examples: GLUE's TSV files, and own csv, tsv and json files.

Strict: every row must be complete, because a silently shifted row trains on wrong labels.
"""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfall.errors import DataError
from bitfall.tasks import Task


@dataclass
class Examples:
    """Texts of one split. labels: ids (int) or scores (float), None if the file has none."""

    first: list[str]
    second: list[str] | None
    labels: list[int] | list[float] | None

    def __len__(self) -> int:
        return len(self.first)

    def head(self, count: int | None) -> Examples:
        """The first `count` examples, all of them for None."""
        return Examples(
            self.first[:count],
            self.second[:count] if self.second is not None else None,
            self.labels[:count] if self.labels is not None else None,
        )


@dataclass
class Table:
    """Rows of a file with the line number (from 1) of each."""

    path: Path
    columns: list[str]
    rows: list[list[Any]]
    lines: list[int]

    def column(self, name: str) -> list[Any]:
        position = self.columns.index(name)
        return [row[position] for row in self.rows]


def read_glue_file(path: Path, task: Task, split: str) -> Examples:
    """Examples of one official GLUE file; split is "train", "dev" or "test" (no labels)."""
    header = None if split == "test" or not task.columns_without_header else task
    table = read_tsv(
        path,
        columns=list(header.columns_without_header) if header else None,
        skip_malformed_rows=task.skip_malformed_rows,
    )
    columns = task.columns_for(split)
    _require_columns(table, columns if split == "test" else (*columns, task.label_column))
    labels: list[Any] | None = None
    if split != "test":
        texts = table.column(task.label_column)
        labels = _scores(table, texts) if task.is_regression else _class_ids(table, texts, task)
    second = table.column(columns[1]) if len(columns) == 2 else None
    return Examples(table.column(columns[0]), second, labels)


def read_table(path: Path) -> Table:
    """Own data file by its suffix: .tsv (no quoting), .csv (quoted as usual), .json, .jsonl."""
    if path.suffix == ".tsv":
        return read_tsv(path)
    return read_csv(path) if path.suffix == ".csv" else read_json(path)


def read_tsv(
    path: Path, columns: list[str] | None = None, skip_malformed_rows: bool = False
) -> Table:
    """Tab-separated rows; quotes are ordinary characters. `columns`: the file has no header."""
    lines = _read_text(path).split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    rows = [line.removesuffix("\r").split("\t") for line in lines]
    first_line = 1
    if columns is None:
        if not rows:
            raise DataError(f"{path}: the file is empty; expected a header line and rows")
        columns, first_line = rows.pop(0), 2
    table = Table(path, columns, rows, list(range(first_line, first_line + len(rows))))
    return _checked_rows(table, skip_malformed_rows)


def read_csv(path: Path) -> Table:
    """Comma-separated rows with a header; fields may be quoted and then hold newlines."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    rows: list[list[Any]] = []
    lines: list[int] = []
    try:
        for row in reader:
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}") from None
    if not rows:
        raise DataError(f"{path}: the file is empty; expected a header line and rows")
    return _checked_rows(Table(path, rows[0], rows[1:], lines[1:]), skip_malformed_rows=False)


def read_json(path: Path) -> Table:
    """One object per line, or one list of objects; all with the same keys."""
    text = _read_text(path)
    if text.lstrip().startswith("["):
        records = [(1, record) for record in _parse_json(path, text, first_line=1)]
    else:
        records = [
            (number, _parse_json(path, line, number))
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    if not records:
        raise DataError(f"{path}: the file is empty; expected JSON objects")
    columns = list(records[0][1]) if isinstance(records[0][1], dict) else []
    for number, record in records:
        if not isinstance(record, dict) or set(record) != set(columns) or not columns:
            raise DataError(
                f"{path} line {number}: expected an object with the keys {', '.join(columns)}"
            )
    rows = [[record[column] for column in columns] for _, record in records]
    return Table(path, columns, rows, [number for number, _ in records])


def _parse_json(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path} line {line}: not JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{path} line {first_line}: nested too deeply") from None


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file to"
            " UTF-8"
        ) from None


def _checked_rows(table: Table, skip_malformed_rows: bool) -> Table:
    expected = len(table.columns)
    if len(set(table.columns)) != expected:
        raise DataError(f"{table.path} line 1: a column name appears twice: {table.columns}")
    bad = [index for index, row in enumerate(table.rows) if len(row) != expected]
    if bad and not skip_malformed_rows:
        row, line = table.rows[bad[0]], table.lines[bad[0]]
        seen = "the line is empty" if not any(row) else f"{len(row)} fields"
        raise DataError(
            f"{table.path} line {line}: {seen}, expected {expected} ({', '.join(table.columns)});"
            " mend or remove the line"
        )
    if bad:
        warnings.warn(
            f"{table.path}: {len(bad)} rows without {expected} fields left out, as Hugging Face"
            f" does (first: line {table.lines[bad[0]]})",
            stacklevel=2,
        )
        dropped = set(bad)
        keep = [index for index in range(len(table.rows)) if index not in dropped]
        table.rows = [table.rows[index] for index in keep]
        table.lines = [table.lines[index] for index in keep]
    if not table.rows:
        raise DataError(f"{table.path}: no rows; expected at least one example")
    return table


def _require_columns(table: Table, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise DataError(
            f"{table.path} line 1: column '{missing[0]}' is missing; found"
            f" {', '.join(table.columns)}"
        )


def _class_ids(table: Table, texts: list[str], task: Task) -> list[int]:
    known = task.texts_to_label()
    for text, line in zip(texts, table.lines, strict=True):
        if text not in known:
            raise DataError(
                f"{table.path} line {line}: label '{text}' is not one of {task.name}'s"
                f" ({', '.join(known)})"
            )
    return [known[text] for text in texts]


def _scores(table: Table, texts: list[str]) -> list[float]:
    scores = []
    for text, line in zip(texts, table.lines, strict=True):
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise DataError(f"{table.path} line {line}: score '{text}' is not a number")
        scores.append(score)
    return scores
