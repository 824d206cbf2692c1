"""The native encoder in place of a transformers BertModel's forward and backward.

`install` replaces the forward of the BertModel inside any module. Its calls then run in C++ on the
parameters' own memory, as one node of the autograd graph; gradients are added to the flat f32
gradients that `install` was given. Pooler, heads and losses stay PyTorch's. Padding is not computed
where the class around the BertModel is known to ignore it (sequence classification; tokens whose
label is -100); its hidden states are then zeros, or NaN where only the first token is read.

A call that the native encoder cannot run (hidden states or attentions wanted, embeddings given,
masks that are no padding, autocast, hooks inside ...) runs in PyTorch, with a warning that says
why.

Dropout masks come from bitfall's counter-based generator, seeded by one number that each training
call draws from PyTorch's: manual_seed, saved generator states and checkpointing work as ever, the
masks themselves are others.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch

from bitfall import _core
from bitfall.bridge import native_call, placement
from bitfall.bridge.native_selection import (
    bert_models,
    fingerprint,
    inner_reason,
    native_config,
    parameter_layout,
    unsupported_reason,
)

__all__ = [
    "GradientSink",
    "NativeEncoder",
    "disabled",
    "install",
    "parameter_layout",
    "unsupported_reason",
]

_ATTRIBUTE = "_bitfall_native_encoder"
_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# What the forward of these classes reads of the BertModel's output; others may read all of it.
_READ_FIRST_TOKEN = (
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
)
_READ_LABELLED_TOKENS = ("BertForTokenClassification", "BertForMaskedLM")

_disabled: ContextVar[bool] = ContextVar("native_encoder_disabled", default=False)


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Runs every BertModel in PyTorch, for example for second derivatives."""
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


class GradientSink:
    """What the owner of the gradients wants to hear of each native backward pass."""

    def begin(self) -> bool:
        """A pass begins: True to add to the gradients, False to overwrite them."""
        return True

    def complete(self, block: int) -> None:
        """The pass is through with `block`, from the last one down, then -1 (embeddings)."""


def install(
    module: torch.nn.Module,
    gradients: Mapping[str, torch.Tensor],
    sink: GradientSink | None = None,
    device: placement.CoreDevice = placement.CPU,
) -> NativeEncoder:
    """Runs the BertModel in `module` natively until uninstall().

    `gradients`: for each name of parameter_layout(module) a contiguous f32 tensor of the
    parameter's shape, to which every backward pass adds unless `sink` says otherwise; query, key
    and value adjacent, as the parameters. If all passes overwrite, blocks may share memory that is
    read in sink.complete(). The parameters' own .grad is left alone. Weights are read where the
    parameters lie at each call, which is on `device`.

    Raises InputError with unsupported_reason(module) if there is one, ShapeError if the memory of
    parameters or gradients does not fit.
    """
    layout = parameter_layout(module)
    slices = [gradients[placement.name] for placement in layout]
    native = NativeEncoder(module, slices, sink or GradientSink(), device)
    native.install()
    return native


