"""Worker: the same step on every rank; rank 0 listens and tells the others when to measure."""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np
from bitfall import _core

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--dtype", default="f32")
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--length", type=int, default=128)
args = parser.parse_args()

communicator = _core.make_communicator()
config = {
    "train_micro_batch_size_per_gpu": args.batch,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-5}},
    "gradient_clipping": 1.0,
    "bf16": {"enabled": args.dtype == "bf16"},
}
flags: dict[str, _core.FlagValue] = {
    "bitfall.world_size": {"flag": "", "json": str(communicator.world_size), "given": False},
    "bitfall.num_training_steps": {"flag": "", "json": "100000", "given": False},
}
engine = _core.Engine(
    args.model,
    "classification",
    2,
    _core.parse_config(json.dumps(config), "benchmark", flags),
    communicator,
)
generator = np.random.default_rng(communicator.rank)
batch: _core.Batch = {
    "input_ids": generator.integers(1000, 30000, args.batch * args.length).astype(np.int32),
    "sequence_starts": np.arange(args.batch + 1, dtype=np.int32) * args.length,
    "sample_keys": np.arange(args.batch, dtype=np.int32) + communicator.rank * args.batch,
    "labels": generator.integers(0, 2, args.batch).astype(np.int32),
}
engine.train_batch([batch])
if communicator.rank == 0:
    print(json.dumps({"ready": True}), flush=True)
while True:
    line = sys.stdin.readline() if communicator.rank == 0 else ""
    if not communicator.broadcast(line.encode()):
        break
    begin = time.perf_counter()
    engine.train_batch([batch])
    communicator.barrier()
    if communicator.rank == 0:
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)
