"""Configs, a batch and an engine on the tiny BERT, for tests of the compiled module itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_core = pytest.importorskip("bitfall._core", reason="the C++ module is not built")

QUANTIZE = {
    "enabled": True,
    "quantize_bits": {"start_bits": 10, "target_bits": 4},
    "quantize_schedule": {"quantize_period": 1, "schedule_offset": 0},
    "quantize_groups": 4,
}
EIGENVALUE = {"enabled": True, "tol": 1e-2, "max_iter": 100, "stability": 1e-6}


def completed(**sections: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        **sections,
    }
    flags = {"bitfall.num_training_steps": {"flag": "", "json": "100", "given": False}}
    return _core.parse_config(json.dumps(config), "test.json", flags)


def make_batch(num_labels: int = 2) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)
    starts = np.array([0, 5, 8, 15, 19], np.int32)
    return {
        "input_ids": generator.integers(0, 24, starts[-1]).astype(np.int32),
        "sequence_starts": starts,
        "sample_keys": np.arange(4, dtype=np.int32),
        "labels": (np.arange(4) % num_labels).astype(np.int32),
    }


def make_engine(model_dir: Path, head: str = "classification", **sections: Any) -> Any:
    num_labels = {"classification": 2, "regression": 1, "span": 2}[head]
    config = completed(**sections)
    return _core.Engine(str(model_dir), head, num_labels, config, _core.make_communicator())
