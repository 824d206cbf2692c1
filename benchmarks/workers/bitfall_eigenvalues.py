"""Worker: bitfall's eigenvalues of all layers, computed in a training step that drops a bit."""

from __future__ import annotations

import argparse
import json

import numpy as np
from bitfall import _core
from protocol import serve

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--save", required=True, help="folder for the model with its head")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--length", type=int, default=64)
args = parser.parse_args()

config = {
    "train_micro_batch_size_per_gpu": args.batch,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-5}},
    "quantize_training": {
        "enabled": True,
        "quantize_bits": {"start_bits": 16, "target_bits": 8},
        "quantize_schedule": {"quantize_period": 1, "schedule_offset": 0},
        "eigenvalue": {"enabled": True, "tol": 1e-2, "max_iter": 100, "stability": 1e-6},
    },
}
flags = {"bitfall.num_training_steps": {"flag": "", "json": "100", "given": False}}
completed = _core.parse_config(json.dumps(config), "benchmark", flags)
communicator = _core.make_communicator()
generator = np.random.default_rng(0)
batch: _core.Batch = {
    "input_ids": generator.integers(1000, 30000, args.batch * args.length).astype(np.int32),
    "sequence_starts": np.arange(args.batch + 1, dtype=np.int32) * args.length,
    "sample_keys": np.arange(args.batch, dtype=np.int32),
    "labels": (np.arange(args.batch) % 2).astype(np.int32),
}


def make_engine() -> _core.Engine:
    return _core.Engine(args.model, "classification", 2, completed, communicator)


def measure() -> dict[str, object]:
    """A new engine each time: the first step is the one that drops."""
    engine = make_engine()
    engine.timings()
    result = engine.train_batch([batch])
    eigenvalues = result["eigenvalues"]
    return {
        "seconds": engine.timings()["eigenvalues"],
        "seed": completed.seed,
        "step": result["step"],
        "values": [entry["value"] for entry in eigenvalues],
        "iterations": [entry["iterations"] for entry in eigenvalues],
        "products": [entry["products"] for entry in eigenvalues],
    }


make_engine().save_model(args.save, "master")
measure()
serve(measure)
