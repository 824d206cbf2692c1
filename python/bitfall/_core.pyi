"""The C++ engine as Python sees it (pybind11 module). Arrays are numpy arrays; errors are the classes below."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

__version__: str

class Error(RuntimeError): ...
class ConfigError(Error, ValueError): ...
class ShapeError(Error, ValueError): ...
class UnsupportedError(Error): ...
class BackendError(Error): ...
class CommunicationError(Error): ...
class ModelFileError(Error): ...
class CheckpointError(Error): ...
class TrainingError(Error): ...

class Batch(TypedDict, total=False):
    """A packed micro-batch: no padding."""

    input_ids: npt.NDArray[np.int32]  # [T]
    token_type_ids: npt.NDArray[np.int32]  # [T], optional
    sequence_starts: npt.NDArray[np.int32]  # [B+1]
    sample_keys: npt.NDArray[np.int32]  # [B] position of the sample in the global batch of the step
    # [B] int32 (classification) or float32 (regression); [B, 2] int32 (spans); optional
    labels: npt.NDArray[Any]

class BitDrop(TypedDict):
    step: int
    name: str
    old_bits: int
    new_bits: int
    next_threshold: float
    factor: int

class Eigenvalue(TypedDict):
    name: str
    block: int
    iterations: int  # of power iteration
    products: int  # Hessian-vector products that they took
    converged: bool
    value: float  # largest |eigenvalue|
    normalized: float  # in [0, 1]
    factor: int

class StepResult(TypedDict):
    step: int  # optimizer steps so far, skipped ones not counted
    loss: float  # mean over the global batch
    grad_norm: float
    learning_rate: float
    loss_scale: float
    skipped: bool
    # state name -> bits; 16 or the compute width while quantization has not begun
    bits: dict[str, int]
    drops: list[BitDrop]
    eigenvalues: list[Eigenvalue]  # empty unless computed in this step

class FlagValue(TypedDict):
    flag: str
    json: str
    given: bool

class CompletedConfig:
    json: str
    origins: dict[str, str]
    warnings: list[str]
    compute_dtype: str  # "f32", "bf16", "f16"
    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int
    steps_per_print: int
    seed: int
    quantize_enabled: bool
    eigenvalue_enabled: bool

def parse_config(text: str, source: str, flags: dict[str, FlagValue]) -> CompletedConfig: ...
def scheduled_rate(config: CompletedConfig, base_rate: float, completed_steps: int) -> float:
    """Learning rate after so many steps under the config's scheduler."""

class PlannedState(TypedDict):
    name: str
    group: int
    block: int  # -1 for "other"
    factor: int
    drops: list[tuple[int, int]]  # (bits, first step at that width)

def plan_bits(
    config: CompletedConfig, num_layers: int, eigenvalues: list[float] | None, layer_name: str
) -> list[PlannedState]: ...
def longest_period_that_reaches(
    config: CompletedConfig, group: int, num_layers: int, factor: int, steps: int
) -> int: ...

class Communicator:
    """MPI when started by mpirun, otherwise a world of one."""

    rank: int
    world_size: int
    local_rank: int
    def broadcast(self, data: bytes, root: int = 0) -> bytes: ...
    def all_gather(self, data: bytes) -> list[bytes]: ...
    def barrier(self) -> None: ...
    def abort(self, message: str) -> None: ...

def make_communicator() -> Communicator: ...

