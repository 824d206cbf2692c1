"""Tokenizers from a Hugging Face model folder, and token ids without padding."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitfall.errors import DataError
from bitfall.outputs import write_atomically

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


# Embedding tables are padded up to multiples of at most this; more rows without a token mean that
# the tokenizer belongs to another model.
VOCABULARY_PADDING = 128


class TextEncoder:
    """Turns texts into token ids; truncates the longest text of a pair first, as Hugging Face."""

    def __init__(self, model_dir: Path, model_config: dict[str, Any], max_seq_length: int) -> None:
        """Raises DataError if the folder has no tokenizer or one that does not fit the model."""
        settings = _read_settings(model_dir / "tokenizer_config.json")
        self._tokenizer = _load_tokenizer(model_dir, settings)
        self._type_vocab_size = _size({"type_vocab_size": 2} | model_config, "type_vocab_size")
        tokens = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        vocab_size = _size(model_config, "vocab_size")
        if not vocab_size - VOCABULARY_PADDING < tokens <= vocab_size:
            raise DataError(
                f"{model_dir}: the tokenizer has {tokens} tokens, but the model's vocab_size is"
                f" {vocab_size}; use the tokenizer that the model was trained with"
            )
        self.max_seq_length = _limited_length(max_seq_length, model_config, settings)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self.max_seq_length, strategy="longest_first")

    def encode(self, first: list[str], second: list[str] | None) -> list[Encoding]:
        """One encoding (ids, type_ids) per example, special tokens included."""
        if second is not None and self._type_vocab_size < 2:
            raise DataError("the model has type_vocab_size 1: it cannot tell sentence pairs apart")
        texts = first if second is None else list(zip(first, second, strict=True))
        return self._tokenizer.encode_batch_fast(texts)  # without offsets


def copy_tokenizer_files(model_dir: Path, output_dir: Path) -> None:
    """Copies the tokenizer next to a saved model so that from_pretrained finds it."""
    for name in TOKENIZER_FILES:
        if (model_dir / name).is_file() and model_dir.resolve() != output_dir.resolve():
            write_atomically(output_dir / name, (model_dir / name).read_bytes())


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise DataError(f"{path}: expected a JSON object")
    return settings


def _load_tokenizer(model_dir: Path, settings: dict[str, Any]) -> Tokenizer:
    from tokenizers import BertWordPieceTokenizer, Tokenizer

    fast, vocabulary = model_dir / "tokenizer.json", model_dir / "vocab.txt"
    try:
        if fast.is_file():
            return Tokenizer.from_file(str(fast))
        if vocabulary.is_file():
            wrapper = BertWordPieceTokenizer(
                str(vocabulary),
                lowercase=settings.get("do_lower_case", True),
                strip_accents=settings.get("strip_accents"),
                handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
            )
            return wrapper._tokenizer
    except Exception as error:  # the library raises plain Exception for damaged files
        source = fast if fast.is_file() else vocabulary
        raise DataError(f"{source}: cannot be read as a tokenizer: {error}") from None
    raise DataError(f"{model_dir}: neither tokenizer.json nor vocab.txt; a BERT folder has one")


def _size(model_config: dict[str, Any], key: str) -> int:
    value = model_config.get(key)
    if not isinstance(value, int) or value < 1:
        raise DataError(f"the model's config.json: {key} is {value!r}, expected a positive integer")
    return value


def _limited_length(
    max_seq_length: int, model_config: dict[str, Any], settings: dict[str, Any]
) -> int:
    """`max_seq_length`, or the model's limit with a warning where that is smaller."""
    limit = _size(model_config, "max_position_embeddings")
    model_max_length = settings.get("model_max_length")
    if isinstance(model_max_length, int | float):
        limit = int(min(limit, model_max_length))
    if max_seq_length > limit:
        warnings.warn(
            f"--max_seq_length {max_seq_length} is above the model's limit: using {limit}",
            stacklevel=3,
        )
    return min(max_seq_length, limit)
