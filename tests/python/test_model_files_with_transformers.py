"""What the engine saves, transformers loads: the same logits for every head."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

_core = pytest.importorskip("bitfall._core")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTHS = [3, 9, 1]


@pytest.mark.parametrize(
    ("head", "num_labels", "model_class"),
    [
        ("classification", 3, "BertForSequenceClassification"),
        ("regression", 1, "BertForSequenceClassification"),
        ("span", 2, "BertForQuestionAnswering"),
    ],
)
def test_saved_model_gives_the_same_logits(
    tiny_model_dir: Path, tmp_path: Path, head: str, num_labels: int, model_class: str
) -> None:
    text = """{"train_micro_batch_size_per_gpu": 3,
               "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}"""
    flags = {"bitfall.num_training_steps": {"flag": "", "json": "100", "given": False}}
    config = _core.parse_config(text, "test.json", flags)
    engine = _core.Engine(str(tiny_model_dir), head, num_labels, config, _core.make_communicator())
    starts = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
    ids = np.random.default_rng(0).integers(1, 20, starts[-1]).astype(np.int32)
    keys = np.arange(len(LENGTHS), dtype=np.int32)
    _, logits = engine.evaluate({"input_ids": ids, "sequence_starts": starts, "sample_keys": keys})
    engine.save_model(str(tmp_path), "master")

    model, info = getattr(transformers, model_class).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    model.eval()
    expected = []
    for first, last in pairwise(starts):
        with torch.no_grad():
            output = model(input_ids=torch.from_numpy(ids[first:last][None]).long())
        if head == "span":
            expected.append(torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1))
        else:
            expected.append(output.logits)
    np.testing.assert_allclose(logits, torch.cat(expected).numpy(), atol=2e-5)