class Engine:
    """Trains one model. Every rank constructs it with the same arguments."""

    def __init__(
        self,
        model_dir: str,  # config.json + model.safetensors, as Hugging Face saves them
        head: str,  # "classification", "regression" or "span"
        num_labels: int,
        config: CompletedConfig,
        communicator: Communicator,
        device: str = "cpu",  # or "cuda"
    ) -> None: ...
    num_layers: int
    global_step: int
    skipped_steps: int
    def train_batch(self, micro_batches: list[Batch]) -> StepResult:
        """One optimizer step over up to gradient_accumulation_steps micro-batches of this rank.

        The mean is over the samples of all ranks; a rank may have none in the last step of an epoch.
        """
    def evaluate(self, batch: Batch) -> tuple[float | None, npt.NDArray[np.float32]]:
        """(mean loss or None without labels, logits [B, C] or [T, 2]) in f32 with the quantized weights."""
    def prepare_evaluation(self) -> None:
        """What the first evaluate() after a step does beforehand, for a rank without a batch. Collective."""
    def save_checkpoint(self, directory: str, tag: str, client_state: str) -> None:
        """Writes directory/tag/ and then directory/latest. client_state is JSON text of the caller. Collective."""
    def load_checkpoint(self, directory: str, tag: str | None = None) -> str:
        """Restores everything bit for bit and returns client_state. Collective."""
    def save_model(self, directory: str, weights: str) -> None:
        """model.safetensors + config.json; weights: "master" (f32), "quantized" (f32 values exactly on the grid)
        or "integers" (codes, scales, zero points in quantized.safetensors). Rank 0 writes. Collective."""
    def quantization_error(self) -> dict[str, float]:
        """Parameter name -> |quantized - master| / |master| (L2), quantized parameters only. Collective."""
    def quantized_sizes(self) -> dict[str, dict[str, int]]:
        """Parameter name -> {"numel", "bits", "bytes_f32", "bytes_quantized"}; unquantized ones too (bits 32)."""
    def memory_bytes(self) -> dict[str, int]: ...
    def timings(self) -> dict[str, float]:
        """Seconds since the last call by phase: forward, backward, all_reduce, update (masters and working weights), eigenvalues."""

class NativePass:
    """One forward pass whose activations wait for its backward pass."""

    def backward(
        self,
        d_output: tuple[int, str, tuple[int, ...]],
        accumulate: bool,
        on_block_ready: Callable[[int], object],
    ) -> None:
        """Adds to the bound gradients, or overwrites them. `on_block_ready(block)` is called when those of a block
        are complete, -1 for the embeddings at the end. Once; raises TrainingError for a second time."""

class NativeEncoder:
    """The BERT encoder without pooler over memory of others, given as (data pointer, dtype, shape) of contiguous
    tensors on `device` that the caller keeps alive; dtype is "f32", "bf16" or "f16"."""

    def __init__(
        self, config: str, device: tuple[str, int, int | None], padding_idx: int | None
    ) -> None:
        """`config`: text of a config.json. Tokens `padding_idx` leave the gradient of their embedding alone."""
    def parameters(self) -> list[tuple[str, tuple[int, ...], int, bool]]:
        """(name, shape, block or -1, right behind its predecessor) in the order of bind()."""
    def bind(
        self,
        weights: Sequence[tuple[int, str, tuple[int, ...]]],
        gradients: Sequence[tuple[int, str, tuple[int, ...]]],
    ) -> None:
        """Weights of one dtype and f32 gradients. Raises ShapeError that names what does not fit."""
    def forward(
        self,
        input_ids: npt.NDArray[np.int64],  # [B, S], as the next three
        attention_mask: npt.NDArray[np.int64] | None,
        token_type_ids: npt.NDArray[np.int64] | None,
        position_ids: npt.NDArray[np.int64] | None,
        rows: str,  # "first_token" or "all_tokens"
        padding: str,  # "removed" (its output is zeros) or "computed"
        mode: str,  # "train" (dropout), "differentiate" or "evaluate" (nothing is kept)
        seed: int,  # of dropout
        output: tuple[int, str, tuple[int, ...]],  # [B, H] for "first_token", else [B * S, H]
    ) -> NativePass | None:
        """Writes `output`. Raises UnsupportedError for masks that it cannot run, ShapeError for ids out of range."""

