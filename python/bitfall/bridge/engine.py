"""The object that trains: DeepSpeed's engine over the C++ Updater."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from bitfall.bridge.gradients import Gradients
from bitfall.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitfall import _core
    from bitfall.bridge.layout import Trained
    from bitfall.bridge.optimizer import FusedAdam


class DeepSpeedEngine(torch.nn.Module):
    """Wraps a module: forward and backward are torch's, the step is the engine's."""

    def __init__(
        self,
        module: torch.nn.Module,
        trained: Sequence[Trained],
        updater: _core.Updater,
        config: _core.CompletedConfig,
        communicator: _core.Communicator,
    ) -> None:
        """`trained` parallels the parameters of `updater`."""
        super().__init__()
        self.module = module
        self.config: dict[str, Any] = json.loads(config.json)
        self.optimizer: FusedAdam | None = None
        self.lr_scheduler: Any = None
        self.micro_steps = 0
        self.last_result: _core.StepResult | None = None
        self._completed = config
        self._communicator = communicator
        self._updater = updater
        self._trained = trained
        self._working = tensors(updater, "working")
        self._loss = torch.from_dlpack(updater.loss)
        self._boundary: bool | None = None
        self._bind()
        self._gradients = Gradients(
            trained,
            tensors(updater, "gradient"),
            updater.start_reduction,
            overlap=communicator.world_size > 1,
            every_backward=updater.reduces_every_micro_batch,
        )

    def _bind(self) -> None:
        for entry, working in zip(self._trained, self._working, strict=True):
            entry.parameter.data = working
            entry.parameter.grad = None

    # --- the training step

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        return self.module(*args, **kwargs)

    def backward(
        self,
        loss: torch.Tensor,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
        **_: Any,
    ) -> torch.Tensor:
        """Adds the gradients of `loss`, a scalar, divided by gradient_accumulation_steps unless
        `scale_wrt_gas` is False. Returns the loss so divided."""
        self._check_loss(loss)
        if scale_wrt_gas and self.gradient_accumulation_steps() > 1:
            loss = loss / self.gradient_accumulation_steps()
        if not self._gradients.any_filled:
            self._loss.zero_()
        self._loss.add_(loss.detach().float().reshape(1))
        scale = self._updater.loss_scale
        scaled = loss.float() * scale if scale != 1.0 else loss
        with self._gradients.backward(self.is_gradient_accumulation_boundary()):
            scaled.backward(retain_graph=retain_graph)
        return loss

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Counts the micro-batch, and updates the weights if it was the last of an accumulation."""
        if not self._gradients.any_filled:
            raise UsageError(
                "engine.step() without a gradient: call engine.backward(loss) before each step()"
            )
        if self.is_gradient_accumulation_boundary():
            if self.optimizer is None:
                raise UsageError("engine.step(): initialize() was given no optimizer")
            self.optimizer.step()
            if self.lr_scheduler is not None and not self.optimizer.overflow:
                self.lr_scheduler.step(**(lr_kwargs or {}))
        self.micro_steps += 1

    def take_step(self) -> None:
        """The update itself: what optimizer.step() calls."""
        assert self.optimizer is not None
        self._check_memory()
        self._gradients.finish()
        result = self._updater.step(self.optimizer.numbers(), self._hessian, self._no_update)
        self._gradients.clear()
        self.optimizer.overflow = result["skipped"]
        self.last_result = result

    def _hessian(self) -> Any:
        raise UsageError("eigenvalues of torch modules come in a later version")

    def _no_update(self) -> None:
        raise AssertionError("the engine's Adam updates the masters")

    def _check_loss(self, loss: Any) -> None:
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            what = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise UsageError(f"engine.backward({what}): expected the loss, a tensor of one element")
        if not loss.requires_grad:
            raise UsageError(
                "engine.backward(loss): the loss depends on no parameter that requires a gradient;"
                " was the forward pass under torch.no_grad()?"
            )

    def _check_memory(self) -> None:
        for entry, working in zip(self._trained, self._working, strict=True):
            if entry.parameter.data_ptr() != working.data_ptr():
                raise UsageError(
                    f"parameter '{entry.name}' has left the engine's memory (model.to(), .half() or"
                    " an assignment to .data after initialize()): convert the model before it"
                )

    # --- accumulation

    def is_gradient_accumulation_boundary(self) -> bool:
        """True if the next step() updates the weights."""
        if self._boundary is not None:
            return self._boundary
        return (self.micro_steps + 1) % self.gradient_accumulation_steps() == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """From now on the caller says which step() updates the weights."""
        self._boundary = is_boundary

    def gradient_accumulation_steps(self) -> int:
        return self._completed.gradient_accumulation_steps

    def train_batch_size(self) -> int:
        return self._completed.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self._completed.train_micro_batch_size_per_gpu

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002
        """Forgets the gradients accumulated so far."""
        self._gradients.clear()

    # --- what is known

    @property
    def global_steps(self) -> int:
        """Steps so far, skipped ones included, as DeepSpeed counts."""
        return self._updater.global_step + self._updater.skipped_steps

    @property
    def skipped_steps(self) -> int:
        return self._updater.skipped_steps

    def get_global_grad_norm(self) -> float | None:
        """L2 norm of the last step's gradient before clipping; None before the first step."""
        return self.last_result["grad_norm"] if self.last_result else None

    def get_lr(self) -> list[float]:
        """Learning rate of each parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups] if self.optimizer else []

    @property
    def loss_scale(self) -> float:
        return self._updater.loss_scale

    def zero_optimization_stage(self) -> int:
        return int(self.config.get("zero_optimization", {}).get("stage", 0))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def tensors(updater: _core.Updater, buffer: str) -> list[torch.Tensor]:
    """The parameters' views of one of the updater's buffers, each a tensor of its own."""
    return [torch.from_dlpack(capsule) for capsule in updater.capsules(buffer)]
