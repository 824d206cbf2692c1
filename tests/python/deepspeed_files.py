"""Writes checkpoints in DeepSpeed's layout with torch.save, for stages 0 to 2.

The classes that DeepSpeed's pickles name are made here and exist only while a file is written.
"""

from __future__ import annotations

import argparse
import enum
import math
import sys
import types
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

DTYPES = {"f32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SHAPES = {
    "embed.weight": (11, 7),
    "norm.weight": (7,),
    "norm.bias": (7,),
    "hidden.weight": (5, 7),
    "hidden.bias": (5,),
}
FROZEN = {"adapter.weight": (7, 5)}
TIED = {"head.weight": "embed.weight"}
STEP, GLOBAL_STEPS, SKIPPED = 4, 5, 1


class LossScaler:
    def __init__(self, **state):
        self.__dict__.update(state)


class DynamicLossScaler(LossScaler):
    pass


class ZeroStageEnum(int, enum.Enum):
    optimizer_states = 1
    gradients = 2


@dataclass
class fragment_address:  # noqa: N801  (DeepSpeed's name)
    numel: int
    start: int


FOREIGN = {
    "deepspeed.runtime.fp16.loss_scaler": (LossScaler, DynamicLossScaler),
    "deepspeed.runtime.zero.config": (ZeroStageEnum,),
    "deepspeed.utils.tensor_fragment": (fragment_address,),
}


@contextmanager
def deepspeed_classes():
    """While it lasts, pickle finds DeepSpeed's classes under their own names."""
    saved, modules = dict(sys.modules), ["deepspeed", "deepspeed.runtime", "deepspeed.utils"]
    modules += ["deepspeed.runtime.fp16", "deepspeed.runtime.zero", *FOREIGN]
    for name in modules:
        sys.modules[name] = types.ModuleType(name)
    for name, classes in FOREIGN.items():
        for one in classes:
            one.__module__ = name
            setattr(sys.modules[name], one.__name__, one)
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules.update({name: saved[name] for name in modules if name in saved})


