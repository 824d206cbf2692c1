"""One call of BertModel.forward: can the native encoder run it, and with what."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Ids = npt.NDArray[np.int64]

_IDS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_MORE_OUTPUTS = ("output_attentions", "output_hidden_states")
# These change nothing for an encoder, or only the class of the output.
_WITHOUT_EFFECT = ("use_cache", "return_dict", "num_items_in_batch")


class Reads(NamedTuple):
    """What the caller reads of the output: arguments of _core.NativeEncoder.forward."""

    rows: str
    padding: str


FIRST_TOKEN = Reads("first_token", "removed")
REAL_TOKENS = Reads("all_tokens", "removed")
EVERYTHING = Reads("all_tokens", "computed")


class Call(NamedTuple):
    """Arguments of _core.NativeEncoder.forward but for the memory of the output."""

    input_ids: Ids  # [B, S], as the next three
    attention_mask: Ids | None
    token_type_ids: Ids | None
    position_ids: Ids | None
    rows: str
    padding: str
    mode: str
    seed: int


def refusal(bert: Any, arguments: Mapping[str, Any]) -> str | None:
    """Why the call bert(**arguments) must run in PyTorch; None if the native encoder may try it."""
    for name in _MORE_OUTPUTS:
        value = arguments.get(name)
        if getattr(bert.config, name, False) if value is None else value:
            return f"{name} is on"
    for name, value in arguments.items():
        if name not in (*_IDS, *_MORE_OUTPUTS, *_WITHOUT_EFFECT) and value is not None:
            return f"the argument {name} is given"
    for name in _IDS:
        if not _is_matrix(name, arguments.get(name)):
            return f"{name} is no tensor [B, S] of integers"
    if arguments["input_ids"].shape[1] > bert.config.max_position_embeddings:
        return "rows are longer than max_position_embeddings"
    # On its layers today, on the encoder itself in older releases (4.46).
    checkpointed = (bert.encoder, bert.encoder.layer[0])
    if bert.training and any(getattr(m, "gradient_checkpointing", False) for m in checkpointed):
        return "gradient checkpointing is on"
    if _is_autocast(arguments["input_ids"].device.type):
        return "autocast is on"
    if torch.jit.is_tracing() or _is_compiling():
        return "the model is being traced or compiled"
    return None


def make_call(bert: Any, arguments: Mapping[str, Any], reads: Reads) -> Call:
    """For arguments without a refusal. Draws from PyTorch's generator in training mode."""
    input_ids = arguments["input_ids"]
    mask, types, positions = (
        None if ids is None else _to_numpy(ids.expand_as(input_ids) if ids.shape[0] == 1 else ids)
        for ids in map(arguments.get, _IDS[1:])
    )
    mode = "differentiate" if torch.is_grad_enabled() else "evaluate"
    seed = 0
    if bert.training:
        mode, seed = "train", int(torch.randint(2**63 - 1, ()))
    return Call(_to_numpy(input_ids), mask, types, positions, *reads, mode, seed)


def ignores_padding(labels: object, attention_mask: object) -> bool:
    """Whether all labels [B, S] of padding are -100, which the losses of transformers ignore."""
    if not (isinstance(labels, torch.Tensor) and isinstance(attention_mask, torch.Tensor)):
        return False
    if labels.shape != attention_mask.shape:
        return False
    return bool((labels[attention_mask == 0] == -100).all())


def _is_matrix(name: str, ids: object) -> bool:
    if ids is None:
        return name != "input_ids"
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_complex():
        return False
    if not ids.is_floating_point():
        return True
    # Masks also come as floats; anything but whole numbers is none.
    return name == "attention_mask" and bool((ids == ids.round()).all())


def _to_numpy(ids: torch.Tensor) -> Ids:
    return ids.to("cpu", torch.int64).contiguous().numpy()


def _is_compiling() -> bool:
    if hasattr(torch.compiler, "is_compiling"):
        return torch.compiler.is_compiling()
    return sys.modules["torch._dynamo"].is_compiling() if "torch._dynamo" in sys.modules else False


def _is_autocast(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except TypeError:  # before torch 2.4
        return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()
