"""Torch modules on CUDA: which device, which memory, which stream.

No test here needs a GPU. Those of `emulated` run the CUDA backend of tests/cuda_emulation, whose
"GPU" memory is the host's, beneath torch on the CPU: only the device of capsules is rewritten for
torch, and checked first.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import bitfall  # noqa: E402
from bitfall import _core  # noqa: E402
from bitfall.bridge import data, placement  # noqa: E402
from bitfall.errors import InputError, UsageError  # noqa: E402
from bridge_models import CONFIG, tiny  # noqa: E402
from conftest import ROOT, Alone, environment  # noqa: E402

KDL_CUDA = 2


class Arguments:
    local_rank = 1


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch and the engine say that there are two; gives the numbers that torch was set to."""
    chosen: list[int] = []

    class Stream:
        cuda_stream = 77

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(_core, "gpu_index", lambda local_rank: local_rank)
    monkeypatch.setitem(sys.modules, "accelerate.state", None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return chosen


def test_the_gpu_of_local_rank_as_in_deepspeed(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert placement.choose(None, Alone()).core == ("cuda", 0, 77)
    monkeypatch.setenv("LOCAL_RANK", "1")
    chosen = placement.choose(None, Alone())
    assert chosen == (torch.device("cuda", 1), ("cuda", 1, 77))
    monkeypatch.delenv("LOCAL_RANK")
    assert placement.choose(Arguments(), Alone()).device.index == 1
    assert two_gpus == [0, 1, 1]


def test_the_cpu_where_it_is_asked_for(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert placement.choose(None, Alone()) == (torch.device("cpu"), placement.CPU)
    monkeypatch.delenv("DS_ACCELERATOR")

    class Accelerate:  # what Hugging Face's --use_cpu leaves
        device = torch.device("cpu")

        @staticmethod
        def is_initialized() -> bool:
            return True

        @classmethod
        def AcceleratorState(cls) -> Any:  # noqa: N802
            return cls

    monkeypatch.setitem(sys.modules, "accelerate.state", Accelerate)
    assert placement.choose(None, Alone()).core == placement.CPU
    Accelerate.device = torch.device("mps")
    with pytest.raises(InputError, match="expected cpu or cuda"):
        placement.choose(None, Alone())
    assert two_gpus == []


def test_a_missing_library_is_named_with_what_to_do(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(local_rank: int) -> int:
        raise _core.BackendError("device cuda: no CUDA library")

    monkeypatch.setattr(_core, "gpu_index", missing)
    with pytest.raises(_core.BackendError, match=r"no CUDA library.*DS_ACCELERATOR=cpu"):
        bitfall.initialize(model=tiny(), config=CONFIG)


@pytest.mark.usefixtures("two_gpus")
def test_another_stream_is_refused() -> None:
    chosen = placement.choose(None, Alone())
    chosen.check_stream()
    torch.cuda.current_stream(0).cuda_stream = 78
    with pytest.raises(UsageError, match="another CUDA stream"):
        chosen.check_stream()


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for make, batches, changes in scenarios():
        found = train(make(), batches, changes)
        with monkeypatch.context() as patch:
            patch.setenv("DS_ACCELERATOR", "cpu")
            assert_near(found, train(make(), batches, changes))


# --- on the emulator


def emulated_library() -> Path | None:
    given = os.environ.get("BITFALL_EMULATED_CUDA_LIBRARY")
    found = sorted(ROOT.glob("build/*/tests/cuda_emulation/libbitfall_cuda_emulated.so"))
    return Path(given) if given else (found[-1] if found else None)


def test_training_on_the_emulator_equals_the_cpus() -> None:
    library = emulated_library()
    if library is None:
        pytest.skip("tests/cuda_emulation is not built")
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment() | {"BITFALL_CUDA_LIBRARY": str(library)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "belongs to another build" in done.stderr:
        pytest.skip(f"{library} is of another build than the module")
    assert done.returncode == 0, done.stderr


def pointer_to_device(capsule: Any) -> Any:
    """The DLDevice {type, id} of a capsule: behind the data pointer of its DLTensor."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = get(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_int32 * 2)).contents


def run_on_the_emulator() -> None:
    """Trains by the emulated GPU and by the CPU, which must agree."""
    import_capsule = torch.from_dlpack
    seen: list[tuple[int, int]] = []

    def as_host_memory(capsule: Any) -> Any:
        device = pointer_to_device(capsule)
        seen.append(tuple(device))
        device[0], device[1] = 1, 0
        return import_capsule(capsule)

    torch.from_dlpack = as_host_memory
    for make, batches, changes in scenarios():
        placement.choose = lambda *_: placement.Placement(torch.device("cpu"), placement.CPU)
        expected = train(make(), batches, changes)
        seen.clear()
        placement.choose = lambda *_: placement.Placement(torch.device("cpu"), ("cuda", 0, None))
        found = train(make(), batches, changes)
        assert set(seen) == {(KDL_CUDA, 0)}, seen
        assert_near(found, expected)


def assert_near(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-3, atol=2e-5, msg=name)


def scenarios() -> list[Any]:
    """(model, micro-batches, changes of the config): PyTorch and the native encoder."""
    from bridge_models import batches
    from native_bert import inputs_of, make_model

    moq = {
        "enabled": True,
        "quantize_bits": {"start_bits": 12, "target_bits": 8},
        "quantize_schedule": {"quantize_period": 1, "schedule_offset": 1},
    }
    with_eigenvalues = {**moq, "eigenvalue": {"enabled": True, "layer_name": "layers"}}
    bert = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return [
        (tiny_without_dropout, batches(4), {"quantize_training": with_eigenvalues}),
        (tiny_without_dropout, batches(4), {"gradient_accumulation_steps": 2}),
        (lambda: make_model(**bert), [inputs_of()] * 2, {"quantize_training": moq}),
    ]


def tiny_without_dropout() -> Any:
    model = tiny()
    model.dropout.p = 0.0
    return model


def train(model: Any, micro_batches: list[Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The weights afterwards."""
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-3}}
    engine = bitfall.initialize(model=model, config={**CONFIG, "optimizer": optimizer, **changes})[
        0
    ]
    for batch in data.on_device(micro_batches, engine.device):
        loss = engine(**batch).loss if isinstance(batch, dict) else engine(*batch)
        engine.backward(loss)
        engine.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


if __name__ == "__main__":
    run_on_the_emulator()
