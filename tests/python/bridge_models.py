"""Small torch modules, their batches, and plain PyTorch training to compare the bridge with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
}


def _computes_in_fp16() -> bool:
    try:
        nn.functional.dropout(torch.ones(1, 1).half() @ torch.ones(1, 1).half())
    except RuntimeError:
        return False
    return True


FP16_ON_CPU = _computes_in_fp16()
needs_fp16 = pytest.mark.skipif(not FP16_ON_CPU, reason="this PyTorch has no fp16 on CPUs")


class Block(nn.Module):
    """A residual layer with a matrix, a bias and a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + torch.tanh(self.dense(x)))


class Tiny(nn.Module):
    """Embedding, blocks, a head tied to the embedding; returns the loss."""

    def __init__(self, width: int = 16, vocabulary: int = 24, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.unused = nn.Linear(width, 3)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.embed.weight
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("shift", torch.full((width,), 0.1))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.embed(ids)) + self.shift
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x.mean(1))
        return nn.functional.cross_entropy(logits.float(), labels)


def tiny(seed: int = 0, **arguments: Any) -> Tiny:
    torch.manual_seed(seed)
    return Tiny(**arguments)


def batches(count: int, size: int = 4, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids [size, 5], labels [size]) for Tiny; the label is in the ids, so that it can learn."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(24, (count, size, 5), generator=generator)
    return [(row, row[:, 0]) for row in ids]


def plain_gradients(
    model: nn.Module, micro_batches: list[tuple[Any, ...]]
) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss by PyTorch alone, on a copy of the model."""
    model = copy.deepcopy(model)
    for batch in micro_batches:
        (model(*batch) / len(micro_batches)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
