"""Where the model comes from: a folder, or a snapshot from the Hugging Face hub."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from bitfall.errors import ArgumentsError, DataError
from bitfall.tokenization import TOKENIZER_FILES

if TYPE_CHECKING:
    from bitfall._core import Communicator

MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
HEAD_WEIGHT = "classifier.weight"
HEADER_LIMIT_BYTES = 100_000_000  # largest header that safetensors allows


def resolve_model(name: str, communicator: Communicator) -> Path:
    """The folder of model `name`; rank 0 downloads a hub name before the others look for it.

    Raises ArgumentsError if there is neither such a folder nor a way to download it.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise ArgumentsError(
            f"--model_name_or_path {name}: no such folder; expected a folder with config.json and"
            " model.safetensors, or a name on the hub"
        )
    path = _download(name) if communicator.rank == 0 else None
    text = communicator.broadcast(str(path).encode() if path else b"")
    return Path(text.decode())


def has_classifier(model_dir: Path) -> bool:
    """True if the weight files hold the classification head. False for unreadable files too: the
    engine reports those."""
    index = model_dir / "model.safetensors.index.json"
    try:
        if index.is_file():
            return HEAD_WEIGHT in json.loads(index.read_bytes())["weight_map"]
        with (model_dir / "model.safetensors").open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(size, HEADER_LIMIT_BYTES)))
    except (OSError, ValueError, LookupError, TypeError, struct.error):
        return False
    return isinstance(header, dict) and HEAD_WEIGHT in header


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ArgumentsError(
            f"--model_name_or_path {name}: no such folder, and the package huggingface_hub, which"
            " downloads hub models, is not installed"
        ) from None
    try:
        folder = snapshot_download(name, allow_patterns=[*MODEL_FILES, *TOKENIZER_FILES])
    except Exception as error:  # the library's errors have no common base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArgumentsError(
            f"--model_name_or_path {name}: no such folder, and the hub did not give it ({reason});"
            " without network, give a folder with config.json and model.safetensors"
        ) from None
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise DataError(f"{name}: the hub's files hold no config.json; expected a BERT model")
    return path
