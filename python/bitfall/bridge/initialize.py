"""`bitfall.initialize`: DeepSpeed's signature, a DeepSpeedEngine behind it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from bitfall import _core
from bitfall.bridge import layout
from bitfall.bridge.config import read_config
from bitfall.bridge.engine import DeepSpeedEngine
from bitfall.bridge.lr_schedule import make_schedule
from bitfall.bridge.optimizer import NUMBERS, FusedAdam, parameter_groups
from bitfall.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,  # noqa: ARG001
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,  # noqa: ARG001
    lr_scheduler: Any = None,
    distributed_port: int | None = None,  # noqa: ARG001
    mpu: Any = None,  # noqa: ARG001
    dist_init_required: bool | None = None,  # noqa: ARG001
    collate_fn: Any = None,  # noqa: ARG001
    config: dict[str, Any] | str | Path | None = None,
    mesh_param: Any = None,  # noqa: ARG001
    config_params: dict[str, Any] | str | Path | None = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """(engine, optimizer, training dataloader, lr_scheduler) for any torch module."""
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"initialize(model={type(model).__name__}): expected a torch.nn.Module")
    given = config if config is not None else config_params
    given = given if given is not None else getattr(args, "deepspeed_config", None)
    if given is None:
        raise InputError("initialize: no config; pass config=<dict or path>")
    communicator = _core.make_communicator()
    completed = read_config(given, communicator.world_size)
    layout.check_dtypes(model, completed.compute_dtype)
    defaults = json.loads(completed.json)["optimizer"]["params"]
    groups = parameter_groups(model, model_parameters, {name: defaults[name] for name in NUMBERS})
    wanted = {parameter for group in groups for parameter in group["params"]}
    trained = layout.arrange(model, wanted, None, [])
    positions = {entry.parameter: index for index, entry in enumerate(trained)}

    def fill(index: int, master: Any) -> None:
        torch.from_dlpack(master).copy_(trained[index].parameter.detach())

    numbers = [
        {
            **{name: group[name] for name in NUMBERS},
            "parameters": sorted(positions[p] for p in group["params"] if p in positions),
        }
        for group in groups
    ]
    updater = _core.Updater(layout.specs(trained), completed, communicator, numbers, fill)
    layout.convert(model, layout.torch_dtype(completed.compute_dtype), trained)
    engine = DeepSpeedEngine(model, trained, updater, completed, communicator)
    engine.optimizer = FusedAdam(groups, engine.take_step)
    engine.lr_scheduler = make_schedule(lr_scheduler, engine.optimizer, completed)
    return engine, engine.optimizer, None, engine.lr_scheduler
