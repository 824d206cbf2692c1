"""deepspeed.checkpoint.utils: tensors that do not drag their whole buffer into a saved file."""

from __future__ import annotations

from typing import Any

import torch

from .. import _refusal

__getattr__ = _refusal.missing_attributes("deepspeed.checkpoint.utils")


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """A copy of nested dicts, lists and tuples whose tensors own exactly their elements.

    Parameters are slices of the engine's flat buffers: saved as they are, each would bring all of
    it.
    """
    if torch.is_tensor(item):
        return item.detach().clone().to(device)
    if isinstance(item, dict):
        return type(item)(
            (key, clone_tensors_for_torch_save(value, device)) for key, value in item.items()
        )
    if isinstance(item, (list, tuple)):
        return type(item)(clone_tensors_for_torch_save(value, device) for value in item)
    return item
