"""MoQ and eigenvalues of any torch module."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import bitfall  # noqa: E402
from bitfall import _core  # noqa: E402
from bitfall.bridge import layout  # noqa: E402
from bitfall.errors import UsageError  # noqa: E402
from bridge_models import CONFIG, batches, needs_fp16, tiny  # noqa: E402

MOQ = {
    "enabled": True,
    "quantize_bits": {"start_bits": 8, "target_bits": 4},
    "quantize_schedule": {"quantize_period": 2, "schedule_offset": 1},
}
EIGENVALUE = {"enabled": True, "layer_name": "layers", "layer_num": 3, "tol": 1e-4, "max_iter": 200}


def moq_engine(model: Any, eigenvalue: dict[str, Any] | None = None, **changes: Any) -> Any:
    quantize = {**MOQ, "eigenvalue": eigenvalue} if eigenvalue else MOQ
    config = {**CONFIG, "quantize_training": quantize, **changes}
    return bitfall.initialize(model=model, config=config)[0]


def train(engine: Any, data: list[Any]) -> list[Any]:
    results = []
    for batch in data:
        engine.backward(engine(*batch))
        if engine.is_gradient_accumulation_boundary():
            engine.step()
            results.append(engine.last_result)
        else:
            engine.step()
    return results


def exact_eigenvalues(model: Any, data: list[Any]) -> list[float]:
    """Largest |eigenvalue| of each layer's Hessian of the mean loss, from the whole matrix."""
    values = []
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    for index in range(len(model.layers)):
        names = [name for name in parameters if name.startswith(f"layers.{index}.")]
        shapes = [parameters[name].shape for name in names]

        def loss(flat: Any, names: Any = names, shapes: Any = shapes) -> Any:
            parts = flat.split([shape.numel() for shape in shapes])
            own = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
            state = {**parameters, **buffers, **own}
            calls = [torch.func.functional_call(model, state, batch) for batch in data]
            return sum(calls) / len(calls)

        flat = torch.cat([parameters[name].detach().reshape(-1) for name in names])
        hessian = torch.autograd.functional.hessian(loss, flat)
        values.append(torch.linalg.eigvalsh(hessian).abs().max().item())
    return values


@pytest.mark.parametrize("accumulation", [1, 2])
def test_eigenvalues_are_those_of_the_whole_hessian(accumulation: int) -> None:
    """At the quantized weights of the forward passes, with dropout off."""
    model = tiny(width=4)
    engine = moq_engine(model, EIGENVALUE, gradient_accumulation_steps=accumulation)
    data = batches(4 * accumulation)
    while not engine.updater.needs_eigenvalues:
        train(engine, data[:accumulation])
    expected = exact_eigenvalues(model.eval(), data[-accumulation:])
    model.train()
    found = train(engine, data[-accumulation:])[-1]["eigenvalues"]
    assert [entry["value"] for entry in found] == pytest.approx(expected, rel=5e-3)
    assert [entry["name"] for entry in found] == ["layers.0", "layers.1", "layers.2"]
    assert max(entry["normalized"] for entry in found) == 1.0
    assert all(module.training for module in model.modules())


def test_products_leave_training_as_it_is() -> None:
    """Random numbers, gradients and weights go on as without eigenvalues."""
    data = batches(3)
    torch.manual_seed(8)
    without = train(moq_engine(tiny()), data)
    torch.manual_seed(8)
    engine = moq_engine(tiny(), {**EIGENVALUE, "gas_boundary_resolution": 1})
    with_them = train(engine, data)
    assert any(result["eigenvalues"] for result in with_them)
    assert [r["loss"] for r in with_them] == [r["loss"] for r in without]


def test_bits_fall_as_planned_and_weights_lie_on_the_grid() -> None:
    model = tiny()
    engine = moq_engine(model)
    plan = {state["name"]: state["drops"] for state in engine.updater.plan()}
    assert list(plan) == ["layers.0", "layers.1", "layers.2", "other"]
    for result in train(engine, batches(6)):
        for name, drops in plan.items():
            planned = [bits for bits, step in drops if step <= result["step"]]
            assert result["bits"][name] == (planned[-1] if planned else 32), (name, result["step"])
    levels = model.layers[0].dense.weight.unique().numel()
    assert 4 <= levels <= 2 ** engine.bits()["layers.0"]
    assert model.layers[0].dense.bias.unique().numel() > 8


def test_layers_below_that_are_frozen_keep_their_numbers() -> None:
    model = tiny()
    model.embed.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    engine = moq_engine(model, EIGENVALUE)
    assert [state["name"] for state in engine.updater.plan()][:2] == ["layers.1", "layers.2"]
    results = train(engine, batches(4))
    found = next(r["eigenvalues"] for r in results if r["eigenvalues"])
    assert [entry["name"] for entry in found] == ["layers.1", "layers.2"]


def test_a_loss_outside_of_the_model() -> None:
    class WithoutLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

        def forward(self, x: Any) -> Any:
            return self.layers(x)

    engine = moq_engine(WithoutLoss(), {**EIGENVALUE, "layer_num": 2})
    with pytest.raises(UsageError, match="return the loss"):
        engine(torch.ones(3, 4))


def test_operations_without_a_second_derivative() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            if torch.is_grad_enabled():  # as fused kernels do
                raise RuntimeError("create_graph=True is not supported")
            return gradient * 2

    model = tiny()
    model.layers[1].register_forward_hook(lambda module, args, output: Once.apply(output))
    engine = moq_engine(model, EIGENVALUE)
    with pytest.raises(_core.UnsupportedError, match="no second derivative"):
        train(engine, batches(4))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_name": "bert.encoder.layer"}, "the model's layers are 'layers'"),
        ({"layer_num": 4}, "the model has 3 layers"),
    ],
)
def test_layers_that_the_model_has_not(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(_core.ConfigError, match=words):
        moq_engine(tiny(), {**EIGENVALUE, **changes})


def test_blocks_of_names() -> None:
    names = ["embed.weight", "enc.layer.0.a", "enc.layer.0.b", "enc.layer.2.a", "dec.0.a", "bias"]
    numbers = layout.block_numbers(names, None)
    assert numbers == {**dict.fromkeys(names, -1), names[1]: 0, names[2]: 0, names[3]: 1}
    assert layout.block_numbers(names, "dec")["dec.0.a"] == 0
    sequential = layout.block_numbers(["0.weight", "0.bias", "2.weight"], None)
    assert sequential == {"0.weight": 0, "0.bias": 0, "2.weight": 1}


@needs_fp16
def test_fp16_module_with_eigenvalues() -> None:
    engine = moq_engine(tiny(), EIGENVALUE, fp16={"enabled": True, "initial_scale_power": 8})
    results = train(engine, batches(4))
    found = next(r["eigenvalues"] for r in results if r["eigenvalues"])
    assert all(entry["value"] > 0 for entry in found)
