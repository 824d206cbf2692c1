"""Tokenized examples in flat arrays, and packed batches of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitfall.distributed import gather_concatenated, share

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from bitfall._core import Batch, Communicator
    from bitfall.readers import Examples
    from bitfall.tokenization import TextEncoder

ENCODE_CHUNK = 4096  # examples tokenized at a time: bounds the memory of their Python objects


@dataclass(frozen=True)
class TokenizedData:
    """input_ids and token_type_ids [T] int32 of all examples back to back; example i lies at
    starts[i]..starts[i+1] (starts [N+1] int64). labels [N] int32 or float32, or None."""

    input_ids: npt.NDArray[np.int32]
    token_type_ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    labels: npt.NDArray[Any] | None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(
        self, examples: Sequence[int] | npt.NDArray[np.int64], sample_keys: Sequence[int]
    ) -> Batch:
        """Packs `examples` in the given order; sample_keys[i] is the i-th one's identity."""
        index = np.asarray(examples, dtype=np.int64)
        begins = self.starts[index]
        lengths = self.starts[index + 1] - begins
        sequence_starts = np.zeros(len(index) + 1, dtype=np.int64)
        np.cumsum(lengths, out=sequence_starts[1:])
        total = int(sequence_starts[-1])
        tokens = np.arange(total) + np.repeat(begins - sequence_starts[:-1], lengths)
        batch: Batch = {
            "input_ids": self.input_ids[tokens],
            "token_type_ids": self.token_type_ids[tokens],
            "sequence_starts": sequence_starts.astype(np.int32),
            "sample_keys": np.asarray(sample_keys, dtype=np.int32),
        }
        if self.labels is not None:
            batch["labels"] = self.labels[index]
        return batch


def tokenize(
    examples: Examples, encoder: TextEncoder, communicator: Communicator, is_regression: bool
) -> TokenizedData:
    """Tokenizes this rank's share and exchanges it, so that every rank holds all examples."""
    mine = share(len(examples), communicator.rank, communicator.world_size)
    ids: list[npt.NDArray[np.int32]] = [np.zeros(0, np.int32)]
    type_ids: list[npt.NDArray[np.int32]] = [np.zeros(0, np.int32)]
    lengths: list[int] = []
    for begin in range(mine.start, mine.stop, ENCODE_CHUNK):
        chunk = slice(begin, min(begin + ENCODE_CHUNK, mine.stop))
        second = examples.second[chunk] if examples.second is not None else None
        for encoding in encoder.encode(examples.first[chunk], second):
            ids.append(np.asarray(encoding.ids, dtype=np.int32))
            type_ids.append(np.asarray(encoding.type_ids, dtype=np.int32))
            lengths.append(len(encoding.ids))
    arrays = gather_concatenated(
        communicator,
        {
            "ids": np.concatenate(ids),
            "type_ids": np.concatenate(type_ids),
            "lengths": np.asarray(lengths, dtype=np.int64),
        },
    )
    starts = np.zeros(len(examples) + 1, dtype=np.int64)
    np.cumsum(arrays["lengths"], out=starts[1:])
    labels: npt.NDArray[Any] | None = None
    if examples.labels is not None:
        labels = np.asarray(examples.labels, dtype=np.float32 if is_regression else np.int32)
    return TokenizedData(arrays["ids"], arrays["type_ids"], starts, labels)
