"""bitfall.initialize on plain modules: gradients are PyTorch's own, and the step is Adam's."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import bitfall  # noqa: E402
from bridge_models import CONFIG, batches, needs_fp16, plain_gradients, tiny  # noqa: E402


def engine_for(model: Any, **changes: Any) -> Any:
    return bitfall.initialize(model=model, config={**CONFIG, **changes})[0]


def gradients_of(engine: Any) -> dict[str, torch.Tensor]:
    """What the engine has accumulated, zeros where nothing came."""
    engine.gradients.finish()
    slices = zip(engine.trained, engine.gradients._slices, strict=True)
    return {entry.name: gradient.clone() for entry, gradient in slices}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_equal_plain_pytorch_bit_for_bit(accumulation: int) -> None:
    model = tiny()
    data = batches(accumulation)
    torch.manual_seed(5)  # dropout
    expected = plain_gradients(model, data)
    engine = engine_for(model, gradient_accumulation_steps=accumulation)
    torch.manual_seed(5)
    for index, batch in enumerate(data):
        engine.backward(engine(*batch))
        if index + 1 < accumulation:
            engine.step()
    found = gradients_of(engine)
    assert set(found) - set(expected) == {"unused.weight", "unused.bias"}
    for name, gradient in found.items():
        assert torch.equal(gradient, expected.get(name, torch.zeros_like(gradient))), name


def test_ten_steps_follow_torchs_adamw() -> None:
    model = tiny()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.1)
    engine = engine_for(model)
    for batch in batches(10):
        torch.manual_seed(3)
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        torch.manual_seed(3)
        reference(*batch).backward()
        for parameter in reference.unused.parameters():  # DeepSpeed: no gradient counts as zeros
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    assert engine.global_steps == 10


def test_tied_parameters_stay_tied() -> None:
    model = tiny()
    engine = engine_for(model)
    engine.backward(engine(*batches(1)[0]))
    engine.step()
    assert model.head.weight is model.embed.weight
    assert [entry.name for entry in engine.trained].count("embed.weight") == 1


def test_frozen_parameters_keep_their_values() -> None:
    model = tiny()
    model.embed.weight.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    engine = engine_for(model)
    for batch in batches(3):
        engine.backward(engine(*batch))
        engine.step()
    for name, value in before.items():
        assert torch.equal(dict(model.named_parameters())[name], value), name
    assert "embed.weight" not in gradients_of(engine)
    assert not torch.equal(model.layers[1].dense.weight, tiny().layers[1].dense.weight)


def test_parameters_that_are_not_in_model_parameters_stay() -> None:
    model = tiny()
    head = [model.head.bias]
    engine = bitfall.initialize(model=model, model_parameters=head, config=CONFIG)[0]
    for batch in batches(2):
        engine.backward(engine(*batch))
        engine.step()
    assert list(gradients_of(engine)) == ["head.bias"]
    assert torch.equal(model.layers[0].dense.weight, tiny().layers[0].dense.weight)
    assert not torch.equal(model.head.bias, tiny().head.bias)


def test_groups_have_their_own_numbers() -> None:
    model = tiny(depth=2)
    groups = [
        {"params": model.layers.parameters(), "lr": 0.0},
        {"params": [model.head.bias], "lr": 0.5, "weight_decay": 0.0},
    ]
    engine, optimizer, _, _ = bitfall.initialize(
        model=model, model_parameters=groups, config=CONFIG
    )
    engine.backward(engine(*batches(1)[0]))
    engine.step()
    assert torch.equal(model.layers[1].dense.weight, tiny(depth=2).layers[1].dense.weight)
    moved = (model.head.bias - tiny(depth=2).head.bias).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5), rtol=1e-3, atol=0)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1

    optimizer.param_groups[0]["lr"] = 0.1  # as a scheduler does
    engine.backward(engine(*batches(1)[0]))
    engine.step()
    assert not torch.equal(model.layers[1].dense.weight, tiny(depth=2).layers[1].dense.weight)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=needs_fp16)])
def test_sixteen_bits_sum_gradients_in_f32(dtype: str) -> None:
    precision = {"enabled": True, "loss_scale": 8} if dtype == "fp16" else {"enabled": True}
    model = tiny()
    model.dropout.p = 0.0
    half = copy.deepcopy(model).to(torch.bfloat16 if dtype == "bf16" else torch.float16)
    engine = engine_for(model, gradient_accumulation_steps=2, **{dtype: precision})
    data = batches(2)
    for index, batch in enumerate(data):
        engine.backward(engine(*batch))
        if index == 0:
            engine.step()
    expected: dict[str, torch.Tensor] = {}
    scale = 8 if dtype == "fp16" else 1
    for batch in data:
        half.zero_grad()
        (half(*batch) / 2 * scale).backward()
        for name, parameter in half.named_parameters():
            if parameter.grad is not None:
                expected[name] = expected.get(name, 0) + parameter.grad.float()
    assert model.embed.weight.dtype == half.embed.weight.dtype
    assert model.shift.dtype == half.shift.dtype
    for name, gradient in gradients_of(engine).items():
        assert torch.equal(gradient, expected.get(name, torch.zeros_like(gradient))), name
    assert all(p.grad is None for p in model.parameters())


def test_sparse_embedding_gradients_arrive() -> None:
    torch.manual_seed(0)
    model = torch.nn.Embedding(10, 4, sparse=True)
    engine = bitfall.initialize(model=model, config=CONFIG)[0]
    engine.backward(engine(torch.tensor([1, 1, 3])).sum())
    gradient = gradients_of(engine)["weight"]
    assert gradient[1].tolist() == [2.0] * 4
    assert gradient[3].tolist() == [1.0] * 4
    assert gradient[0].tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_has_the_gradient_of_each_step_alone(dtype: Any) -> None:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(10, 4)
    model = torch.nn.Sequential(embedding, torch.nn.Linear(4, 3)).to(dtype)
    engine = engine_for(model, bf16={"enabled": dtype == torch.bfloat16})
    for words in ([1, 1, 3], [5, 3], [0]):
        plain = copy.deepcopy(model)
        plain(torch.tensor(words)).square().sum().backward()
        engine.backward(engine(torch.tensor(words)).square().sum())
        assert torch.equal(gradients_of(engine)["0.weight"], plain[0].weight.grad.float())
        engine.step()
