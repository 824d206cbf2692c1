"""Model folders and hub names."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from bitfall.errors import ArgumentsError, DataError
from bitfall.model_files import has_classifier, resolve_model
from bitfall.tokenization import copy_tokenizer_files
from safetensors.numpy import save_file


def test_folder(tiny_model_dir: Path, alone):
    assert resolve_model(str(tiny_model_dir), alone) == tiny_model_dir


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "a/b/c"])
def test_missing_folder_is_no_hub_name(name: str, alone, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ArgumentsError, match="no such folder"):
        resolve_model(name, alone)


def test_hub_name_is_downloaded(tiny_model_dir: Path, tmp_path: Path, alone, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, "*.safetensors" in allow_patterns))
        return str(tiny_model_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("bert-base-cased", alone) == tiny_model_dir
    assert asked == [("bert-base-cased", True)]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(DataError, match=r"no config\.json"):
        resolve_model("some/model", alone)


def test_without_network_the_message_says_what_to_do(alone, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ArgumentsError, match=r"\(no route\); without network, give a folder"):
        resolve_model("bert-base-cased", alone)


def test_has_classifier(tiny_model_dir: Path, tmp_path: Path):
    assert not has_classifier(tiny_model_dir)
    assert not has_classifier(tmp_path)
    save_file({"classifier.weight": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    assert has_classifier(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 9)
    assert not has_classifier(tmp_path)
    index = {"weight_map": {"classifier.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert has_classifier(tmp_path)


def test_tokenizer_files_are_copied(tiny_model_dir: Path, tmp_path: Path):
    copy_tokenizer_files(tiny_model_dir, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tokenizer_config.json",
        "vocab.txt",
    ]
    copy_tokenizer_files(tmp_path, tmp_path)  # a model that is trained in place
    assert (tmp_path / "vocab.txt").read_bytes() == (tiny_model_dir / "vocab.txt").read_bytes()
