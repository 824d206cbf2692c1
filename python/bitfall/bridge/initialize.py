"""`bitfall.initialize`: DeepSpeed's signature, a DeepSpeedEngine behind it."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitfall import _core
from bitfall.bridge import layout, native_encoder, placement
from bitfall.bridge.announcement import Announcer
from bitfall.bridge.config import has_section, read_config
from bitfall.bridge.engine import DeepSpeedEngine
from bitfall.bridge.gradients import Gradients
from bitfall.bridge.lr_schedule import make_schedule
from bitfall.bridge.native_gradients import NativeGradients
from bitfall.bridge.optimizer import (
    NUMBERS,
    ClientOptimizer,
    FusedAdam,
    engine_can_run,
    parameter_groups,
    section_of,
)
from bitfall.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bitfall.bridge.layout import Trained

_engines: weakref.WeakSet[DeepSpeedEngine] = weakref.WeakSet()


def initialize(
    args: Any = None,
    model: torch.nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,  # noqa: ARG001
    mpu: Any = None,
    dist_init_required: bool | None = None,  # noqa: ARG001
    collate_fn: Any = None,
    config: dict[str, Any] | str | Path | None = None,
    mesh_param: Any = None,
    config_params: dict[str, Any] | str | Path | None = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]:
    """Trains `model` with DeepSpeed's interface; returns (engine, optimizer, training dataloader or
    None, lr_scheduler or None). Every rank calls it with the same arguments.

    The model moves to the device that placement.choose() says, and its parameters there into the
    engine's memory, in the precision of the config. The engine's Adam updates them, or `optimizer`,
    any torch optimizer or a function that makes one of the parameters. Without an optimizer here
    and in the config the engine only evaluates. `lr_scheduler` is a scheduler, or a function that
    makes one of the optimizer.

    Raises ConfigError for the config, InputError for other arguments, UsageError for a model that
    another engine trains.
    """
    model = _check_model(model)
    if mpu is not None or mesh_param is not None:
        raise InputError("initialize: no tensor or pipeline parallelism; leave mpu, mesh_param out")
    given = next((c for c in (config, config_params) if c is not None), None)
    given = given if given is not None else getattr(args, "deepspeed_config", None)
    if given is None:
        raise InputError("initialize: no config; pass config=, a dict or the path of a JSON file")
    communicator = _core.make_communicator()
    if callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer(model_parameters if model_parameters is not None else parameters)
    section = section_of(optimizer) if engine_can_run(optimizer) else None
    completed = read_config(given, communicator.world_size, section)
    in_config = has_section(completed, "optimizer")
    layout.check_devices(model)
    layout.check_dtypes(model, completed.compute_dtype)
    place = placement.choose(args, communicator)
    engine = DeepSpeedEngine(model, completed, communicator, place)
    if optimizer is not None or in_config:
        adopted = section is not None and not in_config
        _Builder(engine, optimizer, adopted, model_parameters).build()
        engine.lr_scheduler = make_schedule(lr_scheduler, engine.optimizer, completed)
    else:
        layout.convert(model, place.device, layout.torch_dtype(completed.compute_dtype), [])
    if training_data is not None:
        engine.training_dataloader = engine.deepspeed_io(training_data, collate_fn=collate_fn)
    _engines.add(engine)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _check_model(model: Any) -> torch.nn.Module:
    if isinstance(model, DeepSpeedEngine):
        raise UsageError("initialize(model): this is an engine already; pass the model itself")
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"initialize(model={type(model).__name__}): expected a torch.nn.Module")
    parameters = set(model.parameters())
    if any(entry.parameter in parameters for engine in _engines for entry in engine.trained):
        raise UsageError(
            "initialize(model): another engine trains this model, or a part of it; call its"
            " destroy() first, or make a new model"
        )
    return model


class _Builder:
    """Puts together what trains the module of an engine."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        client: torch.optim.Optimizer | None,
        adopted: bool,
        model_parameters: Iterable[Any] | None,
    ) -> None:
        """`adopted`: the engine's Adam takes the place of `client` in its param_groups."""
        self.engine, self.module = engine, engine.module
        self.config = engine.completed_config
        self.client = client if not adopted else None
        if client is not None and not isinstance(client, torch.optim.Optimizer):
            raise InputError(
                f"initialize(optimizer={type(client).__name__}): expected a torch.optim.Optimizer"
            )
        if isinstance(client, torch.optim.LBFGS):
            raise InputError(
                "initialize(optimizer=LBFGS): it calls the model again, which an engine"
                " cannot; choose another optimizer"
            )
        if client is not None:
            self.groups = client.param_groups
        else:
            defaults = engine.config["optimizer"]["params"]
            self.groups = parameter_groups(
                self.module, model_parameters, {name: defaults[name] for name in NUMBERS}
            )
        self.on_destroy: list[Any] = []

    def build(self) -> None:
        config, engine = self.config, self.engine
        reason = self._why_not_native()
        trained = self._arrange(native=reason is None)
        updater = _core.Updater(
            layout.specs(trained),
            config,
            engine.communicator,
            self._group_numbers(trained),
            layout.block_names(trained),
            engine.placement.core,
            lambda index, master: torch.from_dlpack(master).copy_(
                trained[index].parameter.detach()
            ),
        )
        dtype = layout.torch_dtype(config.compute_dtype)
        layout.convert(self.module, engine.placement.device, dtype, trained)
        for entry, capsule in zip(trained, updater.working(), strict=True):
            entry.parameter.data = torch.from_dlpack(capsule)
            entry.parameter.grad = None
        gradients = self._gradients(updater, trained, native=reason is None)
        optimizer = self._optimizer(updater, trained)
        announcer = Announcer(config, engine.communicator.rank)
        runs = "native encoder" if reason is None else f"PyTorch runs the model ({reason})"
        name = type(self.client).__name__ if self.client is not None else "engine's Adam"
        announcer.start(updater, trained, runs, name, engine.communicator.world_size)
        engine.attach(updater, trained, gradients, optimizer, announcer, self.on_destroy)

    def _arrange(self, native: bool) -> list[Trained]:
        wanted = {parameter for group in self.groups for parameter in group["params"]}
        places = native_encoder.parameter_layout(self.module) if native else []
        trained = layout.arrange(self.module, wanted, self._layer_name(), places)
        if not trained:
            raise InputError("initialize: no parameter of the model requires a gradient")
        return trained

    def _layer_name(self) -> str | None:
        """Of the config, checked against the module, if eigenvalues are on."""
        if not self.config.eigenvalue_enabled:
            return None
        names = [name for name, _ in self.module.named_parameters()]
        return layout.check_layers(names, layout.eigenvalue_section(self.engine.config))

    def _group_numbers(self, trained: Sequence[Trained]) -> list[dict[str, Any]] | None:
        """As _core.Updater takes them; None if the client updates."""
        if self.client is not None:
            return None
        positions = {entry.parameter: index for index, entry in enumerate(trained)}
        return [
            {
                **{name: group[name] for name in NUMBERS},
                "parameters": sorted(positions[p] for p in group["params"] if p in positions),
            }
            for group in self.groups
        ]

    def _why_not_native(self) -> str | None:
        """Why PyTorch runs the model; None if the native encoder does."""
        if not self.engine.config.get("bitfall", {}).get("native_encoder", True):
            return "bitfall.native_encoder is false"
        reason = native_encoder.unsupported_reason(self.module)
        if reason is not None:
            return reason
        wanted = {parameter for group in self.groups for parameter in group["params"]}
        named = dict(self.module.named_parameters())
        for place in native_encoder.parameter_layout(self.module):
            if named[place.name] not in wanted or not named[place.name].requires_grad:
                return f"'{place.name}' is not trained"
        return None

    def _gradients(
        self, updater: _core.Updater, trained: Sequence[Trained], native: bool
    ) -> Gradients:
        slices = [torch.from_dlpack(capsule) for capsule in updater.gradients()]
        options: dict[str, Any] = {
            "start_reduction": updater.start_reduction,
            "zero_gradient": updater.zero_gradient,
            "overlap": self.engine.communicator.world_size > 1,
            "every_backward": updater.reduces_every_micro_batch,
        }
        if native:
            by_name = {entry.name: s for entry, s in zip(trained, slices, strict=True)}
            names = [place.name for place in native_encoder.parameter_layout(self.module)]
            gradients = NativeGradients(names, trained, slices, **options)
            native_slices = {name: by_name[name] for name in names}
            core = self.engine.placement.core
            encoder = native_encoder.install(self.module, native_slices, gradients, core)
            self.on_destroy += [encoder.uninstall, gradients.remove]
            return gradients
        plain = Gradients(trained, slices, **options)
        self.on_destroy.append(plain.remove)
        return plain

    def _optimizer(
        self, updater: _core.Updater, trained: Sequence[Trained]
    ) -> FusedAdam | ClientOptimizer:
        take_step = self.engine.take_step
        if self.client is None:
            parameters = [entry.parameter for entry in trained]
            return FusedAdam(self.groups, updater, parameters, take_step)
        if self.engine.zero_optimization_stage() > 0:
            raise InputError(
                f"initialize(optimizer={type(self.client).__name__}): ZeRO stages 1 and 2 share the"
                " state of Adam and AdamW only; use one of them, or stage 0"
            )
        masters: dict[torch.Tensor, torch.Tensor] = {}
        for index, master, gradient in updater.owned():
            tensor = torch.from_dlpack(master).requires_grad_()
            tensor.grad = torch.from_dlpack(gradient)
            masters[trained[index].parameter] = tensor
        return ClientOptimizer(self.client, masters, take_step)
