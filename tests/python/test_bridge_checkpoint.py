"""Checkpoints of torch modules: resume is bit for bit, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import bitfall  # noqa: E402
from bitfall import _core  # noqa: E402
from bitfall.bridge import state  # noqa: E402
from bitfall.errors import InputError  # noqa: E402
from bridge_models import CONFIG, batches, needs_fp16, tiny  # noqa: E402

MOQ = {
    "enabled": True,
    "quantize_bits": {"start_bits": 8, "target_bits": 4},
    "quantize_schedule": {"quantize_period": 1, "schedule_offset": 1},
}


def halving(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)


def engine_for(kind: str, seed: int = 0) -> Any:
    model = tiny(seed)
    model.layers[0].norm.weight.requires_grad_(False)
    config: dict[str, Any] = {**CONFIG, "quantize_training": MOQ}
    client = None
    if kind == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 10}
    if kind == "client":
        del config["optimizer"]
        client = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return bitfall.initialize(model=model, config=config, optimizer=client, lr_scheduler=halving)[0]


def train(engine: Any, data: list[Any]) -> list[float]:
    losses = []
    for batch in data:
        torch.manual_seed(3)
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def everything(engine: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}


@pytest.mark.parametrize("kind", ["engine", pytest.param("fp16", marks=needs_fp16), "client"])
def test_resume_equals_an_uninterrupted_run(kind: str, tmp_path: Path) -> None:
    data = batches(8)
    straight = engine_for(kind)
    expected = train(straight, data)

    first = engine_for(kind)
    train(first, data[:4])
    shift = first.module.shift.clone()
    first.module.shift.add_(1.0)  # a buffer that changes
    first.save_checkpoint(tmp_path, client_state={"epoch": 2, "noise": torch.arange(3)})
    assert (tmp_path / "latest").read_text() == "global_step4"
    assert not list(tmp_path.rglob("*.pt"))

    second = engine_for(kind, seed=9)
    path, client_state = second.load_checkpoint(tmp_path)
    assert path == str(tmp_path / "global_step4")
    assert client_state["epoch"] == 2
    assert torch.equal(client_state["noise"], torch.arange(3))
    assert torch.equal(second.module.shift, first.module.shift)
    second.module.shift.copy_(shift)
    assert second.global_steps == 4
    assert train(second, data[4:]) == expected[4:]
    final = everything(straight)
    for name, value in everything(second).items():
        assert torch.equal(value, final[name]), name
    assert second.get_lr() == straight.get_lr()
    assert second.bits() == straight.bits()


def test_weights_without_the_optimizer(tmp_path: Path) -> None:
    first = engine_for("engine")
    train(first, batches(3))
    first.save_checkpoint(tmp_path, tag="mine")
    second = engine_for("engine", seed=9)
    second.load_checkpoint(
        tmp_path, "mine", load_optimizer_states=False, load_lr_scheduler_states=False
    )
    assert torch.equal(second.module.head.bias, first.module.head.bias)
    assert second.optimizer.state[second.module.head.bias]["exp_avg"].abs().sum() == 0
    assert second.get_lr() == [1e-2]


def test_nothing_to_load(tmp_path: Path) -> None:
    engine = engine_for("engine")
    assert engine.load_checkpoint(tmp_path) == (None, {})
    with pytest.raises(_core.CheckpointError, match="no such checkpoint"):
        engine.load_checkpoint(tmp_path, "global_step7")


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    engine_for("engine").save_checkpoint(tmp_path)
    other = bitfall.initialize(model=tiny(depth=2), config=CONFIG)[0]
    with pytest.raises(_core.CheckpointError, match=r"another model|has no"):
        other.load_checkpoint(tmp_path)


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    engine = engine_for("engine")
    engine.save_checkpoint(tmp_path)
    file = tmp_path / "global_step0" / "client.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(_core.CheckpointError, match="cut short"):
        engine.load_checkpoint(tmp_path)


def test_client_state_that_no_checkpoint_can_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"client_state\.it is a object"):
        engine_for("engine").save_checkpoint(tmp_path, client_state={"it": object()})
    assert not (tmp_path / "latest").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_save_16bit_model(name: str, tmp_path: Path) -> None:
    model = tiny()
    engine = bitfall.initialize(model=model, config={**CONFIG, "bf16": {"enabled": True}})[0]
    assert engine.save_16bit_model(tmp_path, name)
    if name.endswith(".bin"):
        loaded = torch.load(tmp_path / name, weights_only=True)
    else:
        loaded = pytest.importorskip("safetensors.torch").load_file(tmp_path / name)
    assert loaded["layers.0.dense.weight"].dtype == torch.bfloat16
    assert torch.equal(loaded["layers.0.dense.weight"], model.layers[0].dense.weight)


def test_states_survive_the_way_through_json() -> None:
    value = {
        "plain": [1, 2.5, True, None, "text"],
        "tuple": (1, (2,)),
        3: float("inf"),
        "nested": {"__tensor__": "a dict of the user"},
        "scalar": torch.tensor(2, dtype=torch.int64),
        "empty": torch.empty(0, 3, dtype=torch.float16),
        "bf16": torch.ones(2, 2, dtype=torch.bfloat16),
    }
    tensors: dict[str, torch.Tensor] = {}
    encoded = state.encode(value, "it", tensors)
    packed = {name: state.pack(name, tensor) for name, tensor in tensors.items()}
    unpacked = {name: state.unpack(value) for name, value in packed.items()}
    decoded = state.decode(encoded, unpacked)
    assert decoded.keys() == value.keys()
    for key in ("plain", "tuple", 3, "nested"):
        assert decoded[key] == value[key]
    for key in ("scalar", "empty", "bf16"):
        assert decoded[key].dtype == value[key].dtype
        assert decoded[key].shape == value[key].shape
        assert torch.equal(decoded[key], value[key])
