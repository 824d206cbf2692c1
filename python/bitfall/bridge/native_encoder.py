"""The native encoder under a transformers BertModel: which module qualifies, and where its
parameters must lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from bitfall.errors import InputError

if TYPE_CHECKING:
    import torch

NO_BLOCK = -1

_EMBEDDINGS = (
    "word_embeddings.weight",
    "position_embeddings.weight",
    "token_type_embeddings.weight",
    "LayerNorm.weight",
    "LayerNorm.bias",
)
_ADJACENT = (
    "attention.self.key.weight",
    "attention.self.value.weight",
    "attention.self.key.bias",
    "attention.self.value.bias",
)
_LAYER = (
    "attention.self.query.weight",
    "attention.self.key.weight",
    "attention.self.value.weight",
    "attention.self.query.bias",
    "attention.self.key.bias",
    "attention.self.value.bias",
    "attention.output.dense.weight",
    "attention.output.dense.bias",
    "attention.output.LayerNorm.weight",
    "attention.output.LayerNorm.bias",
    "intermediate.dense.weight",
    "intermediate.dense.bias",
    "output.dense.weight",
    "output.dense.bias",
    "output.LayerNorm.weight",
    "output.LayerNorm.bias",
)


class ParameterPlacement(NamedTuple):
    """Where one parameter lies in the flat buffers."""

    name: str  # as in module.named_parameters()
    block: int  # index of the encoder layer, or NO_BLOCK
    adjacent: bool  # right behind its predecessor (Placement::adjacent), else aligned


def parameter_layout(module: torch.nn.Module) -> list[ParameterPlacement]:
    """The parameters that the native encoder runs, in its order.

    The flat buffers must hold them one after the other as listed: embeddings, then one contiguous
    block per layer with query, key and value adjacent. All other parameters of `module` (pooler,
    heads) may lie before or behind them, in any order. Names are those of
    module.named_parameters(), so a tied parameter (BertForMaskedLM's decoder) has one entry.

    Raises InputError with unsupported_reason(module) if there is one.
    """
    reason = unsupported_reason(module)
    if reason is not None:
        raise InputError(f"native encoder: {reason}")
    prefix, bert = _bert_models(module)[0]
    layout = [
        ParameterPlacement(f"{prefix}embeddings.{name}", NO_BLOCK, False) for name in _EMBEDDINGS
    ]
    for index in range(bert.config.num_hidden_layers):
        layout += [
            ParameterPlacement(f"{prefix}encoder.layer.{index}.{name}", index, name in _ADJACENT)
            for name in _LAYER
        ]
    return layout


def unsupported_reason(module: torch.nn.Module) -> str | None:
    """Why the native encoder cannot run the BERT in `module`; None if it can."""
    count = len(_bert_models(module))
    if count != 1:
        return f"the module holds {count or 'no'} transformers BertModel, expected one"
    return None


def _bert_models(module: torch.nn.Module) -> list[tuple[str, Any]]:
    """(prefix of its parameter names, BertModel) of each one in `module`."""
    import sys

    modeling = sys.modules.get("transformers.models.bert.modeling_bert")
    if modeling is None:
        return []
    return [
        (f"{name}." if name else "", child)
        for name, child in module.named_modules()
        if isinstance(child, modeling.BertModel)
    ]
