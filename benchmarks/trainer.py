"""Hugging Face's Trainer under `bitfall run`, natively run and in PyTorch, beside plain python."""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from results import Result
from workers.protocol import WORKERS, Worker, median_ratio, paired_seconds

TARGETS = {True: 2.5, False: 0.98}
ROUNDS = 5
STEPS = 4
CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 0},
    "quantize_training": {
        "enabled": True,
        "quantize_bits": {"start_bits": 16, "target_bits": 8},
        "quantize_schedule": {"quantize_period": 400, "schedule_offset": 0},
        "quantize_groups": 8,
    },
}


def start(model: str, glue_dir: Path, config: Path | None) -> Worker:
    launcher = [] if config is None else ["-m", "bitfall", "run"]
    command = [sys.executable, *launcher, str(WORKERS / "hf_trainer.py"), "--model", model]
    command += ["--data_dir", str(glue_dir / "MRPC"), "--steps", str(STEPS)]
    return Worker(command if config is None else [*command, "--deepspeed", str(config)])


def write_config(folder: Path, native_encoder: bool) -> Path:
    config: dict[str, Any] = CONFIG | {"bitfall": {"native_encoder": native_encoder}}
    path = folder / f"native_{native_encoder}.json"
    path.write_text(json.dumps(config))
    return path


def run(model: str, glue_dir: Path) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        configs = {native: write_config(Path(folder), native) for native in TARGETS}
        peer = start(model, glue_dir, None)
        ours = {native: start(model, glue_dir, config) for native, config in configs.items()}
        workers = [peer, *ours.values()]
        peer_seconds, *our_seconds = paired_seconds(workers, ROUNDS)
        for worker in workers:
            worker.close()
    return [
        Result(
            f"Trainer under bitfall, native encoder {'on' if native else 'off'}, beside without",
            median_ratio(peer_seconds, seconds),
            TARGETS[native],
            f"{32 * STEPS / median(seconds):.1f} samples/s"
            f" beside {32 * STEPS / median(peer_seconds):.1f}",
        )
        for native, seconds in zip(ours, our_seconds, strict=True)
    ]
