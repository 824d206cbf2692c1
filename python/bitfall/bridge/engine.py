"""The object that trains: DeepSpeed's engine over the C++ Updater."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from bitfall.bridge import checkpoint, data
from bitfall.bridge.engine_info import EngineInfo
from bitfall.bridge.hessian import TorchHessian
from bitfall.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bitfall import _core
    from bitfall.bridge.announcement import Announcer
    from bitfall.bridge.gradients import Gradients
    from bitfall.bridge.layout import Trained
    from bitfall.bridge.optimizer import ClientOptimizer, FusedAdam
    from bitfall.bridge.placement import Placement

NO_OPTIMIZER = (
    '{call} needs an optimizer: give initialize() one, or the config a section "optimizer"'
)


class DeepSpeedEngine(EngineInfo):
    """Wraps a module: forward and backward are torch's, the step is the engine's.

    Attributes of the module can be read through it. Made by `bitfall.initialize`.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        config: _core.CompletedConfig,
        communicator: _core.Communicator,
        placement: Placement,
    ) -> None:
        super().__init__(module, config, communicator)
        self.placement = placement
        self.trained: list[Trained] = []
        self._announcer: Announcer | None = None
        self._working: list[torch.Tensor] = []
        # Parameters at initialize(): trained here, or whether they required a gradient.
        self._ours: set[torch.nn.Parameter] = set()
        self._others: dict[torch.nn.Parameter, bool] = {}
        self._casts_inputs = bool(self.config.get("fp16", {}).get("auto_cast", False))
        self._release: weakref.finalize[..., Any] | None = None

    def attach(
        self,
        updater: _core.Updater,
        trained: list[Trained],
        gradients: Gradients,
        optimizer: FusedAdam | ClientOptimizer,
        announcer: Announcer,
        on_destroy: list[Callable[[], None]],
    ) -> None:
        """What makes it train; `trained` parallels the parameters of `updater`."""
        self.updater, self.trained, self.gradients = updater, trained, gradients
        self.optimizer = optimizer
        self._announcer = announcer
        # Hooks on the module must not outlive the engine, also if nobody calls destroy().
        self._release = weakref.finalize(self, _call_all, on_destroy)
        self._release.atexit = False
        self._working = [entry.parameter.data for entry in trained]
        self._ours = {entry.parameter for entry in trained}
        self._others = {
            parameter: parameter.requires_grad
            for parameter in self.module.parameters()
            if parameter not in self._ours
        }
        self._loss = torch.from_dlpack(updater.loss)

    # --- the training step

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        if self._casts_inputs:
            args, kwargs = pytree.tree_map(_to_half, (args, kwargs))
        output = self.module(*args, **kwargs)
        if (
            self.completed_config.eigenvalue_enabled
            and self.training
            and torch.is_grad_enabled()
            and self.updater is not None
        ):
            self.micro_batches.record(args, kwargs, output, keep=self.updater.needs_eigenvalues)
        return output

    def backward(
        self,
        loss: torch.Tensor,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
        **_: Any,
    ) -> torch.Tensor:
        """Adds the gradients of `loss`, a scalar, divided by gradient_accumulation_steps() unless
        `scale_wrt_gas` is False. Returns the loss so divided."""
        updater, gradients = self._training("engine.backward()")
        _check_loss(loss)
        if scale_wrt_gas and self._accumulation_steps > 1:
            loss = loss / self._accumulation_steps
        if not gradients.any_filled:
            self._loss.zero_()
        self._loss.add_(loss.detach().float().reshape(1))
        self.micro_batches.weigh(loss)
        scaled = loss.float() * updater.loss_scale if updater.loss_scale != 1.0 else loss
        with gradients.backward(self.is_gradient_accumulation_boundary()):
            scaled.backward(retain_graph=retain_graph)
        return loss

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Counts the micro-batch, and updates the weights if it was the last of an accumulation."""
        _, gradients = self._training("engine.step()")
        if self._in_no_sync:
            raise UsageError("engine.step() inside of no_sync(): leave it first")
        _check_filled(gradients, "engine.step()")
        if self.is_gradient_accumulation_boundary():
            assert self.optimizer is not None
            self.optimizer.step()
            if self.lr_scheduler is not None and not self.optimizer.overflow:
                self.lr_scheduler.step(**(lr_kwargs or {}))
        self.micro_steps += 1
        self.global_samples += self._micro_batch_size * self.communicator.world_size

    def take_step(self, update_masters: Callable[[], None]) -> None:
        """The update itself: what optimizer.step() calls."""
        updater, gradients = self._training("optimizer.step()")
        assert self.optimizer is not None
        _check_filled(gradients, "optimizer.step()")
        self._check_memory()
        gradients.finish()
        result = updater.step(self.optimizer.numbers(), self._hessian, update_masters)
        gradients.clear()
        self.micro_batches.clear()
        self.optimizer.overflow = result["skipped"]
        result["learning_rate"] = self.get_lr()[0]
        self.last_result = result
        if self._announcer is not None:
            self._announcer.step(self.global_steps, result)

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> torch.Tensor:
        """One update from gradient_accumulation_steps() micro-batches of an iterator (default: the
        training dataloader); returns their mean loss, the module's output."""
        if data_iter is None:
            if self.training_dataloader is None:
                raise UsageError("train_batch(): pass an iterator, or training_data to initialize")
            data_iter = self._endless_data()
        losses = []
        for _ in range(self._accumulation_steps):
            output = data.call(self, data.on_device(next(data_iter), self.device))
            loss = output if isinstance(output, torch.Tensor) else output.loss
            self.backward(loss)
            self.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def _endless_data(self) -> Iterator[Any]:
        if not hasattr(self, "_data_iterator"):
            self._data_iterator = iter(data.RepeatingLoader(self.training_dataloader))
        return self._data_iterator

    def _training(self, call: str) -> tuple[_core.Updater, Gradients]:
        if self.updater is None or self.gradients is None:
            raise UsageError(NO_OPTIMIZER.format(call=call))
        self.placement.check_stream()
        return self.updater, self.gradients

    def _hessian(self) -> TorchHessian:
        assert self.updater is not None
        offsets = self.updater.block_offsets()
        return TorchHessian(self.module, self.trained, offsets, self.micro_batches.calls)

    def _check_memory(self) -> None:
        for entry, working in zip(self.trained, self._working, strict=True):
            if entry.parameter.data_ptr() != working.data_ptr():
                raise UsageError(
                    f"parameter '{entry.name}' has left the engine's memory (model.to(), .half() or"
                    " an assignment to .data after initialize()): convert the model before it"
                )
        for name, parameter in self.module.named_parameters():
            if parameter in self._ours:
                continue
            parameter.grad = None  # not in model_parameters: DeepSpeed clears it too
            if parameter.requires_grad and not self._others.get(parameter, False):
                was = "was frozen" if parameter in self._others else "was not in the model"
                raise UsageError(
                    f"parameter '{name}' {was} at initialize() and requires a gradient now: build"
                    " the model and set requires_grad before initialize()"
                )

    # --- checkpoints and the end

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Writes SAVE_DIR/TAG (default global_step<N>) and SAVE_DIR/latest. Every rank calls it.

        `client_state`: numbers, strings, lists, dicts and tensors, which load_checkpoint returns.
        """
        if not save_latest:
            raise InputError("save_checkpoint(save_latest=False): 'latest' is always written")
        checkpoint.save(self, save_dir, tag, client_state or {}, exclude_frozen_parameters)
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        **_: Any,
    ) -> tuple[str | None, dict[str, Any]]:
        """(path, client_state) of a restored checkpoint; (None, {}) if there is none and no tag was
        given. Training goes on bit for bit as if it had not been interrupted."""
        return checkpoint.load(
            self,
            load_dir,
            tag,
            checkpoint.Wanted(
                strict=load_module_strict,
                optimizer=load_optimizer_states and not load_module_only,
                lr_scheduler=load_lr_scheduler_states and not load_module_only,
                counters=not load_module_only,
            ),
        )

    def save_16bit_model(
        self, save_dir: str | Path, save_filename: str = "pytorch_model.bin", **_: Any
    ) -> bool:
        """The module's state_dict with the weights of the forward pass. Rank 0 writes."""
        checkpoint.save_weights(self, save_dir, save_filename)
        return True

    save_fp16_model = save_16bit_model

    def deepspeed_io(self, dataset: Any, batch_size: int | None = None, **options: Any) -> Any:
        """A DataLoader over this rank's share of a dataset."""
        return data.make_loader(
            dataset,
            batch_size or self.train_micro_batch_size_per_gpu(),
            self.communicator,
            **options,
        )

    def compile(self, *args: Any, compile_kwargs: dict[str, Any] | None = None, **kw: Any) -> None:
        """torch.nn.Module.compile of the module."""
        self.module.compile(*args, **kw, **(compile_kwargs or {}))

    def destroy(self) -> None:
        """Gives the module its own memory back; it can be trained by another engine then."""
        if self._release is not None:
            self._release()
        if self.updater is not None:
            for entry in self.trained:
                entry.parameter.data = entry.parameter.data.clone()
                entry.parameter.grad = None
        self.updater, self.gradients, self.trained, self._working = None, None, [], []
        self._ours, self._others = set(), {}


def _call_all(functions: list[Callable[[], None]]) -> None:
    for function in functions:
        function()


def _check_filled(gradients: Gradients, call: str) -> None:
    if not gradients.any_filled:
        raise UsageError(
            f"{call} without a gradient: call engine.backward(loss) before each step()"
        )


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        what = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise UsageError(f"engine.backward({what}): expected the loss, a tensor of one element")
    if not loss.requires_grad:
        raise UsageError(
            "engine.backward(loss): the loss depends on no parameter that requires a gradient; was"
            " the forward pass under torch.no_grad()?"
        )


def _to_half(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.half() if floating else value
