"""The tasks whose data is large, end to end on a few rows in the layout that GLUE publishes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import run_cli

MNLI_TEXT = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse"
MNLI_TEXT += " sentence1_parse sentence2_parse sentence1 sentence2"
MNLI_LABELS = ("entailment", "neutral", "contradiction")
QNLI_LABELS = ("entailment", "not_entailment")


def write_tsv(path: Path, header: str, row: str, labels: tuple[str, ...], count: int) -> None:
    """`row` with its fields apart by spaces: {i} the number, {label} one of `labels` in turn."""
    lines = ["\t".join(header.split())]
    for i in range(count):
        fields = row.format(i=i, label=labels[i % len(labels)]).split(" ")
        lines.append("\t".join(field.replace("_", " ") for field in fields))
    text = "\n".join(lines) + "\n"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.replace("not entailment", "not_entailment"))


def mnli(folder: Path) -> None:
    texts = "{i} {i} {i}e fiction (_the_film_) (_it_) (ROOT) (ROOT) the_film_is_good a_play_is_bad"
    train = (f"{MNLI_TEXT} label1 gold_label", f"{texts} {{label}} {{label}}", MNLI_LABELS)
    votes = " ".join(f"label{i}" for i in range(1, 6))
    dev = (f"{MNLI_TEXT} {votes} gold_label", texts + " {label}" * 6, MNLI_LABELS)
    write_tsv(folder / "MNLI" / "train.tsv", *train, 18)
    for name, count in (("matched", 7), ("mismatched", 5)):
        write_tsv(folder / "MNLI" / f"dev_{name}.tsv", *dev, count)
        write_tsv(folder / "MNLI" / f"test_{name}.tsv", MNLI_TEXT, texts, ("",), count - 2)


def qnli(folder: Path) -> None:
    header, row = "index question sentence", "{i} was_the_film_good the_film_was_dull"
    for name, count in (("train", 18), ("dev", 7)):
        labelled = (f"{header} label", f"{row} {{label}}", QNLI_LABELS)
        write_tsv(folder / "QNLI" / f"{name}.tsv", *labelled, count)
    write_tsv(folder / "QNLI" / "test.tsv", header, row, ("",), 5)


def qqp(folder: Path) -> None:
    texts = "was_it_{i}_good is_the_play_good"
    for name, count in (("train", 18), ("dev", 7)):
        header = "id qid1 qid2 question1 question2 is_duplicate"
        write_tsv(
            folder / "QQP" / f"{name}.tsv",
            header,
            f"{{i}} 1 2 {texts} {{label}}",
            ("0", "1"),
            count,
        )
    with (folder / "QQP" / "train.tsv").open("a") as file:
        file.write("9\t9\t9\tthe official file\n")  # has broken rows, too
    write_tsv(folder / "QQP" / "test.tsv", "id question1 question2", f"{{i}} {texts}", ("",), 5)


@pytest.mark.filterwarnings("ignore:.*rows without 6 fields left out")
@pytest.mark.parametrize(
    ("write", "labels", "scores"),
    [
        (mnli, MNLI_LABELS, {"eval_accuracy": 7, "eval_accuracy_mm": 5}),
        (qnli, QNLI_LABELS, {"eval_accuracy": 7}),
        (qqp, ("not_duplicate", "duplicate"), {"eval_accuracy": 7, "eval_f1": 7}),
    ],
)
def test_trains_evaluates_and_predicts(tiny_model_dir: Path, tmp_path: Path, write, labels, scores):
    write(tmp_path)
    name, out = write.__name__, tmp_path / "out"
    flags = ["--model_name_or_path", tiny_model_dir, "--task_name", name, "--output_dir", out]
    flags += ["--data_dir", tmp_path, "--do_train", "--do_eval", "--do_predict"]
    assert run_cli("glue", *flags, "--num_train_epochs", 1, "--max_seq_length", 32) == 0
    results = json.loads((out / "eval_results.json").read_text())
    for score, count in scores.items():
        assert 0 <= results[score] <= 1
        assert results["eval_samples_mm" if score.endswith("_mm") else "eval_samples"] == count
    assert json.loads((out / "all_results.json").read_text())["train_samples"] == 18
    config = json.loads((out / "config.json").read_text())
    assert tuple(config["id2label"].values()) == labels
    predicted = {name: 5, "mnli-mm": 3} if name == "mnli" else {name: 5}
    assert {path.name for path in out.glob("predict_results_*")} == {
        f"predict_results_{task}.txt" for task in predicted
    }
    for task, count in predicted.items():
        header, *lines = (out / f"predict_results_{task}.txt").read_text().splitlines()
        assert header == "index\tprediction"
        assert [line.split("\t")[0] for line in lines] == [str(i) for i in range(count)]
        assert {line.split("\t")[1] for line in lines} <= set(labels)
