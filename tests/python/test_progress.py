"""Progress lines, the live bar, TensorBoard and result files."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bitfall.outputs import (
    add_labels_to_model_config,
    write_atomically,
    write_json,
    write_predictions,
    write_results,
)
from bitfall.progress import (
    LiveProgress,
    PlainProgress,
    Progress,
    format_bits,
    format_drop,
    format_eigenvalue,
    make_progress,
)
from bitfall.recorder import Recorder, find_value
from bitfall.tensorboard import TensorBoard, log_directories
from bitfall.training_log import TrainingLog

RESULT = {
    "step": 20,
    "loss": 0.6931,
    "grad_norm": 1.5,
    "learning_rate": 2e-5,
    "loss_scale": 65536.0,
    "skipped": False,
    "bits": {"bert.encoder.layer.0": 12, "bert.encoder.layer.1": 12, "other": 8},
    "drops": [
        {
            "step": 20,
            "name": "bert.encoder.layer.1",
            "old_bits": 13,
            "new_bits": 12,
            "next_threshold": 400.0,
            "factor": 2,
        }
    ],
    "eigenvalues": [
        {
            "name": "bert.encoder.layer.1",
            "block": 1,
            "iterations": 9,
            "converged": True,
            "value": 3.25,
            "normalized": 0.25,
            "factor": 2,
        }
    ],
}
LINE = "step 20/345  loss 0.6931  lr 2e-05  1,234 tokens/s  bits 12x2 | other 8  loss scale 65536\n"


def recorder_config(verbose: bool) -> SimpleNamespace:
    section = {"quantize_verbose": verbose, "eigenvalue": {"verbose": verbose}}
    return SimpleNamespace(json=json.dumps({"quantize_training": section}), steps_per_print=10)


def test_plain_lines_only_when_due():
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.start(345, 0)
    progress.step(19, RESULT, 1234.4, due=False)
    progress.step(20, RESULT, 1234.4, due=True)
    assert stream.getvalue() == LINE


def test_live_bar_shows_numbers_and_keeps_messages(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = make_progress(0, stream)
    assert isinstance(progress, LiveProgress)
    progress.start(345, 0)
    progress.step(20, RESULT, 1234.4, due=False)
    progress.message("step 20: [a message]")
    progress.stop()
    text = stream.getvalue()
    for part in ("20/345", "loss 0.6931", "bits 12x2 | other 8", "[a message]"):
        assert part in text


def test_only_rank_0_speaks():
    assert type(make_progress(1, io.StringIO())) is Progress
    assert type(make_progress(0, io.StringIO())) is PlainProgress


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        ({"layer.0": 8, "other": 8}, "8 | other 8"),
        ({"layer.0": 8, "layer.1": 9, "layer.2": 9}, "8 9x2"),
        ({"other": 4}, "other 4"),
        ({}, ""),
    ],
)
def test_bits_in_short(bits: dict, text: str):
    assert format_bits(bits) == text


def test_verbose_lines():
    assert format_drop(RESULT["drops"][0]) == (
        "step 20: bert.encoder.layer.1 13 -> 12 bits, next threshold 400, factor 2"
    )
    assert format_drop(RESULT["drops"][0] | {"next_threshold": 0.0}).endswith(
        "target reached, factor 2"
    )
    assert format_eigenvalue(20, RESULT["eigenvalues"][0]) == (
        "step 20: bert.encoder.layer.1 eigenvalue 3.25 after 9 iterations (converged),"
        " ev 0.2500, factor 2"
    )


@pytest.mark.parametrize("verbose", [True, False])
def test_recorder_logs_everything_and_prints_what_verbose_asks(tmp_path: Path, verbose: bool):
    stream = io.StringIO()
    log = TrainingLog(tmp_path / "log.jsonl")
    recorder = Recorder(recorder_config(verbose), PlainProgress(stream), log, None)
    recorder.step(21, 0.5, RESULT, tokens=1000, seconds=0.5, due=False)
    recorder.evaluation(21, 0.5, "mrpc", {"eval_f1": 0.875, "eval_runtime": 1.25})
    recorder.close()
    assert ("13 -> 12 bits" in stream.getvalue()) == verbose
    assert ("eigenvalue 3.25" in stream.getvalue()) == verbose
    assert "evaluation of mrpc: eval_f1 0.8750\n" in stream.getvalue()
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["step", "eigenvalues", "drop", "evaluate"]
    assert all(event["step"] == 21 for event in events)
    assert events[0]["tokens_per_second"] == 2000
    assert events[0]["bits"] == RESULT["bits"]
    assert events[2]["optimizer_step"] == 20


def test_find_value_anywhere():
    assert find_value({"a": {"b": {"c": 0}}, "d": 1}, "c") == 0
    assert find_value({"a": {}}, "c") is None


def test_tensorboard_scalars(tmp_path: Path):
    board = TensorBoard([tmp_path / "runs"], 1)
    board.step(20, RESULT | {"grad_norm": math.inf})
    board.metrics(20, {"eval_accuracy": 0.75, "eval_note": "text"})
    board.close()
    (file,) = (tmp_path / "runs").iterdir()
    data = file.read_bytes()
    for name in (b"train/loss", b"bits/other", b"eigenvalues/bert.encoder.layer.1"):
        assert name in data
    assert b"eval/accuracy" in data
    assert b"grad_norm" not in data
    assert b"eval/note" not in data


def test_tensorboard_folders(tmp_path: Path):
    section = {"tensorboard": {"enabled": True, "output_path": "logs", "job_name": "moq"}}
    config = SimpleNamespace(json=json.dumps(section))
    assert log_directories(config, tmp_path, True) == [tmp_path / "runs", Path("logs/moq")]
    assert log_directories(SimpleNamespace(json="{}"), tmp_path, False) == []


def test_results_are_merged_and_strict_json(tmp_path: Path):
    write_results(tmp_path, "train", {"train_loss": 0.5})
    write_results(tmp_path, "eval", {"eval_pearson": math.nan, "eval_loss": 1.0})
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {
        "eval_loss": 1.0,
        "eval_pearson": None,
    }
    merged = json.loads((tmp_path / "all_results.json").read_text())
    assert list(merged) == ["eval_loss", "eval_pearson", "train_loss"]
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left.*state\.json"):
        write_atomically(path, b"half")
    assert json.loads(path.read_text()) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_prediction_files(tmp_path: Path):
    path = write_predictions(tmp_path, "rte", np.array([1, 0]), ("entailment", "not_entailment"))
    assert path.name == "predict_results_rte.txt"
    assert path.read_text() == "index\tprediction\n0\tnot_entailment\n1\tentailment\n"
    path = write_predictions(tmp_path, "stsb", np.array([1.23456], np.float32), ())
    assert path.read_text() == "index\tprediction\n0\t1.235\n"


def test_labels_in_the_model_config(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"hidden_size": 32}')
    add_labels_to_model_config(tmp_path, "rte", ("entailment", "not_entailment"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hidden_size"] == 32
    assert config["label2id"] == {"entailment": 0, "not_entailment": 1}
    assert config["id2label"] == {"0": "entailment", "1": "not_entailment"}
    assert config["problem_type"] == "single_label_classification"
    add_labels_to_model_config(tmp_path, "stsb", ())
    config = json.loads((tmp_path / "config.json").read_text())
    assert (len(config["id2label"]), config["problem_type"]) == (1, "regression")