class Updater:
    """The engine's step over parameters that Python runs forward and backward. Every rank constructs it alike.
    Capsules are DLPack's; what imports one keeps the updater alive."""

    def __init__(
        self,
        # (name, shape, block or -1, whether it lies right behind its predecessor); blocks consecutive from 0
        parameters: list[tuple[str, list[int], int, bool]],
        config: CompletedConfig,
        communicator: Communicator,
        # {"lr", "weight_decay", "betas", "eps", "parameters": rising indices} each; None: the caller updates masters
        groups: list[dict[str, Any]] | None,
        block_names: list[str],
        device: tuple[str, int, int | None],  # "cpu" or "cuda", number of the GPU, CUDA stream
        fill: Callable[
            [int, Any], Any
        ],  # (index, capsule of the f32 master, valid during the call)
    ) -> None: ...
    global_step: int
    skipped_steps: int
    loss_scale: float
    loss: Any  # capsule [1] f32: this rank's share of the loss, to be summed up before step()
    needs_eigenvalues: bool  # at the next step
    reduces_every_micro_batch: bool  # ZeRO stage 2, see start_reduction
    optimizer_steps: int  # of Adam, for its bias correction
    def working(self) -> list[Any]:
        """A capsule per parameter, compute dtype: the weights of forward passes."""
    def gradients(self) -> list[Any]:
        """A capsule per parameter, f32. At ZeRO stage 2 blocks share memory."""
    def zero_gradient(self, index: int) -> None:
        """Zeros the gradient of a parameter; memory of zeros that were never written stays with the system."""
    def owned(self) -> list[tuple[int, Any, Any]]:
        """(index, f32 master, gradient) of what this rank updates: whole parameters, or flat parts of them."""
    def moments(self) -> list[tuple[Any, Any]]:
        """(exp_avg, exp_avg_sq) per parameter; empty where ranks share them or the caller updates."""
    def block_offsets(self) -> list[int]:
        """Where each parameter begins within the range of its block, in elements."""
    def start_reduction(self, block: int, accumulate: bool = False) -> None:
        """The gradients of `block` (-1: of what is in none) are complete: starts their mean over ranks. Once per block
        and step, from the last to the first, then -1. Where every micro-batch is reduced, once per micro-batch, with
        `accumulate` in all but the first; the gradients of a block may be written when the one above was started."""
    def step(
        self,
        groups: list[dict[str, Any]],  # numbers only; ignored where the caller updates masters
        make_hessian: Callable[
            [], Any
        ],  # an object with begin_block(block) and multiply(v, product)
        update_masters: Callable[[], Any],
    ) -> StepResult: ...
    def plan(self) -> list[PlannedState]:
        """The smallest factor for all states, then the largest for blocks if eigenvalues decide."""
    def save_checkpoint(
        self,
        directory: str,
        tag: str,
        client_state: str,
        tensors: dict[
            str, tuple[str, list[int], Any]
        ],  # name -> (dtype of safetensors, shape, buffer)
    ) -> None:
        """As Engine's; `tensors` of rank 0 go with it."""
    def load_checkpoint(self, directory: str, tag: str, with_optimizer: bool) -> None:
        """As Engine's, whatever the config was; without the optimizer, moments and loss scale stay."""
    def quantization_error(self) -> dict[str, float]: ...
    def quantized_sizes(self) -> dict[str, dict[str, int]]: ...
    def memory_bytes(self) -> dict[str, int]: ...
    def timings(self) -> dict[str, float]: ...

def read_client_checkpoint(
    directory: str, tag: str | None = None
) -> tuple[str, dict[str, tuple[str, list[int], bytes]]]:
    """(client_state, tensors) of a checkpoint that is as it was written."""

def fake_quantize(
    array: npt.NDArray[np.float32],
    bits: int,
    groups: int = 1,
    q_type: str = "symmetric",
    rounding: str = "nearest",
    seed: int = 0,
) -> npt.NDArray[np.float32]: ...
def quantize(
    array: npt.NDArray[np.float32],
    bits: int,
    groups: int = 1,
    q_type: str = "symmetric",
    rounding: str = "nearest",
    seed: int = 0,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """(codes, scales [groups], zero_points [groups]); value = (code + zero_point) * scale."""

def cpu_isa() -> str: ...
def gpu_index(local_rank: int) -> int:
    """The number of the GPU for this process. Raises BackendError if there is none."""

def choose_device(wanted: str) -> tuple[str, str]:
    """("cpu" or "cuda", what was found). `wanted` is "auto", "cpu" or "cuda"."""
