"""The engine's interface: accumulation, schedulers, optimizers, fp16, and what it refuses."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import bitfall  # noqa: E402
from bitfall.errors import InputError, UsageError  # noqa: E402
from bridge_models import CONFIG, batches, needs_fp16, tiny  # noqa: E402


def start(model: Any = None, **changes: Any) -> Any:
    """(engine, optimizer, loader, scheduler) of a Tiny with some keys of CONFIG changed."""
    return bitfall.initialize(model=model or tiny(), config={**CONFIG, **changes})


def train(engine: Any, steps: int) -> list[float]:
    losses = []
    for batch in batches(steps):
        torch.manual_seed(3)
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_it_learns() -> None:
    losses = train(start()[0], 60)
    assert losses[-1] < 0.8 * losses[0]


def test_steps_happen_at_boundaries_only() -> None:
    engine = start(gradient_accumulation_steps=2)[0]
    before = weights(engine.module)
    train(engine, 1)
    assert_equal(weights(engine.module), before)
    assert (engine.global_steps, engine.micro_steps) == (0, 1)
    assert engine.is_gradient_accumulation_boundary()
    train(engine, 1)
    assert (engine.global_steps, engine.micro_steps, engine.global_samples) == (1, 2, 8)
    assert engine.train_batch_size() == 8
    assert engine.get_global_grad_norm() > 0


def test_the_caller_may_say_where_boundaries_are() -> None:
    """As accelerate does: step() at the boundary only, losses divided by the caller."""
    ours, theirs = start(gradient_accumulation_steps=2)[0], start()[0]
    data = batches(2)
    torch.manual_seed(3)
    for batch in data:
        ours.backward(ours(*batch))
        ours.step()
    torch.manual_seed(3)
    for index, batch in enumerate(data):
        theirs.set_gradient_accumulation_boundary(is_boundary=index == 1)
        theirs.backward(theirs(*batch) / 2, scale_wrt_gas=False)
    theirs.step()
    assert theirs.global_steps == 1
    assert_equal(weights(ours.module), weights(theirs.module))


def test_no_sync_and_train_batch() -> None:
    engine = start(gradient_accumulation_steps=2)[0]
    loss = engine.train_batch(iter(batches(2)))
    assert loss.item() > 0
    assert engine.global_steps == 1
    with engine.no_sync():
        engine.backward(engine(*batches(1)[0]))
        with pytest.raises(UsageError, match="no_sync"):
            engine.step()
    engine.step()


def test_training_data_becomes_a_loader() -> None:
    data = [(ids[0], labels[0]) for ids, labels in batches(6, size=1)]
    engine, _, loader, _ = bitfall.initialize(model=tiny(), config=CONFIG, training_data=data)
    assert [len(labels) for _, labels in loader] == [4, 2]
    engine.train_batch()
    assert engine.global_steps == 1


def test_set_train_batch_size() -> None:
    engine = start()[0]
    engine.set_train_batch_size(12)
    assert engine.gradient_accumulation_steps() == 3
    with pytest.raises(InputError, match="multiple of"):
        engine.set_train_batch_size(10)


def test_a_schedule_of_the_config() -> None:
    params = {"warmup_min_lr": 0, "warmup_max_lr": 0.4, "warmup_num_steps": 4}
    params["warmup_type"] = "linear"
    engine, optimizer, _, schedule = start(scheduler={"type": "WarmupLR", "params": params})
    assert type(schedule).__name__ == "WarmupLR"
    rates = []
    for _ in range(6):
        rates += schedule.get_last_lr()
        train(engine, 1)
    assert rates == pytest.approx([0, 0, 0.1, 0.2, 0.3, 0.4])
    assert optimizer.param_groups[0]["lr"] == engine.get_lr()[0] == pytest.approx(0.4)
    state = schedule.state_dict()
    schedule.load_state_dict({**state, "last_batch_iteration": 1})
    assert engine.get_lr() == pytest.approx([0.1])


def test_torchs_schedulers_take_effect(recwarn: pytest.WarningsRecorder) -> None:
    def halves(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    engine, _, _, schedule = bitfall.initialize(model=tiny(), config=CONFIG, lr_scheduler=halves)
    rates = []
    for _ in range(3):
        train(engine, 1)
        rates.append(engine.last_result["learning_rate"])
    assert rates == [1e-2, 5e-3, 2.5e-3]
    assert schedule.get_last_lr() == [1.25e-3]
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


def test_clipping_limits_the_step() -> None:
    engine = start(
        gradient_clipping=1e-3, optimizer={"type": "Adam", "params": {"lr": 0.1, "eps": 1.0}}
    )[0]
    before = weights(engine.module)
    train(engine, 1)
    change = max((p - before[n]).abs().max() for n, p in weights(engine.module).items())
    assert 0 < change < 0.1 * 1e-3
    assert engine.get_global_grad_norm() > 1e-3


@pytest.mark.parametrize("decoupled", [True, False])
def test_torchs_adam_runs_as_the_engines(decoupled: bool) -> None:
    """Their groups, and what schedulers write into them, hold."""
    optimizer_class = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = tiny()
    theirs = optimizer_class(reference.parameters(), lr=1e-2, weight_decay=0.1)
    model = tiny()
    client = optimizer_class(model.parameters(), lr=1e-2, weight_decay=0.1)
    config = {key: value for key, value in CONFIG.items() if key != "optimizer"}
    engine, optimizer, _, _ = bitfall.initialize(model=model, optimizer=client, config=config)
    for step, batch in enumerate(batches(8)):
        for group in (*client.param_groups, *theirs.param_groups):
            group["lr"] = 1e-2 / (1 + step)
        torch.manual_seed(3)
        engine.backward(engine(*batch))
        engine.step()
        torch.manual_seed(3)
        reference(*batch).backward()
        for parameter in reference.unused.parameters():
            parameter.grad = torch.zeros_like(parameter)
        theirs.step()
        theirs.zero_grad()
    assert engine.get_lr() == [1e-2 / 8]
    for name, value in weights(reference).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-4, atol=1e-5, msg=name)
    ours = optimizer.state[model.embed.weight]["exp_avg"]
    torch.testing.assert_close(
        ours, theirs.state[reference.embed.weight]["exp_avg"], rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_any_torch_optimizer_steps_on_the_masters(dtype: str) -> None:
    """SGD with momentum, as plain PyTorch on f32 copies of the weights."""
    model, reference = tiny(), tiny()
    client = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    config = {key: value for key, value in CONFIG.items() if key != "optimizer"}
    config |= {"gradient_clipping": 0.5}
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
        reference.bfloat16()
    engine, optimizer, _, _ = bitfall.initialize(model=model, optimizer=client, config=config)
    masters = [p.detach().clone() for p in tiny().parameters()]
    theirs = torch.optim.SGD(masters, lr=0.1, momentum=0.9)
    for batch in batches(5):
        torch.manual_seed(3)
        engine.backward(engine(*batch))
        engine.step()
        torch.manual_seed(3)
        reference(*batch).backward()
        for master, parameter in zip(masters, reference.parameters(), strict=True):
            gradient = parameter.grad if parameter.grad is not None else parameter * 0
            master.grad = gradient.detach().float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 0.5)
        theirs.step()
        with torch.no_grad():
            for master, parameter in zip(masters, reference.parameters(), strict=True):
                parameter.copy_(master)
    for (name, ours), expected in zip(weights(model).items(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-2, atol=1e-5, msg=name)
    assert optimizer.param_groups is client.param_groups
    assert len(client.state_dict()["state"]) == len(masters)


@needs_fp16
def test_fp16_overflow_skips_the_step() -> None:
    fp16 = {"enabled": True, "initial_scale_power": 40, "hysteresis": 1}
    engine, optimizer, _, _ = start(fp16=fp16)
    before = weights(engine.module)
    train(engine, 1)
    assert optimizer.overflow
    assert (engine.global_steps, engine.skipped_steps) == (1, 1)
    assert engine.loss_scale() == 2.0**39
    assert not engine.was_step_applied()
    assert_equal(weights(engine.module), before)
    while optimizer.overflow:
        train(engine, 1)
    assert engine.was_step_applied()
    assert not torch.equal(engine.module.head.bias, before["head.bias"])


def test_the_engine_stands_for_the_module() -> None:
    engine = start()[0]
    assert isinstance(engine, torch.nn.Module)
    assert engine.embed is engine.module.embed
    assert [id(p) for p in engine.parameters()] == [id(p) for p in engine.module.parameters()]
    engine.eval()
    assert not engine.module.dropout.training
    assert engine.config["gradient_accumulation_steps"] == 1
    assert engine.zero_optimization_stage() == 0
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = engine.no_such_thing


def test_config_from_a_file_and_from_arguments(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text("{ // comments are allowed\n" + json.dumps(CONFIG)[1:-1] + ",}")
    assert bitfall.initialize(model=tiny(), config=str(path))[0].train_batch_size() == 4

    class Arguments:
        deepspeed_config = str(path)

    assert bitfall.initialize(Arguments(), tiny())[0].train_batch_size() == 4


@needs_fp16
def test_what_accelerate_adds_to_a_config_is_accepted() -> None:
    extra = {"steps_per_print": float("inf"), "zero_allow_untested_optimizer": True}
    extra["fp16"] = {"enabled": True, "auto_cast": True}
    extra["bf16"] = {"enabled": False}
    extra["zero_optimization"] = {"stage": 0}
    model = torch.nn.Linear(4, 1)
    engine = bitfall.initialize(model=model, config_params={**CONFIG, **extra})[0]
    assert engine(torch.ones(2, 4)).dtype == torch.float16  # auto_cast


def test_without_an_optimizer_it_evaluates_only() -> None:
    config = {"train_batch_size": 4, "bf16": {"enabled": True}}
    engine, optimizer, _, _ = bitfall.initialize(model=tiny(), config=config)
    assert optimizer is None
    loss = engine(*batches(1)[0])
    assert engine.module.head.bias.dtype == torch.bfloat16
    with pytest.raises(UsageError, match="optimizer"):
        engine.backward(loss)


def test_memory_outlives_the_engine() -> None:
    model = tiny()
    engine = start(model)[0]
    train(engine, 1)
    expected = weights(model)
    del engine
    gc.collect()
    assert_equal(weights(model), expected)
    assert copy.deepcopy(model).embed.weight.shape == (24, 16)
    train(start(model)[0], 1)  # no hook of the first engine is left
