"""Task table and readers: label ids of Hugging Face, strict files."""

from __future__ import annotations

from pathlib import Path

import pytest
from bitfall.errors import DataError
from bitfall.readers import read_glue_file, read_json, read_table, read_tsv
from bitfall.tasks import TASKS, task_directory


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_label_ids_are_hugging_faces():
    assert TASKS["rte"].labels.index("entailment") == 0
    assert TASKS["qnli"].labels.index("entailment") == 0
    assert TASKS["mnli"].labels == ("entailment", "neutral", "contradiction")
    assert TASKS["wnli"].labels == ("not_entailment", "entailment")
    assert TASKS["mrpc"].labels.index("equivalent") == 1
    assert TASKS["stsb"].is_regression
    assert len(TASKS) == 9


@pytest.mark.parametrize(
    ("name", "train", "dev", "first_labels"),
    [
        ("cola", 8551, 1043, [1, 1, 1, 1, 1]),
        ("mrpc", 3668, 408, [1, 0, 1, 0, 1]),
        ("rte", 2490, 277, [1, 0, 0, 0, 1]),
        ("sst2", 67349, 872, [0, 0, 1, 0, 0]),
        ("stsb", 5749, 1500, [5.0, 3.8, 3.8, 2.6, 4.25]),
        ("wnli", 635, 71, [1, 1, 1, 0, 0]),
    ],
)
def test_official_files(glue_dir: Path, name: str, train: int, dev: int, first_labels: list):
    task = TASKS[name]
    folder = task_directory(task, str(glue_dir))
    examples = read_glue_file(folder / "train.tsv", task, "train")
    assert examples.labels is not None
    assert (len(examples), examples.labels[:5]) == (train, first_labels)
    assert (examples.second is None) == (len(task.sentence_columns) == 1)
    assert len(read_glue_file(folder / "dev.tsv", task, "dev")) == dev


def test_mrpc_test_file_and_byte_order_mark(glue_dir: Path):
    task = TASKS["mrpc"]
    examples = read_glue_file(glue_dir / "MRPC" / "test.tsv", task, "test")
    assert len(examples) == 1725
    assert examples.labels is None
    assert examples.first[0].startswith("PCCW's chief operating officer")


def test_task_directory_is_the_root_or_the_tasks_own(tmp_path: Path, monkeypatch):
    folder = tmp_path / "RTE"
    folder.mkdir()
    write(folder / "train.tsv", "x")
    assert task_directory(TASKS["rte"], str(tmp_path)) == folder
    assert task_directory(TASKS["rte"], str(folder)) == folder
    monkeypatch.setenv("BITFALL_GLUE_DIR", str(tmp_path))
    assert task_directory(TASKS["rte"], None) == folder
    with pytest.raises(DataError, match="no QNLI/train"):
        task_directory(TASKS["qnli"], str(tmp_path))
    monkeypatch.delenv("BITFALL_GLUE_DIR")
    assert task_directory(TASKS["rte"], None) is None


HEADER = "index\tsentence1\tsentence2\tlabel\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "0\ta\tb\tentailment\n1\ta\tb\n", r"line 3: 3 fields, expected 4"),
        (HEADER + "0\ta\tb\tentailment\n\n1\ta\tb\tentailment\n", "line 3: the line is empty"),
        (HEADER + "0\ta\tb\tmaybe\n", "line 2: label 'maybe' is not one of rte's"),
        (HEADER.replace("sentence2", "other") + "0\ta\tb\tentailment\n", "'sentence2' is missing"),
        (HEADER, "no rows"),
        ("", "empty"),
        (HEADER.encode() + b"0\ta\xff\tb\tentailment\n", "line 2: byte 0xff is not UTF-8"),
    ],
)
def test_bad_tsv_names_file_and_line(tmp_path: Path, text, message: str):
    path = write(tmp_path / "train.tsv", text)
    with pytest.raises(DataError, match=message) as error:
        read_glue_file(path, TASKS["rte"], "train")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("score", ["high", "nan", "inf", ""])
def test_scores_must_be_finite_numbers(tmp_path: Path, score: str):
    path = write(tmp_path / "dev.tsv", f"sentence1\tsentence2\tscore\na\tb\t{score}\n")
    with pytest.raises(DataError, match="line 2: score"):
        read_glue_file(path, TASKS["stsb"], "dev")


def test_quotes_separators_and_line_ends_are_text(tmp_path: Path):
    text = HEADER + '0\t"a\tb\u2028c \x0b d\tentailment\r\n1\t"\t"x"\tnot_entailment'
    examples = read_glue_file(write(tmp_path / "t.tsv", text), TASKS["rte"], "dev")
    assert examples.first == ['"a', '"']
    assert examples.second == ["b\u2028c \x0b d", '"x"']
    assert examples.labels == [0, 1]


def test_qqps_known_broken_rows_are_left_out_with_a_warning(tmp_path: Path):
    text = "id\tquestion1\tquestion2\tis_duplicate\n1\ta\tb\t0\n2\ta\n3\tc\td\t1\n"
    path = write(tmp_path / "train.tsv", text)
    with pytest.warns(UserWarning, match="1 rows without 4 fields"):
        examples = read_glue_file(path, TASKS["qqp"], "train")
    assert examples.labels == [0, 1]


def test_both_mnli_sets():
    assert TASKS["mnli"].split_files("dev") == {
        "mnli": "dev_matched.tsv",
        "mnli-mm": "dev_mismatched.tsv",
    }


def test_csv_with_quotes_and_newlines(tmp_path: Path):
    path = write(tmp_path / "a.csv", 'text,label\n"a, ""b""\nc",1\nd,0\n')
    table = read_table(path)
    assert table.rows == [['a, "b"\nc', "1"], ["d", "0"]]
    assert table.lines == [3, 4]
    with pytest.raises(DataError, match="line 4: 3 fields"):
        read_table(write(path, "a,b\n1,2\n3,4\n5,6,7\n"))
    with pytest.raises(DataError, match="line 3"):
        read_table(write(path, 'a,b\n1,2\n3,"4\n'))


def test_json_lines_and_list(tmp_path: Path):
    lines = write(tmp_path / "a.json", '{"text": "x", "label": 1}\n{"text": "y", "label": 0}\n')
    whole = write(tmp_path / "b.json", '[{"text": "x", "label": 1}, {"text": "y", "label": 0}]')
    assert read_json(lines).rows == read_json(whole).rows == [["x", 1], ["y", 0]]
    for text, message in (
        ('{"text": "x"}\n{"text": }\n', "line 2: not JSON"),
        ('{"text": "x"}\n{"other": "y"}\n', "line 2: expected an object with the keys text"),
        ("[1, 2]", "expected an object"),
        ("", "empty"),
        ("[" * 100_000, "nested too deeply|not JSON"),
    ):
        with pytest.raises(DataError, match=message):
            read_json(write(lines, text))


def test_duplicate_columns_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="appears twice"):
        read_tsv(write(tmp_path / "a.tsv", "a\ta\n1\t2\n"))
