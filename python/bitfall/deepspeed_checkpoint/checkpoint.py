"""Reads a checkpoint that DeepSpeed wrote: stages 0 to 2, releases 0.6 to 0.19, without torch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bitfall._core import CheckpointError
from bitfall.deepspeed_checkpoint.fields import count, expect, field, items, plain
from bitfall.deepspeed_checkpoint.folder import (
    CheckpointFiles,
    checkpoint_files,
    checkpoint_folder,
)
from bitfall.deepspeed_checkpoint.optimizer_state import LossScale, TrainedState
from bitfall.deepspeed_checkpoint.stage_zero import read_whole_optimizer
from bitfall.deepspeed_checkpoint.tensors import StoredTensor
from bitfall.deepspeed_checkpoint.torch_file import TorchFile
from bitfall.deepspeed_checkpoint.zero_partitions import read_partitions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

# What DeepSpeed itself writes at the top of the model's file; everything else is client state.
OWN_KEYS = {
    "autoep_layers",
    "autotp_universal_checkpoint_info",
    "buffer_names",
    "checkpoint_parallel_dimensions",
    "csr_tensor_module_names",
    "data_sampler",
    "dp_world_size",
    "ds_config",
    "ds_version",
    "frozen_param_fragments",
    "frozen_param_shapes",
    "global_samples",
    "global_steps",
    "lr_scheduler",
    "module",
    "mp_world_size",
    "optimizer",
    "param_shapes",
    "random_ltd",
    "shared_params",
    "skipped_steps",
    "sparse_tensor_module_names",
    "universal_checkpoint_info",
}


@dataclass(frozen=True)
class DeepSpeedCheckpoint:
    """Everything of a DeepSpeed checkpoint that training goes on from.

    To apply it to an engine: copy `weights[name]` into the master of every parameter and buffer
    (the working weights follow from the masters), `exp_avg[name]` and `exp_avg_sq[name]` into the
    moments (zero where a name is missing: never updated), set Adam's step to `optimizer_step`, the
    counters to `global_steps` and `skipped_steps`, and give `lr_scheduler` to the scheduler's
    load_state_dict. `hyperparameters` is what the optimizer's param groups held (lr, betas ...), in
    the order of `parameter_groups`, the names that were trained.
    """

    folder: Path
    version: str  # of DeepSpeed
    weights: dict[str, NDArray[Any]]  # f32 masters; integer buffers keep their dtype
    parameter_groups: list[list[str]]
    exp_avg: dict[str, NDArray[np.float32]]
    exp_avg_sq: dict[str, NDArray[np.float32]]
    optimizer_step: int
    hyperparameters: list[dict[str, Any]]
    loss_scale: LossScale | None  # None for f32 and bf16 without a scaler
    lr_scheduler: dict[str, Any] | None
    global_steps: int
    global_samples: int
    skipped_steps: int
    client_state: dict[str, Any]


def read_deepspeed_checkpoint(
    directory: Path,
    tag: str | None = None,
    *,
    parameter_groups: Sequence[Sequence[str]] | None = None,
    optimizer_states: bool = True,
) -> DeepSpeedCheckpoint:
    """Reads DIRECTORY/TAG; the tag of DIRECTORY/latest for None. Runs no code of the files.

    `parameter_groups`: the parameter names of the live optimizer's groups, which checkpoints
    without ZeRO need where the order of the model does not tell them. Without `optimizer_states`
    moments, step, hyperparameters and loss scale are left out.

    Raises CheckpointError that names the file and what is wrong with it: missing ranks, damaged
    files, classes that are not DeepSpeed's own, sizes that do not add up.
    """
    files = checkpoint_files(checkpoint_folder(directory, tag))
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(TorchFile(files.model_states))
        content = expect(model.content, dict, "its content", model.path)
        module = _module(content, model.path)
        trained = _trained_state(files, content, module, parameter_groups, optimizer_states, stack)
        scheduler = plain(content.get("lr_scheduler"), "'lr_scheduler'", model.path)
        if scheduler is not None:
            expect(scheduler, dict, "'lr_scheduler'", model.path)
        client_state = {key: value for key, value in content.items() if key not in OWN_KEYS}
        return DeepSpeedCheckpoint(
            folder=files.folder,
            version=_version(content),
            weights=_weights(content, module, trained, model.path),
            parameter_groups=trained.groups,
            exp_avg=trained.exp_avg if optimizer_states else {},
            exp_avg_sq=trained.exp_avg_sq if optimizer_states else {},
            optimizer_step=trained.optimizer_step if optimizer_states else 0,
            hyperparameters=trained.hyperparameters if optimizer_states else [],
            loss_scale=trained.loss_scale if optimizer_states else None,
            lr_scheduler=scheduler,
            global_steps=count(content, "global_steps", model.path),
            global_samples=count(content, "global_samples", model.path),
            skipped_steps=count(content, "skipped_steps", model.path),
            client_state=plain(client_state, "the client state", model.path),
        )


def _version(content: dict[str, Any]) -> str:
    version = content.get("ds_version")
    return version[:40] if isinstance(version, str) else "unknown"


def _module(content: dict[str, Any], path: Path) -> dict[str, StoredTensor]:
    module = field(content, "module", dict, path)
    for name, tensor in module.items():
        expect(name, str, "a name in 'module'", path)
        expect(tensor, StoredTensor, f"'{name[:80]}'", path)
    return module


def _trained_state(
    files: CheckpointFiles,
    content: dict[str, Any],
    module: dict[str, StoredTensor],
    parameter_groups: Sequence[Sequence[str]] | None,
    optimizer_states: bool,
    stack: contextlib.ExitStack,
) -> TrainedState:
    path = files.model_states
    param_shapes = content.get("param_shapes")
    if files.optimizer_states:
        if param_shapes is None:
            raise CheckpointError(
                f"{files.optimizer_states[0]}: belongs to ZeRO, but {path.name} is of a run without"
                " it; two runs wrote into this folder, remove the files of one"
            )
        ranks = [stack.enter_context(TorchFile(file)) for file in files.optimizer_states]
        for rank in ranks:
            expect(rank.content, dict, "its content", rank.path)
        return read_partitions(ranks, param_shapes, path, optimizer_states)
    if param_shapes is not None:
        raise CheckpointError(
            f"{files.folder}: the optimizer's files (zero_pp_rank_0_mp_rank_00_optim_states.pt ..."
            " ) are missing, which hold the f32 weights; copy the files of all ranks"
        )
    optimizer = content.get("optimizer")
    if optimizer is None:
        return TrainedState([], {}, {}, {})
    expect(optimizer, dict, "'optimizer'", path)
    holds_masters = any(key in optimizer for key in ("fp32_groups", "fp32_groups_flat"))
    if not optimizer_states and not holds_masters:
        return TrainedState([], {}, {}, {})
    return read_whole_optimizer(
        optimizer, _parameters(content, module, path), parameter_groups, path
    )


def _parameters(
    content: dict[str, Any], module: dict[str, StoredTensor], path: Path
) -> dict[str, StoredTensor]:
    """The model's parameters in its order, tied ones once."""
    buffers = set(items(content.get("buffer_names") or [], str, "'buffer_names'", path))
    seen: set[Any] = set()
    parameters = {}
    for name, tensor in module.items():
        if name not in buffers and tensor.is_floating and tensor.place not in seen:
            parameters[name] = tensor
        seen.add(tensor.place)
    return parameters


