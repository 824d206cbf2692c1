"""Run by test_bridge_zero.py on every rank: trains one module at ZeRO stages 0, 1 and 2.

Prints from rank 0, for each setting and stage, the largest difference of a weight from stage 0.
"""

from __future__ import annotations

import json
from typing import Any

import bitfall
import torch
from bitfall import _core
from bridge_models import CONFIG, FP16_ON_CPU, batches, tiny

SETTINGS: dict[str, dict[str, Any]] = {
    "f32": {},
    "bf16": {"bf16": {"enabled": True}},
    "accumulated": {"gradient_accumulation_steps": 3},
    "quantized": {
        "fp16": {"enabled": FP16_ON_CPU, "initial_scale_power": 8},
        "quantize_training": {
            "enabled": True,
            "quantize_bits": {"start_bits": 8, "target_bits": 6},
            "quantize_schedule": {"quantize_period": 1, "schedule_offset": 0},
            "quantize_groups": 4,
        },
    },
}


def trained_weights(stage: int, changes: dict[str, Any], rank: int) -> torch.Tensor:
    model = tiny(seed=rank)  # the weights of rank 0 count
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}}
    config = {**CONFIG, "optimizer": optimizer, "zero_optimization": {"stage": stage}, **changes}
    engine = bitfall.initialize(model=model, config=config)[0]
    for number, batch in enumerate(batches(12, seed=rank)):
        torch.manual_seed(100 * number + rank)  # dropout
        engine.backward(engine(*batch))
        engine.step()
    assert engine.global_steps == 12 // config["gradient_accumulation_steps"]
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def main() -> None:
    rank = _core.make_communicator().rank
    differences = {}
    for name, changes in SETTINGS.items():
        expected = trained_weights(0, changes, rank)
        for stage in (1, 2):
            weights = trained_weights(stage, changes, rank)
            differences[f"{name} {stage}"] = float((weights - expected).abs().max())
        differences[f"{name} moved"] = float((expected - trained_start(expected)).abs().max())
    if rank == 0:
        print(json.dumps(differences))


def trained_start(like: torch.Tensor) -> torch.Tensor:
    """The weights that training began with."""
    start = torch.cat([p.detach().flatten() for p in tiny(seed=0).parameters()])
    return start.reshape(like.shape)


main()
