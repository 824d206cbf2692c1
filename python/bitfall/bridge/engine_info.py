"""What an engine knows and counts: sizes, accumulation, precision, ranks."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import torch

from bitfall.bridge.hessian import MicroBatches
from bitfall.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bitfall import _core
    from bitfall.bridge.gradients import Gradients
    from bitfall.bridge.optimizer import ClientOptimizer, FusedAdam


class EngineInfo(torch.nn.Module):
    """The part of DeepSpeedEngine that changes no weight. Names are DeepSpeed's."""

    def __init__(
        self,
        module: torch.nn.Module,
        config: _core.CompletedConfig,
        communicator: _core.Communicator,
    ) -> None:
        super().__init__()
        self.module = module
        self.config: dict[str, Any] = json.loads(config.json)
        self.completed_config = config
        self.communicator = communicator
        self.updater: _core.Updater | None = None
        self.gradients: Gradients | None = None
        self.optimizer: FusedAdam | ClientOptimizer | None = None
        self.lr_scheduler: Any = None
        self.training_dataloader: Any = None
        self.micro_steps = 0
        self.global_samples = 0
        self.micro_batches = MicroBatches()
        #: What the last update told, see _core.StepResult; None before the first.
        self.last_result: _core.StepResult | None = None
        self._boundary: bool | None = None
        self._in_no_sync = False
        self._accumulation_steps = config.gradient_accumulation_steps
        self._micro_batch_size = config.train_micro_batch_size_per_gpu

    # --- accumulation

    def is_gradient_accumulation_boundary(self) -> bool:
        """True if the next step() updates the weights."""
        if self._in_no_sync:
            return False
        if self._boundary is not None:
            return self._boundary
        return (self.micro_steps + 1) % self._accumulation_steps == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """From now on the caller says which step() updates the weights."""
        self._boundary = is_boundary

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients in here are accumulated; no step() ends it."""
        if self.zero_optimization_stage() >= 2:
            raise UsageError("no_sync(): ZeRO stage 2 reduces gradients in every backward pass")
        self._in_no_sync = True
        try:
            yield
        finally:
            self._in_no_sync = False

    def gradient_accumulation_steps(self) -> int:
        return self._accumulation_steps

    def train_batch_size(self) -> int:
        return self._micro_batch_size * self._accumulation_steps * self.communicator.world_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self._micro_batch_size

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """By other gradient_accumulation_steps, from the next step on."""
        unit = self._micro_batch_size * self.communicator.world_size
        if train_batch_size < unit or train_batch_size % unit:
            raise InputError(
                f"set_train_batch_size({train_batch_size}): expected a multiple of micro-batch size"
                f" x ranks = {unit}"
            )
        self._accumulation_steps = train_batch_size // unit

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        self._micro_batch_size = micro_batch_size

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002
        """Forgets the gradients accumulated so far."""
        if self.gradients is not None:
            self.gradients.clear()
            self.micro_batches.clear()

    # --- what is known

    @property
    def global_steps(self) -> int:
        """Steps so far, skipped ones included, as DeepSpeed counts."""
        return self.updater.global_step + self.skipped_steps if self.updater is not None else 0

    @property
    def skipped_steps(self) -> int:
        return self.updater.skipped_steps if self.updater is not None else 0

    def was_step_applied(self) -> bool:
        """False if the last update was skipped, or none was made."""
        return self.last_result is not None and not self.last_result["skipped"]

    def get_global_grad_norm(self) -> float | None:
        """L2 norm of the last step's gradient before clipping; None before the first step."""
        return self.last_result["grad_norm"] if self.last_result is not None else None

    def get_lr(self) -> list[float]:
        """Learning rate of each parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups] if self.optimizer else []

    def loss_scale(self) -> float:
        """What losses are multiplied by in backward(); 1 outside of fp16."""
        return self.updater.loss_scale if self.updater is not None else 1.0

    def bits(self) -> dict[str, int]:
        """Bits of each state of the MoQ schedule after the last step; empty without MoQ."""
        return dict(self.last_result["bits"]) if self.last_result is not None else {}

    def zero_optimization_stage(self) -> int:
        return int(self.config.get("zero_optimization", {}).get("stage", 0))

    def zero_optimization(self) -> bool:
        return self.zero_optimization_stage() > 0

    def fp16_enabled(self) -> bool:
        return self.completed_config.compute_dtype == "f16"

    def bfloat16_enabled(self) -> bool:
        return self.completed_config.compute_dtype == "bf16"

    def gradient_clipping(self) -> float:
        return float(self.config.get("gradient_clipping", 0.0))

    @property
    def world_size(self) -> int:
        return self.communicator.world_size

    @property
    def global_rank(self) -> int:
        return self.communicator.rank

    @property
    def local_rank(self) -> int:
        return self.communicator.local_rank

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)
