"""Which BERT the native encoder can run, and where it wants the parameters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from bitfall._core import Error, NativeEncoder
from bitfall.bridge.placement import CPU
from bitfall.errors import InputError

if TYPE_CHECKING:
    import torch

# What the native encoder reads of a config.json.
_CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "position_embedding_type",
    "is_decoder",
    "add_cross_attention",
    "is_encoder_decoder",
)
# Where the classes of the modules inside a BertModel come from; adapters, quantized layers and the
# like compute other things.
_KNOWN_CODE = ("transformers.models.bert.modeling_bert", "transformers.activations", "torch.nn.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ParameterPlacement(NamedTuple):
    """Where one parameter lies in the flat buffers."""

    name: str  # as in module.named_parameters()
    shape: tuple[int, ...]
    block: int  # index of the encoder layer, or -1
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
    return _layout(*bert_models(module)[0])


def unsupported_reason(module: torch.nn.Module) -> str | None:
    """Why the native encoder cannot run the BERT in `module`; None if it can."""
    models = bert_models(module)
    if len(models) != 1:
        return f"the module holds {len(models) or 'no'} transformers BertModel, expected one"
    prefix, bert = models[0]
    if type(bert).forward is not _bert_class().forward or "forward" in vars(bert):
        return f"{type(bert).__name__} has a forward of its own"
    if getattr(bert.config, "is_causal", None):
        return "config.is_causal is set"
    try:
        layout = _layout(prefix, bert)
    except Error as error:
        return str(error)
    return inner_reason(bert) or next(_parameter_reasons(module, prefix, layout), None)


def bert_models(module: torch.nn.Module) -> list[tuple[str, Any]]:
    """(prefix of its parameter names, BertModel) of each one in `module`."""
    bert_class = _bert_class()
    if bert_class is None:
        return []
    return [
        (f"{name}." if name else "", child)
        for name, child in module.named_modules()
        if isinstance(child, bert_class)
    ]


def inner_reason(bert: Any) -> str | None:
    """Why the modules of a BertModel, without the pooler, are not what its config says."""
    count, expected = len(bert.encoder.layer), bert.config.num_hidden_layers
    if count != expected:
        return f"the BertModel has {count} layers, by its config {expected}"
    inner = [*bert.embeddings.modules(), *bert.encoder.modules()]
    return next((reason for part in inner for reason in _part_reasons(bert, part)), None)


def fingerprint(bert: Any) -> list[Any]:
    """Differs from an earlier one if inner_reason may have changed; a fraction of its time."""
    training = bert.training
    seen: list[Any] = []
    parts = [bert.embeddings, bert.encoder]
    while parts:
        part = parts.pop()
        state = vars(part)
        seen.append(part)
        seen.append(len(state))  # a forward of its own is one more
        seen.append(state.get("p", state.get("eps")))
        seen.append(state["training"] == training)
        for kind in _HOOKS:
            seen.extend(state[kind].values())
        parts.extend(state["_modules"].values())
    return seen


def native_config(bert: Any) -> str:
    """The config.json text for _core.NativeEncoder."""
    values = {key: getattr(bert.config, key, None) for key in _CONFIG_KEYS}
    if not isinstance(values["hidden_act"], str):
        values["hidden_act"] = repr(values["hidden_act"])
    return json.dumps(values)


def _bert_class() -> Any:
    """transformers' BertModel, or None while nobody has imported it."""
    modeling = sys.modules.get("transformers.models.bert.modeling_bert")
    return None if modeling is None else modeling.BertModel


def _layout(prefix: str, bert: Any) -> list[ParameterPlacement]:
    return [
        ParameterPlacement(prefix + name.removeprefix("bert."), shape, block, adjacent)
        for name, shape, block, adjacent in NativeEncoder(
            native_config(bert), CPU, None
        ).parameters()
    ]


def _part_reasons(bert: Any, part: Any) -> Iterator[str]:
    kind = type(part).__name__
    config = bert.config
    if not type(part).__module__.startswith(_KNOWN_CODE) or "forward" in vars(part):
        yield f"{kind} inside of the BertModel is not transformers' or PyTorch's own"
    # transformers' own hooks capture outputs, which is asked for call by call.
    hooks = [hook for kind_of_hook in _HOOKS for hook in getattr(part, kind_of_hook).values()]
    if not all(str(getattr(h, "__module__", "")).startswith("transformers.") for h in hooks):
        yield f"{kind} inside of the BertModel has hooks"
    if kind == "LayerNorm" and part.eps != config.layer_norm_eps:
        yield f"a LayerNorm has eps {part.eps}, the config {config.layer_norm_eps}"
    if kind == "Embedding" and (part.max_norm or part.scale_grad_by_freq or part.sparse):
        yield "an Embedding has max_norm, scale_grad_by_freq or sparse gradients"
    is_word_table = part is bert.embeddings.word_embeddings
    if kind == "Embedding" and part.padding_idx is not None and not is_word_table:
        yield "the table of positions or token types has a padding_idx"
    dropout = vars(part).get("_modules", {}).get("dropout")
    if dropout is not None:
        is_attention = hasattr(part, "query")
        name = "attention_probs_dropout_prob" if is_attention else "hidden_dropout_prob"
        if dropout.p != getattr(config, name):
            yield f"{kind} has dropout {dropout.p}, the config {getattr(config, name)}"
        if dropout.training != bert.training:
            yield "a Dropout inside of the BertModel is switched on or off by itself"


def _hooks_of_others(parameter: Any) -> bool:
    hooks = [
        hook
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks")
        for hook in (getattr(parameter, kind, None) or {}).values()
    ]
    functions = [getattr(hook, "func", hook) for hook in hooks]  # of a functools.partial
    return not all(str(getattr(f, "__module__", "")).startswith("bitfall.") for f in functions)


def _parameter_reasons(
    module: torch.nn.Module, prefix: str, layout: list[ParameterPlacement]
) -> Iterator[str]:
    parameters = dict(module.named_parameters())
    expected = [placement.name for placement in layout]
    for name in parameters:
        part = name.removeprefix(prefix).split(".")[0]
        if name.startswith(prefix) and part in ("embeddings", "encoder") and name not in expected:
            yield f"{name} is no parameter of a plain BertModel"
    missing = [name for name in expected if name not in parameters]
    if missing:
        yield f"{missing[0]} is missing, or shared with another parameter"
        return
    first = parameters[layout[0].name]
    for placement in layout:
        parameter = parameters[placement.name]
        if tuple(parameter.shape) != placement.shape:
            yield f"{placement.name} is {list(parameter.shape)}, by the config {placement.shape}"
        if (parameter.dtype, parameter.device) != (first.dtype, first.device):
            yield f"{placement.name} is {parameter.dtype} on {parameter.device}, others are not"
        if not parameter.requires_grad:
            yield f"{placement.name} is frozen (requires_grad = False)"
        if _hooks_of_others(parameter):
            yield f"{placement.name} has hooks"
    if str(first.dtype) not in ("torch.float32", "torch.bfloat16", "torch.float16"):
        yield f"the parameters are {first.dtype}"
