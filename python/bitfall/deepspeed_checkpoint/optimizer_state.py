"""Adam's moments, step and hyperparameters in the state_dict of a torch optimizer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING, Any

from bitfall._core import CheckpointError
from bitfall.deepspeed_checkpoint.fields import expect, field, items, plain
from bitfall.deepspeed_checkpoint.pickle_machine import Inert
from bitfall.deepspeed_checkpoint.tensors import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"
MAX_LOSS_SCALE = 2.0**127


@dataclass(frozen=True)
class LossScale:
    """DeepSpeed's loss scaler; `hysteresis` is None where the file does not hold it (stage 0)."""

    dynamic: bool
    scale: float
    iteration: int
    last_overflow_iteration: int
    hysteresis: int | None


@dataclass(frozen=True)
class TrainedState:
    """What the optimizer's part of a checkpoint says, by parameter name; arrays are f32.

    `groups` are the names of each param group in the optimizer's order, `hyperparameters` what the
    group's dict held beside them (lr, betas, weight_decay ...).
    """

    groups: list[list[str]]
    masters: dict[str, NDArray[np.float32]]
    exp_avg: dict[str, NDArray[np.float32]]
    exp_avg_sq: dict[str, NDArray[np.float32]]
    optimizer_step: int = 0
    hyperparameters: list[dict[str, Any]] = dataclass_field(default_factory=list)
    loss_scale: LossScale | None = None


def tensor_states(state_dict: Any, path: Path) -> list[list[dict[str, Any]]]:
    """The state of every tensor of every param group; {} for tensors that were never updated.

    `state_dict` is that of a torch optimizer, or the list that ZeRO's elastic checkpoints hold, one
    state per group.
    """
    if isinstance(state_dict, list):
        return [[state] for state in items(state_dict, dict, "'base_optimizer_state'", path)]
    states = field(state_dict, "state", dict, path)
    return [
        [
            expect(states.get(index, {}), dict, f"the optimizer state of tensor {index}", path)
            for index in items(field(group, "params", list, path), int, "'params'", path)
        ]
        for group in param_groups(state_dict, path)
    ]


def param_groups(state_dict: Any, path: Path) -> Sequence[dict[str, Any]]:
    """The param groups of a torch optimizer's state_dict; none in an elastic checkpoint."""
    if isinstance(state_dict, list):
        return []
    return items(field(state_dict, "param_groups", list, path), dict, "'param_groups'", path)


def hyperparameters(state_dict: Any, path: Path) -> list[dict[str, Any]]:
    """What each param group holds beside its tensors."""
    return [
        {
            key: plain(value, "'param_groups'", path)
            for key, value in group.items()
            if key != "params"
        }
        for group in param_groups(state_dict, path)
    ]


def moment(state: dict[str, Any], key: str, path: Path) -> StoredTensor | None:
    """exp_avg or exp_avg_sq of one tensor; None if it was never updated.

    Raises CheckpointError for the state of another optimizer than Adam.
    """
    if not set(state) - {"step"}:
        return None
    if key not in state:
        raise CheckpointError(
            f"{path}: the optimizer state holds {', '.join(sorted(map(str, state)))[:80]}, not"
            " Adam's exp_avg and exp_avg_sq; load without optimizer states"
        )
    return expect(state[key], StoredTensor, f"'{key}'", path)


def optimizer_step(state_dict: Any, elastic_step: Any, path: Path) -> int:
    """Updates so far, which Adam's bias correction counts: in the states or in the param groups."""
    found = [group["step"] for group in param_groups(state_dict, path) if "step" in group]
    for group in tensor_states(state_dict, path):
        found += [state["step"] for state in group if "step" in state]
    if elastic_step is not None:
        found.append(elastic_step)
    steps = {_integer(step, path) for step in found}
    if len(steps) > 1:
        warnings.warn(
            f"{path}: parameters have been updated {min(steps)} to {max(steps)} times; all go on"
            f" from step {max(steps)}",
            stacklevel=2,
        )
    return max(steps, default=0)


def _integer(step: Any, path: Path) -> int:
    value = step.array().item() if isinstance(step, StoredTensor) and step.numel == 1 else step
    if not isinstance(value, (int, float)) or value != int(value) or not 0 <= value < 2**62:
        raise CheckpointError(f"{path}: the optimizer's step is not a natural number")
    return int(value)


def loss_scale_of_scaler(scaler: Any, path: Path) -> LossScale | None:
    """From the LossScaler object of ZeRO's state; None where there is none."""
    if scaler is None:
        return None
    state = expect(expect(scaler, Inert, "'loss_scaler'", path).state, dict, "'loss_scaler'", path)
    return loss_scale_of_fields(
        state, scaler.class_name.endswith("DynamicLossScaler"), state.get("cur_hysteresis"), path
    )


def loss_scale_of_fields(
    state: dict[str, Any], dynamic: bool, hysteresis: Any, path: Path
) -> LossScale:
    """From cur_scale, cur_iter and last_overflow_iter. Raises CheckpointError for other types."""
    scale = state.get("cur_scale")
    if not isinstance(scale, (int, float)) or not 0 < scale < MAX_LOSS_SCALE:
        raise CheckpointError(f"{path}: 'cur_scale' is not a number above 0")
    iteration = expect(state.get("cur_iter", 0), int, "'cur_iter'", path)
    overflow = expect(state.get("last_overflow_iter", -1), int, "'last_overflow_iter'", path)
    if hysteresis is not None:
        expect(hysteresis, int, "'cur_hysteresis'", path)
    return LossScale(dynamic, float(scale), iteration, overflow, hysteresis)
