"""What `bitfall.initialize` returns as the optimizer: param_groups outside, the engine inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bitfall.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

# Keys of a group that the engine's Adam reads.
NUMBERS = ("lr", "weight_decay", "betas", "eps")


class FusedAdam(torch.optim.Optimizer):
    """The engine's Adam, as torch's schedulers and Hugging Face see an optimizer.

    Numbers written into param_groups hold from the next step on. `overflow` is True if the last
    step was skipped because fp16 gradients overflowed.
    """

    def __init__(self, groups: list[dict[str, Any]], take_step: Callable[[], None]) -> None:
        """`groups`: params (a list) and all of NUMBERS each."""
        super().__init__(groups, {name: groups[0][name] for name in NUMBERS})
        self.overflow = False
        self._take_step = take_step

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """What engine.step() does at the end of an accumulation, without the scheduler."""
        if closure is not None:
            raise InputError("optimizer.step(closure): call engine.backward() and engine.step()")
        self._take_step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: engine.step() clears gradients itself, engine.zero_grad() clears them before."""

    def numbers(self) -> list[dict[str, Any]]:
        """Per group, as `_core.Updater.step` takes them."""
        return [_numbers(group) for group in self.param_groups]


class ClientOptimizer:
    """A torch.optim.Optimizer that steps on the engine's f32 masters.

    Its own param_groups, which schedulers may already hold, get the masters in place of the
    model's parameters; their .grad is the unscaled, clipped mean when it steps.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        masters: Mapping[torch.Tensor, torch.Tensor],
        take_step: Callable[[], None],
    ) -> None:
        """`masters`: model's parameter -> f32 master, whose .grad is its slice of the gradient."""
        self.optimizer = optimizer
        self.overflow = False
        self._take_step = take_step
        for group in optimizer.param_groups:
            group["params"] = [masters[p] for p in group["params"] if p in masters]
        for parameter, master in masters.items():
            if parameter in optimizer.state:
                optimizer.state[master] = optimizer.state.pop(parameter)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """What engine.step() does at the end of an accumulation, without the scheduler."""
        if closure is not None:
            raise InputError("optimizer.step(closure): call engine.backward() and engine.step()")
        self._take_step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing, as FusedAdam.zero_grad."""

    def numbers(self) -> list[dict[str, Any]]:
        """None that the engine would need."""
        return []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def parameter_groups(
    model: torch.nn.Module, model_parameters: Iterable[Any] | None, defaults: dict[str, Any]
) -> list[dict[str, Any]]:
    """torch-like groups {"params": [...], "lr": ..., ...}; what a group leaves out has `defaults`.

    `model_parameters`: parameters, (name, parameter) pairs, groups, or None for all that require a
    gradient. Dicts are used as they are, so that callers see what schedulers write.
    """
    if model_parameters is None:
        entries: list[Any] = [p for p in model.parameters() if p.requires_grad]
    else:
        entries = list(model_parameters)
    if not entries:
        raise InputError("model_parameters: it is empty; pass model.parameters()")
    groups = entries if isinstance(entries[0], dict) else [{"params": entries}]
    for group in groups:
        params = group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        group["params"] = [p[1] if isinstance(p, tuple) else p for p in params]
        for name in NUMBERS:
            group.setdefault(name, defaults[name])
    return groups


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    values = {name: float(group[name]) for name in ("lr", "weight_decay", "eps")}
    return {**values, "betas": [float(beta) for beta in group["betas"]]}
