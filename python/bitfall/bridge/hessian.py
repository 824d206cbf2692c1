"""Exact Hessian-vector products of a module's loss, block by block, through torch.autograd."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from bitfall._core import UnsupportedError
from bitfall.bridge import native_encoder
from bitfall.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bitfall.bridge.layout import Trained

NO_LOSS = (
    "eigenvalues need the loss, but the model returned {what}: let it return the loss (a scalar, or"
    " an output with .loss, as transformers' models do when the labels are passed), or set"
    " eigenvalue.enabled to false"
)
NO_SECOND_DERIVATIVE = (
    "eigenvalues: an operation of the model has no second derivative ({error}); choose another one"
    ' (transformers: attn_implementation="eager"), or set eigenvalue.enabled to false'
)


@dataclass
class MicroBatch:
    """A call of the module, and what its loss weighs in the step's."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returned: float  # the loss that the module returned
    share: float = 0.0  # loss given to backward() / returned


@dataclass
class MicroBatches:
    """The calls of one accumulation, kept only while the next step may need them."""

    calls: list[MicroBatch] = field(default_factory=list)

    def record(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, keep: bool
    ) -> None:
        """A forward pass in training. Raises UsageError if it returned no loss."""
        loss = loss_of(output)
        if loss is None:
            raise UsageError(NO_LOSS.format(what=f"a {type(output).__name__} without one"))
        if keep:
            self.calls.append(MicroBatch(args, kwargs, float(loss.detach())))

    def weigh(self, loss: torch.Tensor) -> None:
        """backward(loss) of the last call, which may have divided what the module returned."""
        if self.calls:
            call = self.calls[-1]
            call.share = float(loss.detach()) / call.returned if call.returned else 1.0

    def clear(self) -> None:
        self.calls.clear()


def loss_of(output: Any) -> torch.Tensor | None:
    """The scalar that a module returned, alone, as .loss, under "loss" or first in a tuple."""
    if isinstance(output, dict):
        output = output.get("loss")
    elif hasattr(output, "loss"):
        output = output.loss
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, torch.Tensor) and output.numel() == 1 else None


class TorchHessian:
    """Products with the diagonal blocks of the Hessian of sum(share * loss) over micro-batches.

    In f32, at the working weights as they are now, dropout off, BatchNorm by its running
    statistics. The module's parameters, buffers, modes and random numbers stay as they are.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        trained: Sequence[Trained],
        offsets: Sequence[int],
        calls: Sequence[MicroBatch],
    ) -> None:
        """`offsets`: where each of `trained` begins within its block, in elements."""
        self._module = module
        self._trained = trained
        self._offsets = offsets
        self._calls = calls
        self._state = {
            name: tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        }
        self._block: list[int] = []
        self._weights: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] | None = None

    def begin_block(self, block: int) -> None:
        """The following products are with this block."""
        self._block = [i for i, entry in enumerate(self._trained) if entry.block == block]
        self._weights = [
            self._state[self._trained[i].name].detach().requires_grad_() for i in self._block
        ]
        # One graph serves all products of a single micro-batch; several would fill the memory.
        self._gradients = None
        if len(self._calls) == 1:
            with _differentiable(self._module):
                self._gradients = self._gradient(self._calls[0])

    def multiply(self, v: Any, product: Any) -> None:
        """product = H v; both DLPack capsules [n] f32 over the block's range."""
        vector, target = torch.from_dlpack(v), torch.from_dlpack(product)
        target.zero_()
        directions = [
            vector[offset : offset + weight.numel()].view_as(weight)
            for offset, weight in zip(self._block_offsets(), self._weights, strict=True)
        ]
        for call in self._calls:
            with _differentiable(self._module):
                gradients = self._gradients or self._gradient(call)
                parts = self._differentiate(gradients, directions)
            for offset, part in zip(self._block_offsets(), parts, strict=True):
                target[offset : offset + part.numel()].add_(part.reshape(-1), alpha=call.share)

    def _block_offsets(self) -> list[int]:
        return [self._offsets[i] for i in self._block]

    def _gradient(self, call: MicroBatch) -> list[torch.Tensor]:
        names = [self._trained[i].name for i in self._block]
        state = self._state | dict(zip(names, self._weights, strict=True))
        args, kwargs = pytree.tree_map(_to_f32, (call.args, call.kwargs))
        loss = loss_of(torch.func.functional_call(self._module, state, args, kwargs))
        if loss is None:
            raise UsageError(NO_LOSS.format(what="none in eval() mode"))
        with _explained():
            return list(
                torch.autograd.grad(
                    loss.float(),
                    self._weights,
                    create_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )

    def _differentiate(
        self, gradients: list[torch.Tensor], directions: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """d <gradients, directions> / d weights; zeros where the loss is linear."""
        live = [(g, d) for g, d in zip(gradients, directions, strict=True) if g.requires_grad]
        if not live:
            return [torch.zeros_like(weight) for weight in self._weights]
        with _explained():
            return list(
                torch.autograd.grad(
                    [gradient for gradient, _ in live],
                    self._weights,
                    grad_outputs=[direction for _, direction in live],
                    retain_graph=self._gradients is not None,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )


def _to_f32(value: Any) -> Any:
    half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        first_line = str(error).partition("\n")[0]
        raise UnsupportedError(NO_SECOND_DERIVATIVE.format(error=first_line)) from error


@contextlib.contextmanager
def _differentiable(module: torch.nn.Module) -> Iterator[None]:
    """Dropout off, attention by plain operations, and everything as before afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    device = next(module.parameters()).device
    with (
        torch.enable_grad(),
        torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]),
        _plain_attention(),
        native_encoder.disabled(),
    ):
        module.eval()
        try:
            yield
        finally:
            for child, training in modes:
                child.training = training


def _plain_attention() -> contextlib.AbstractContextManager[Any]:
    """The fused kernels of scaled_dot_product_attention have no second derivative."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # before torch 2.3
        return torch.backends.cuda.sdp_kernel(
            enable_flash=False, enable_math=True, enable_mem_efficient=False
        )
    return sdpa_kernel(SDPBackend.MATH)