class NativeEncoder:
    """The native side of one BertModel; see the module's docstring."""

    def __init__(
        self,
        module: torch.nn.Module,
        gradients: list[torch.Tensor],
        sink: GradientSink,
        device: placement.CoreDevice,
    ) -> None:
        self.module = module
        self.sink = sink
        self.bert = bert_models(module)[0][1]
        #: reason -> number of calls that ran in PyTorch
        self.fallbacks: Counter[str] = Counter()
        self.reads = native_call.EVERYTHING
        self._parents: list[torch.nn.Module] = []
        self._names = [placement.name for placement in parameter_layout(module)]
        self._places: list[tuple[dict[str, Any], str]] = []
        self._fingerprint: list[Any] = []
        self._signature = inspect.signature(type(self.bert).forward)
        self._anchor = torch.empty(0, requires_grad=True)  # makes outputs part of the graph
        self._gradients = gradients
        self._bound: list[torch.Tensor] = []
        self._pointers: list[int] = []
        table = self.bert.embeddings.word_embeddings
        self.core = _core.NativeEncoder(native_config(self.bert), device, table.padding_idx)
        self._find_parameters()
        self._bind(self.parameters())

    def install(self) -> None:
        _replace_forward(self.bert, self, NativeEncoder.forward)
        for parent in self.module.modules():
            known = type(parent).__name__ in (*_READ_FIRST_TOKEN, *_READ_LABELLED_TOKENS)
            code = {type(parent).__module__, type(parent).forward.__module__}
            if known and code == {type(self.bert).__module__} and "forward" not in vars(parent):
                _replace_forward(parent, self, _run_parent)
                self._parents.append(parent)

    def uninstall(self) -> None:
        """Gives the module its own forward back."""
        for module in (self.bert, *self._parents):
            if vars(module).pop(_ATTRIBUTE, None) is not None:
                del module.forward
        self._parents.clear()

    def parameters(self) -> list[torch.Tensor]:
        """In the order of parameter_layout, as they are now."""
        return [parameters[name] for parameters, name in self._places]

    def forward(self, bert: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """bert.forward(*args, **kwargs), natively if that is possible."""
        original = functools.partial(type(bert).forward, bert, *args, **kwargs)
        if _disabled.get():
            return original()
        arguments = self._signature.bind(bert, *args, **kwargs).arguments
        del arguments["self"]
        arguments |= arguments.pop("kwargs", {})
        reason = native_call.refusal(bert, arguments) or self._changed() or self._rebind()
        if reason is None:
            try:
                return self._run(arguments)
            except _core.UnsupportedError as error:
                reason = str(error)
        if reason not in self.fallbacks:
            warnings.warn(f"BertModel runs in PyTorch for this call: {reason}", stacklevel=5)
        self.fallbacks[reason] += 1
        return original()

    def _run(self, arguments: Mapping[str, Any]) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        bert = self.bert
        call = native_call.make_call(bert, arguments, self.reads)
        states = _Encode.apply(self._anchor, self, call)
        if self.reads is native_call.FIRST_TOKEN:
            pooled = bert.pooler(states.unsqueeze(1))
            unread = states.new_full((1, 1, 1), torch.nan)
            states = unread.expand(*call.input_ids.shape, states.shape[-1])
        else:
            pooled = None if bert.pooler is None else bert.pooler(states)
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=states, pooler_output=pooled
        )
        as_dict = arguments.get("return_dict")
        as_dict = getattr(bert.config, "return_dict", True) if as_dict is None else as_dict
        return output if as_dict else output.to_tuple()

    def _changed(self) -> str | None:
        """Why the modules inside of the BertModel cannot be run any more."""
        seen = fingerprint(self.bert)
        if seen == self._fingerprint:
            return None
        reason = inner_reason(self.bert)
        if reason is None:
            self._find_parameters()  # a module may have been replaced
            self._fingerprint = seen
        return reason

    def _find_parameters(self) -> None:
        owners = [name.rpartition(".") for name in self._names]
        self._places = [
            (self.module.get_submodule(owner)._parameters, name) for owner, _, name in owners
        ]

    def _rebind(self) -> str | None:
        """Follows parameters that were moved; says why that is not possible."""
        parameters = self.parameters()
        if not all(parameter.requires_grad for parameter in parameters):
            return "a parameter of the BertModel is frozen (requires_grad = False)"
        if [parameter.data_ptr() for parameter in parameters] == self._pointers:
            return None
        try:
            self._bind(parameters)
        except _core.Error as error:
            return str(error)
        return None

    def _bind(self, parameters: list[torch.Tensor]) -> None:
        self.core.bind(
            [describe(parameter) for parameter in parameters],
            [describe(gradient) for gradient in self._gradients],
        )
        self._bound = [parameter.detach() for parameter in parameters]
        self._pointers = [parameter.data_ptr() for parameter in parameters]

    def output(self, call: native_call.Call) -> torch.Tensor:
        """Memory for the output of a call."""
        rows, columns = call.input_ids.shape
        shape = (rows,) if call.rows == "first_token" else (rows, columns)
        return self._bound[0].new_empty(*shape, self.bert.config.hidden_size)

    def versions(self) -> int:
        """Changes with every operation of PyTorch that writes to a parameter."""
        return sum(parameter._version for parameter in self.parameters())

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the module runs in PyTorch: these gradients are those of the original."""

    def __reduce__(self) -> Any:
        return (type(None), ())


def describe(tensor: torch.Tensor) -> tuple[int, str, tuple[int, ...]]:
    """A contiguous tensor for _core.NativeEncoder; the caller keeps it alive."""
    if tensor.dtype not in _DTYPES or not tensor.is_contiguous():
        raise _core.ShapeError(f"tensor of {tensor.dtype}, strides {tensor.stride()}")
    return tensor.data_ptr(), _DTYPES[tensor.dtype], tuple(tensor.shape)


class _Encode(torch.autograd.Function):
    """Ids in, hidden states out; its backward adds the parameters' gradients to their memory."""

    @staticmethod
    def forward(
        ctx: Any, _anchor: torch.Tensor, native: NativeEncoder, call: native_call.Call
    ) -> torch.Tensor:
        output = native.output(call)
        ctx.native_pass = native.core.forward(*call, describe(output.flatten(0, -2)))
        ctx.native, ctx.versions, ctx.bound = native, native.versions(), native._bound
        return output

    @staticmethod
    def backward(ctx: Any, d_output: torch.Tensor) -> tuple[None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: the native encoder has no second derivatives; run the forward "
                "pass under bitfall.bridge.native_encoder.disabled()"
            )
        if ctx.native.versions() != ctx.versions:
            raise RuntimeError(
                "a parameter of the BertModel was changed in place between the forward and the "
                "backward pass: run the forward pass again"
            )
        sink = ctx.native.sink
        d_output = d_output.contiguous().flatten(0, -2)
        ctx.native_pass.backward(describe(d_output), sink.begin(), sink.complete)
        return None, None, None


def _replace_forward(module: Any, native: NativeEncoder, run: Callable[..., Any]) -> None:
    """module.forward(...) becomes run(native, module, args, kwargs)."""

    @functools.wraps(type(module).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        native = vars(self).get(_ATTRIBUTE)
        if native is None:  # a copy of the module
            return type(self).forward(self, *args, **kwargs)
        return run(native, self, args, kwargs)

    vars(module)[_ATTRIBUTE] = native
    module.forward = types.MethodType(forward, module)  # bound: a copy gets one of its own


def _run_parent(native: NativeEncoder, parent: Any, args: Any, kwargs: Any) -> Any:
    """Tells the native encoder what the module around the BertModel will read."""
    native.reads = _reads(parent, args, kwargs)
    try:
        return type(parent).forward(parent, *args, **kwargs)
    finally:
        native.reads = native_call.EVERYTHING


def _reads(parent: Any, args: Any, kwargs: Any) -> native_call.Reads:
    if type(parent).__name__ in _READ_FIRST_TOKEN:
        return native_call.FIRST_TOKEN
    arguments = inspect.signature(type(parent).forward).bind(parent, *args, **kwargs).arguments
    if native_call.ignores_padding(arguments.get("labels"), arguments.get("attention_mask")):
        return native_call.REAL_TOKENS
    return native_call.EVERYTHING
