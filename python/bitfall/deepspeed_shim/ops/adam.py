"""deepspeed.ops.adam: torch's Adam and AdamW, which bitfall's engine then runs itself."""

from __future__ import annotations

from typing import Any

import torch

from .. import _refusal

__getattr__ = _refusal.missing_attributes("deepspeed.ops.adam")


class DeepSpeedCPUAdam:
    """Gives a torch.optim.AdamW, or with adamw_mode=False a torch.optim.Adam."""

    def __new__(  # type: ignore[misc]
        cls,
        model_params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> torch.optim.Optimizer:
        del fp32_optimizer_states  # they always are
        return _adam(
            model_params, adamw_mode, bias_correction, amsgrad, lr, betas, eps, weight_decay
        )


class FusedAdam:
    """Gives a torch.optim.AdamW, or with adam_w_mode=False a torch.optim.Adam."""

    def __new__(  # type: ignore[misc]
        cls,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> torch.optim.Optimizer:
        del set_grad_none  # gradients stay in the engine's buffer
        return _adam(params, adam_w_mode, bias_correction, amsgrad, lr, betas, eps, weight_decay)


def _adam(
    params: Any,
    decoupled: bool,
    bias_correction: bool,
    amsgrad: bool,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    if not bias_correction or amsgrad:
        raise _refusal.UnsupportedError(
            "deepspeed.ops.adam: bias_correction=False and amsgrad=True of an optimizer made in the"
            ' script are not in bitfall; configure "optimizer": {"type": "AdamW", "params":'
            ' {"bias_correction": false}} instead, or leave them at their defaults'
        )
    optimizer = torch.optim.AdamW if decoupled else torch.optim.Adam
    return optimizer(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
