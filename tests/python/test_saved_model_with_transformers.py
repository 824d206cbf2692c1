"""A model fine-tuned with MoQ, loaded by transformers: the same predictions and scores."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import run_cli
from safetensors.numpy import load_file

pytest.importorskip("bitfall._core", reason="the C++ module is not built")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

GROUPS = 4
MOQ = {
    "quantize_training": {
        "enabled": True,
        "quantize_bits": {"start_bits": 12, "target_bits": 6},
        "quantize_schedule": {"quantize_period": 1, "schedule_offset": 0},
        "quantize_groups": GROUPS,
    }
}


@pytest.fixture
def trained(tiny_model_dir: Path, sentiment_files: tuple[Path, Path], tmp_path: Path) -> Path:
    """The output folder of a training that has reached 6 bits; the test set is the dev set."""
    (tmp_path / "ds.json").write_text(json.dumps(MOQ))
    train, dev = sentiment_files
    flags = ["--model_name_or_path", tiny_model_dir, "--output_dir", tmp_path / "out"]
    flags += ["--train_file", train, "--validation_file", dev, "--test_file", dev]
    flags += ["--do_train", "--do_eval", "--do_predict", "--max_seq_length", 16]
    flags += ["--num_train_epochs", 2, "--learning_rate", 3e-3]
    flags += ["--deepspeed", tmp_path / "ds.json"]
    assert run_cli("glue", *flags) == 0
    return tmp_path / "out"


def test_transformers_scores_the_same(trained: Path, sentiment_files: tuple[Path, Path]):
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        trained, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    with sentiment_files[1].open() as file:
        rows = list(csv.DictReader(file))
    texts = [row["text"] for row in rows]
    labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    encoded = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")
    assert (encoded["attention_mask"] == 0).any()
    with torch.no_grad():
        output = model.eval()(**encoded, labels=labels)
    predicted = output.logits.argmax(-1)
    assert len(set(predicted.tolist())) == 2
    lines = (trained / "predict_results_custom.txt").read_text().splitlines()[1:]
    assert [line.split("\t")[1] for line in lines] == [
        model.config.id2label[int(label)] for label in predicted
    ]
    results = json.loads((trained / "eval_results.json").read_text())
    assert results["eval_accuracy"] == pytest.approx((predicted == labels).float().mean().item())
    assert results["eval_loss"] == pytest.approx(output.loss.item(), abs=2e-5)


def test_quantized_tensors_have_no_more_values_than_their_bits_allow(trained: Path):
    events = map(json.loads, (trained / "bitfall_log.jsonl").read_text().splitlines())
    sizes = next(event for event in events if event["event"] == "end")["quantized_sizes"]
    weights = load_file(trained / "model.safetensors")
    assert set(sizes) == set(weights)
    quantized = {name: size["bits"] for name, size in sizes.items() if size["bits"] != 32}
    assert set(quantized.values()) == {6}
    assert {name for name, values in weights.items() if values.ndim >= 2} == set(quantized)
    for name, bits in quantized.items():
        for group in weights[name].reshape(GROUPS, -1):
            assert len(np.unique(group)) <= 2**bits
