"""Eigenvalues in training, through the compiled module: factors, and values of MiniLM."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file, save_file
from tiny_engine import EIGENVALUE, QUANTIZE, completed, make_batch, make_engine

_core = pytest.importorskip("bitfall._core", reason="the C++ module is not built")

GOLDENS = ROOT / "tests" / "goldens"


def test_eigenvalues_of_a_step_set_its_factors(tiny_model_dir: Path) -> None:
    engine = make_engine(tiny_model_dir, quantize_training=QUANTIZE | {"eigenvalue": EIGENVALUE})
    result = engine.train_batch([make_batch()])
    assert [entry["block"] for entry in result["eigenvalues"]] == [0, 1]
    factors = {drop["name"]: drop["factor"] for drop in result["drops"]}
    for entry in result["eigenvalues"]:
        assert entry["value"] > 0
        assert 0 <= entry["normalized"] <= 1
        assert entry["factor"] == 1 + int(4 * entry["normalized"]) == factors[entry["name"]]
        assert 1 <= entry["products"] <= 100
    assert max(entry["normalized"] for entry in result["eigenvalues"]) == 1
    assert engine.timings()["eigenvalues"] > 0


def test_eigenvalues_of_minilm_match_double_differentiation(
    minilm_dir: Path, tmp_path: Path
) -> None:
    """Against tests/goldens/make_eigenvalue_goldens.py, whose start vectors are keyed by step 1."""
    golden = load_file(GOLDENS / "minilm.safetensors")
    exact = load_file(GOLDENS / "eigenvalues.safetensors")
    weights = {
        f"bert.{name}": value
        for name, value in load_file(next(minilm_dir.glob("*.safetensors"))).items()
    }
    for kind in ("weight", "bias"):
        weights[f"classifier.{kind}"] = golden[f"weight.classifier.{kind}"]
    save_file(weights, tmp_path / "model.safetensors")
    shutil.copy(minilm_dir / "config.json", tmp_path)
    config = completed(
        quantize_training=QUANTIZE
        | {"quantize_bits": {"start_bits": 16, "target_bits": 8}, "eigenvalue": EIGENVALUE}
    )
    engine = _core.Engine(str(tmp_path), "classification", 3, config, _core.make_communicator())
    count = len(golden["labels"])
    batch = {
        key: golden[key] for key in ("input_ids", "token_type_ids", "sequence_starts", "labels")
    }
    result = engine.train_batch([{**batch, "sample_keys": np.arange(count, dtype=np.int32)}])
    values = [entry["value"] for entry in result["eigenvalues"]]
    np.testing.assert_allclose(values, np.abs(exact["minilm.power_iteration"]), rtol=0.01)
    iterations = [entry["iterations"] for entry in result["eigenvalues"]]
    assert iterations == exact["minilm.iterations"].tolist()
