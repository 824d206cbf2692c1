"""MoQ written out plainly from its published formulas, to compare the engine with.

`fake_quantize` and `DocumentedClock` transcribe what bitfall promises; `deepspeed_*` and
`DeepSpeedCounter` what the DeepSpeed releases 0.6 (schedule) and 0.7 (arithmetic) computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def uniform_group(group: Floats, bits: int, q_type: str) -> Floats:
    """One group of at least two distinct values, 3 to 15 bits, rounded to nearest."""
    levels = np.float32(2**bits)
    if q_type == "symmetric":
        scale = np.float32(2) * np.abs(group).max() / levels
        codes = np.clip(np.rint(group / scale), -levels / 2, levels / 2 - 1)
        return codes * scale
    scale = (group.max() - group.min()) / levels
    zero_point = np.rint(group.min() / scale)
    codes = np.clip(np.rint(group / scale) - zero_point, 0, levels - 1)
    return (codes + zero_point) * scale


def sign_group(group: Floats, bits: int) -> npt.NDArray[np.float64]:
    """Ternary (2 bits) and binary (1 bit) weights, sums in f64."""
    sizes = np.abs(group).astype(np.float64)
    if bits == 1:
        return np.sign(group) * sizes.mean()
    above = sizes > 0.7 * sizes.mean()
    scale = sizes[above].mean() if above.any() else 0.0
    return np.where(above, np.sign(group) * scale, 0.0)


def fake_quantize(array: Floats, bits: int, groups: int, q_type: str) -> npt.NDArray[np.float64]:
    """Every group of the flattened array, in f64 with f32 values where bits > 2."""
    parts = []
    for group in array.reshape(groups, -1):
        if group.min() == group.max():
            parts.append(group.astype(np.float64))
        elif bits <= 2:
            parts.append(sign_group(group, bits))
        else:
            parts.append(uniform_group(group, bits, q_type).astype(np.float64))
    return np.concatenate(parts).reshape(array.shape)


def deepspeed_symmetric(group: Floats, bits: int) -> Floats:
    """DeepSpeed 0.7 and later, compression/utils.py, its torch path."""
    scale = 2 * max(abs(group.min()), abs(group.max())) / np.float32(2**bits)
    return np.clip(np.rint(group / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def deepspeed_asymmetric(group: Floats, bits: int) -> Floats:
    """The same for asymmetric quantization: the zero point is a value, not an integer."""
    scale = (group.max() - group.min()) / np.float32(2**bits)
    zero_point = np.rint(group.min() / scale) * scale
    return np.clip(np.rint((group - zero_point) / scale), 0, 2**bits - 1) * scale + zero_point


@dataclass
class State:
    """Width and next threshold of one block."""

    bits: int
    target_bits: int
    period: int
    factor: int = 1
    drops: list[tuple[int, int]] = field(default_factory=list)

    def visit(self, ticks: int, step: int) -> None:
        """Quantizes once: begins at start_bits, or loses one bit first."""
        if not self.drops:
            self.drops.append((self.bits, step))
        if self.bits > self.target_bits and ticks >= self.period:
            self.bits -= 1
            self.period *= 2 * self.factor
            self.drops.append((self.bits, step))


def documented_clock(state: State, offset: int, steps: int) -> list[tuple[int, int]]:
    """One tick per step; quantization begins in the step after `offset`."""
    for step in range(offset + 1, steps + 1):
        state.visit(step - offset, step)
    return state.drops


def deepspeed_counter(
    state: State, offset: int, steps: int, layer_num: int
) -> list[tuple[int, int]]:
    """DeepSpeed 0.6, runtime/quantize.py, with at most one drop per step."""
    qsteps = 0
    for step in range(1, steps + 1):
        qsteps += 6 * max(layer_num, 1)
        if offset > 0:
            if qsteps < offset:
                continue
            offset = 0
            qsteps = 0
        state.visit(qsteps, step)
    return state.drops


def factor_of(eigenvalue: float) -> int:
    """What a normalized eigenvalue stretches a period by."""
    return 1 + math.floor(4 * eigenvalue)
