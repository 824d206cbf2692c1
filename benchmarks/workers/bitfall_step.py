"""Worker: one training step of bitfall on full-length random tokens."""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from bitfall import _core
from protocol import resident_bytes, serve

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--dtype", choices=["f32", "bf16", "f16"], default="f32")
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--length", type=int, default=128)
parser.add_argument(
    "--bits", type=int, default=0, help="0: no quantization, otherwise MoQ at this width"
)
args = parser.parse_args()

config = {
    "train_micro_batch_size_per_gpu": args.batch,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-5, "weight_decay": 0.01}},
    "gradient_clipping": 1.0,
    "bf16": {"enabled": args.dtype == "bf16"},
    "fp16": {"enabled": args.dtype == "f16"},
}
if args.bits:
    config["quantize_training"] = {
        "enabled": True,
        "quantize_bits": {"start_bits": args.bits, "target_bits": args.bits},
        "quantize_schedule": {"quantize_period": 10, "schedule_offset": 0},
        "quantize_groups": 8,
    }
base_bytes = resident_bytes()
flags = {"bitfall.num_training_steps": {"flag": "", "json": "100000", "given": False}}
engine = _core.Engine(
    args.model,
    "classification",
    2,
    _core.parse_config(json.dumps(config), "benchmark", flags),
    _core.make_communicator(),
)
generator = np.random.default_rng(0)
batch: _core.Batch = {
    "input_ids": generator.integers(1000, 30000, args.batch * args.length).astype(np.int32),
    "sequence_starts": np.arange(args.batch + 1, dtype=np.int32) * args.length,
    "sample_keys": np.arange(args.batch, dtype=np.int32),
    "labels": generator.integers(0, 2, args.batch).astype(np.int32),
}


def step() -> dict[str, float]:
    begin = time.perf_counter()
    engine.train_batch([batch])
    return {"seconds": time.perf_counter() - begin, "base_bytes": base_bytes}


for _ in range(2):
    step()
serve(step)