@dataclass
class Run:
    """One training whose checkpoint is written, and what it holds: arrays by parameter name."""

    stage: int = 1
    ranks: int = 1
    dtype: str = "f32"
    groups: int = 1
    old: bool = False  # as release 0.6 wrote it
    elastic: bool = False
    skipped_steps: int = SKIPPED
    optimizer: str = "fused"  # stage 0 in half precision: "fused" or "unfused"
    frozen: bool = True
    masters: dict = field(default_factory=dict)
    exp_avg: dict = field(default_factory=dict)
    exp_avg_sq: dict = field(default_factory=dict)
    module: dict = field(default_factory=dict)
    weight_decay: tuple = (0.0, 0.1)  # of each group
    step: int = STEP
    global_steps: int = GLOBAL_STEPS

    def __post_init__(self):
        generator = np.random.default_rng(5)
        if not self.masters:
            for name, shape in SHAPES.items():
                self.masters[name] = generator.normal(0, 1, shape).astype(np.float32)
                self.exp_avg[name] = generator.normal(0, 1, shape).astype(np.float32)
                self.exp_avg_sq[name] = generator.random(shape).astype(np.float32)
            self.module = self.make_module(generator)
        else:
            self.module = {name: self.half(array) for name, array in self.masters.items()}

    @property
    def shapes(self) -> dict:
        return {name: array.shape for name, array in self.masters.items()}

    def make_module(self, generator) -> dict:
        module = {name: self.half(array) for name, array in self.masters.items()}
        if self.frozen:
            for name, shape in FROZEN.items():
                module[name] = self.half(generator.normal(0, 1, shape).astype(np.float32))
        for name, source in TIED.items():
            module[name] = module[source]
        module["position_ids"] = torch.arange(6)
        module["scale"] = self.half(np.full(3, 1.5, np.float32))
        return module

    def half(self, array):
        return torch.from_numpy(array.copy()).to(DTYPES[self.dtype])

    @property
    def names(self) -> list[list[str]]:
        if self.groups == 1:
            return [list(self.shapes)]
        return [
            [name for name, shape in self.shapes.items() if len(shape) > 1],
            [name for name, shape in self.shapes.items() if len(shape) == 1],
        ]

    def expected_weights(self) -> dict:
        weights = {
            name: tensor.numpy() if tensor.dtype == torch.int64 else tensor.float().numpy()
            for name, tensor in self.module.items()
        }
        weights |= self.masters
        return weights | {name: self.masters[source] for name, source in TIED.items()}

    def write(self, directory: Path, tag: str = "global_step5") -> Path:
        folder = directory / tag
        folder.mkdir(parents=True)
        (directory / "latest").write_text(tag)
        with deepspeed_classes():
            torch.save(self.model_states(), folder / "mp_rank_00_model_states.pt")
            prefix = "bf16_" if self.dtype == "bf16" else ""
            for rank in range(self.ranks if self.stage > 0 else 0):
                name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
                torch.save(self.optimizer_states(rank), folder / name)
        return folder

    def model_states(self) -> dict:
        state = {
            "module": OrderedDict(self.module),
            "buffer_names": ["position_ids", "scale"],
            "optimizer": self.whole_optimizer() if self.stage == 0 else None,
            "param_shapes": None,
            "lr_scheduler": {"last_batch_iteration": self.global_steps - 1},
            "sparse_tensor_module_names": set(),
            "skipped_steps": self.skipped_steps,
            "global_steps": self.global_steps,
            "global_samples": 40,
            "dp_world_size": self.ranks,
            "mp_world_size": 1,
            "ds_config": {"train_batch_size": 8, "betas": (0.9, 0.999)},
            "ds_version": "0.6.7" if self.old else "0.19.6",
            "epoch": 3,
            "best": np.float64(0.75),
            "digest": b"\x00\xff",
            "random_state": torch.arange(4, dtype=torch.uint8),
            "args": argparse.Namespace(seed=42, device=torch.device("cpu")),
        }
        if self.stage > 0:
            state["param_shapes"] = [
                OrderedDict((name, torch.Size(self.shapes[name])) for name in names)
                for names in self.names
            ]
        if self.stage > 0 and not self.old:
            state["shared_params"] = {name: TIED[name] for name in TIED if name in self.module}
            frozen = {name: self.module[name] for name in FROZEN if name in self.module}
            frozen = frozen if self.stage == 2 else {}
            state["frozen_param_fragments"] = OrderedDict(frozen)
        return state

    def flat(self, arrays: dict, group: int):
        parts = [torch.from_numpy(arrays[name]).reshape(-1) for name in self.names[group]]
        return torch.cat(parts)

    def slice(self, arrays: dict, group: int, rank: int, padded: bool):
        """The part of `rank` of a group's flat buffer, which is padded to 2 elements per rank."""
        flat = self.flat(arrays, group)
        alignment = 2 * self.ranks
        size = math.ceil(flat.numel() / alignment) * alignment // self.ranks
        begin = min(rank * size, flat.numel())
        part = flat[begin : begin + size].clone()
        if padded:
            part = torch.cat([part, torch.zeros(size - part.numel())])
        return part

    def optimizer_states(self, rank: int) -> dict:
        states = [
            {
                "step": torch.tensor(float(self.step)),
                "exp_avg": self.slice(self.exp_avg, group, rank, not self.elastic),
                "exp_avg_sq": self.slice(self.exp_avg_sq, group, rank, not self.elastic),
            }
            for group in range(len(self.names))
        ]
        hyperparameters = [
            {
                "lr": 0.01,
                "betas": (0.9, 0.999),
                "weight_decay": self.weight_decay[group],
                "params": [group],
            }
            for group in range(len(self.names))
        ]
        base = {"state": dict(enumerate(states)), "param_groups": hyperparameters}
        scaler = DynamicLossScaler if self.dtype == "fp16" else LossScaler
        stage = 2 if self.old else ZeroStageEnum(self.stage)
        state = {
            "loss_scaler": scaler(
                cur_scale=512.0 if self.dtype == "fp16" else 1.0,
                cur_iter=6, last_overflow_iter=2, cur_hysteresis=1,
            ),
            "dynamic_loss_scale": self.dtype == "fp16",
            "overflow": False,
            "clip_grad": 1.0,
            "base_optimizer_state": states if self.elastic else base,
            "single_partition_of_fp32_groups": [
                self.slice(self.masters, group, rank, padded=False).requires_grad_()
                for group in range(len(self.names))
            ],
            "zero_stage": stage,
            "partition_count": [self.ranks] * len(self.names) if not self.old else self.ranks,
            "param_slice_mappings": [OrderedDict(a=fragment_address(numel=3, start=0))],
        }  # fmt: skip
        return {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.6"}

    def whole_optimizer(self) -> dict:
        fused = self.dtype != "f32" and self.optimizer == "fused"
        states, groups = {}, []
        for group, names in enumerate(self.names):
            pieces = [names] if fused else [[name] for name in names]
            first = len(states)
            for piece in pieces:
                moments = {
                    key: self.flat(arrays, group)
                    if fused
                    else torch.from_numpy(arrays[piece[0]].copy())
                    for key, arrays in (("exp_avg", self.exp_avg), ("exp_avg_sq", self.exp_avg_sq))
                }
                states[len(states)] = {"step": self.step, **moments}
            numbers = {"lr": 0.01, "weight_decay": self.weight_decay[group]}
            groups.append({**numbers, "params": list(range(first, len(states)))})
        base = {"state": states, "param_groups": groups}
        if self.dtype == "f32":
            return base
        wrapped = {
            "dynamic_loss_scale": self.dtype == "fp16",
            "cur_scale": 512.0,
            "cur_iter": 6,
            "last_overflow_iter": 2,
            "optimizer_state_dict": base,
        }
        if fused:
            wrapped["fp32_groups_flat"] = [
                self.flat(self.masters, group) for group in range(len(self.names))
            ]
        else:
            wrapped["fp32_groups"] = [
                [torch.from_numpy(self.masters[name]) for name in names] for names in self.names
            ]
        return wrapped
