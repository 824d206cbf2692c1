"""What `bitfall.initialize` returns as the optimizer: param_groups outside, the engine inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bitfall.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from bitfall._core import Updater

    # engine.take_step(what updates the masters)
    TakeStep = Callable[[Callable[[], Any]], None]

# Keys of a group that the engine's Adam reads.
NUMBERS = ("lr", "weight_decay", "betas", "eps")


class FusedAdam(torch.optim.Optimizer):
    """The engine's Adam, as torch's schedulers and Hugging Face see an optimizer.

    Numbers written into param_groups hold from the next step on. `overflow` is True if the last
    step was skipped because fp16 gradients overflowed. `state` shows the engine's moments, unless
    ranks share them (ZeRO).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        updater: Updater,
        trained: Sequence[torch.nn.Parameter],
        take_step: TakeStep,
    ) -> None:
        """`groups`: params (a list) and all of NUMBERS each; used as they are, not copied."""
        super().__init__(groups, {name: groups[0][name] for name in NUMBERS})
        self.overflow = False
        self._updater = updater
        self._take_step = take_step
        for parameter, moments in zip(trained, updater.moments(), strict=False):
            exp_avg, exp_avg_sq = map(torch.from_dlpack, moments)
            self.state[parameter] = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """What engine.step() does at the end of an accumulation, without the scheduler."""
        if closure is not None:
            raise InputError("optimizer.step(closure): call engine.backward() and engine.step()")
        self._take_step(_no_update)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: engine.step() clears gradients itself, engine.zero_grad() clears them before."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's Adam; the engine counts steps for all parameters together."""
        for values in self.state.values():
            values["step"] = torch.tensor(float(self._updater.optimizer_steps))
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Numbers of the groups, and moments where the state has them. Raises InputError if groups
        or sizes differ."""
        saved = state_dict["param_groups"]
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in self.param_groups]:
            raise InputError("optimizer.load_state_dict: its parameter groups are other ones")
        steps = set()
        for group, theirs in zip(self.param_groups, saved, strict=True):
            for parameter, key in zip(group["params"], theirs["params"], strict=True):
                values = state_dict["state"].get(key)
                if values is None or parameter not in self.state:
                    continue
                steps.add(float(values["step"]))
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[parameter][name].copy_(values[name])
            group.update({key: value for key, value in theirs.items() if key != "params"})
        if steps:
            self._updater.optimizer_steps = int(max(steps))

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
        take_step: TakeStep,
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
        self._take_step(self.optimizer.step)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing, as FusedAdam.zero_grad."""

    def numbers(self) -> list[dict[str, Any]]:
        """None that the engine would need."""
        return []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


def engine_can_run(optimizer: Any) -> bool:
    """True for a torch.optim.Adam or AdamW that the engine's own does the same as."""
    plain = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and not optimizer.state
    return plain and all(
        not isinstance(group["lr"], torch.Tensor)
        and not any(group.get(name) for name in ("amsgrad", "maximize", "differentiable"))
        for group in optimizer.param_groups
    )


def section_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the config section "optimizer" would say of such an optimizer: key path -> value."""
    group = optimizer.param_groups[0]
    section = {f"params.{name}": float(group[name]) for name in ("lr", "eps", "weight_decay")}
    decoupled = isinstance(optimizer, torch.optim.AdamW)
    return {
        **section,
        "type": "AdamW" if decoupled else "Adam",
        "params.betas": [float(beta) for beta in group["betas"]],
        "params.adam_w_mode": decoupled,
    }


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


def _no_update() -> None:
    raise AssertionError("the engine's Adam updates the masters")


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    values = {name: float(group[name]) for name in ("lr", "weight_decay", "eps")}
    return {**values, "betas": [float(beta) for beta in group["betas"]]}