def _weights(
    content: dict[str, Any],
    module: dict[str, StoredTensor],
    trained: TrainedState,
    path: Path,
) -> dict[str, NDArray[Any]]:
    """Masters for what was trained and for names tied to it, the model's values for the rest."""
    shared = expect(content.get("shared_params") or {}, dict, "'shared_params'", path)
    by_place = {
        module[name].place: array for name, array in trained.masters.items() if name in module
    }
    weights: dict[str, NDArray[Any]] = {}
    for name, tensor in module.items():
        source = name if name in trained.masters else shared.get(name, name)
        expect(source, str, f"'shared_params' of '{name[:80]}'", path)
        array = trained.masters.get(source, by_place.get(tensor.place))
        if array is None:
            array = by_place.setdefault(tensor.place, tensor.array())
        if array.shape != tensor.shape:
            raise CheckpointError(
                f"{path}: '{name[:80]}' is {list(tensor.shape)} in the model, but its master is"
                f" {list(array.shape)}; the files do not belong together"
            )
        weights[name] = array
    fragments = content.get("frozen_param_fragments") or {}
    expect(fragments, dict, "'frozen_param_fragments'", path)
    for name, tensor in fragments.items():
        if name not in weights:
            weights[name] = expect(tensor, StoredTensor, f"'{str(name)[:80]}'", path).array()
    return weights | {name: array for name, array in trained.masters.items() if name not in weights}
