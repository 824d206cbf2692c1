"""A torch module goes on from a DeepSpeed checkpoint as plain torch.optim.AdamW would."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

import bitfall
import torch
from bitfall._core import CheckpointError
from bridge_models import batches, tiny
from deepspeed_files import Run

NUMBERS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {**NUMBERS, "lr": 0.5}},
}


def train(model, optimizer, data) -> list[float]:
    """Plain PyTorch; the losses."""
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class TorchRun(Run):
    """The checkpoint that DeepSpeed would write of a model and its AdamW."""

    @classmethod
    def of(cls, model, optimizer, steps: int, **options):
        states = {
            name: optimizer.state[parameter]
            for name, parameter in model.named_parameters()
            if parameter in optimizer.state
        }
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        run = cls(
            masters={name: p.detach().numpy().copy() for name, p in trained.items()},
            exp_avg={name: moment(states, name, "exp_avg", p) for name, p in trained.items()},
            exp_avg_sq={name: moment(states, name, "exp_avg_sq", p) for name, p in trained.items()},
            step=steps,
            global_steps=steps,
            skipped_steps=0,
            weight_decay=(0.1, 0.1),
            **options,
        )
        run.module = {name: value.clone() for name, value in model.state_dict().items()}
        return run


def moment(states, name, key, parameter):
    return states[name][key].numpy().copy() if name in states else np.zeros(parameter.shape, "f4")


@pytest.fixture
def trained():
    """(model, its AdamW) after three steps; dropout off, one parameter frozen."""
    model = tiny().eval()
    model.layers[0].dense.bias.requires_grad_(False)
    model.shift += 0.25
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **NUMBERS)
    train(model, optimizer, batches(3))
    return model, optimizer


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_goes_on_as_adamw_would(tmp_path, trained, stage):
    model, optimizer = trained
    run = TorchRun.of(model, optimizer, 3, stage=stage, ranks=2)
    run.write(tmp_path)
    fresh = tiny(seed=9).eval()
    fresh.layers[0].dense.bias.requires_grad_(False)
    engine, _, _, _ = bitfall.initialize(model=fresh, config=CONFIG)
    path, client_state = engine.load_checkpoint(tmp_path)
    assert (path, client_state["epoch"]) == (str(tmp_path / "global_step5"), 3)
    assert engine.global_steps == 3

    assert_goes_on(engine, model, optimizer)


def assert_goes_on(engine, model, optimizer):
    """Five more steps of the engine are those of plain PyTorch."""
    rest = batches(5, seed=2)
    expected = train(model, optimizer, rest)
    for batch, loss in zip(rest, expected, strict=True):
        seen = engine(*batch)
        assert seen.item() == pytest.approx(loss, rel=1e-5)
        engine.backward(seen)
        engine.step()
    for (name, mine), theirs in zip(
        engine.module.named_parameters(), model.parameters(), strict=True
    ):
        if not name.startswith("unused"):  # without gradient: decays here, as in DeepSpeed
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(engine.module.shift, model.shift, rtol=0, atol=0)


def test_groups_and_their_numbers(tmp_path, trained):
    model, optimizer = trained
    run = TorchRun.of(model, optimizer, 3, stage=1, groups=2)
    run.write(tmp_path)
    fresh = tiny(seed=9)
    fresh.layers[0].dense.bias.requires_grad_(False)
    groups = [
        {"params": [p for p in fresh.parameters() if p.dim() > 1]},
        {"params": [p for p in fresh.parameters() if p.dim() == 1]},
    ]
    engine, optimizer, _, _ = bitfall.initialize(
        model=fresh, model_parameters=groups, config=CONFIG
    )
    engine.load_checkpoint(tmp_path)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_a_torch_optimizer_is_run_by_the_engine(tmp_path, trained):
    """As Hugging Face has it without a section "optimizer"."""
    TorchRun.of(*trained, 3, stage=0, groups=2).write(tmp_path)
    fresh = tiny(seed=9).eval()
    fresh.layers[0].dense.bias.requires_grad_(False)
    names = [n for n, p in fresh.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in fresh.parameters() if p.requires_grad and p.dim() == dims]}
        for dims in (2, 1)
    ]
    assert len(names) == sum(len(group["params"]) for group in groups)
    optimizer = torch.optim.AdamW(groups, lr=0.5)
    config = {key: value for key, value in CONFIG.items() if key != "optimizer"}
    engine, _, _, _ = bitfall.initialize(model=fresh, optimizer=optimizer, config=config)
    engine.load_checkpoint(tmp_path)
    assert_goes_on(engine, *trained)


def test_another_optimizer_gets_the_weights_only(tmp_path, trained):
    TorchRun.of(*trained, 3, stage=1).write(tmp_path)
    fresh = tiny(seed=9)
    fresh.layers[0].dense.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in fresh.parameters() if p.requires_grad], lr=0.1)
    config = {key: value for key, value in CONFIG.items() if key != "optimizer"}
    engine, _, _, _ = bitfall.initialize(model=fresh, optimizer=optimizer, config=config)
    with pytest.raises(CheckpointError, match="only the state of Adam and AdamW"):
        engine.load_checkpoint(tmp_path)
    engine.load_checkpoint(tmp_path, load_optimizer_states=False)
    for mine, theirs in zip(engine.module.parameters(), trained[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_checkpoint_of_another_model_changes_nothing(tmp_path, trained):
    TorchRun.of(*trained, 3, stage=1).write(tmp_path)
    model = tiny(width=8)
    engine, _, _, _ = bitfall.initialize(model=model, config=CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"has shape \[16\] for 'shift', which is \[8\]"):
        engine.load_checkpoint(tmp_path)
    del model.shift
    with pytest.raises(CheckpointError, match=r"'embed\.weight' is float32 \[24, 16\], but"):
        engine.load_checkpoint(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_missing_buffers_are_refused_unless_told_otherwise(tmp_path, trained):
    TorchRun.of(*trained, 3, stage=1).write(tmp_path)
    model = tiny()
    model.layers[0].dense.bias.requires_grad_(False)
    model.register_buffer("extra", torch.ones(2))
    engine, _, _, _ = bitfall.initialize(model=model, config=CONFIG)
    with pytest.raises(CheckpointError, match="has no 'extra'"):
        engine.load_checkpoint(tmp_path)
    engine.load_checkpoint(tmp_path, load_module_strict=False)
    assert torch.equal(model.shift, trained[0].shift)
    assert model.extra.tolist() == [1, 1]


def test_scheduler_goes_on(tmp_path, trained):
    TorchRun.of(*trained, 3, stage=1).write(tmp_path)
    scheduler = {
        "type": "WarmupLR",
        "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 10, "warmup_type": "linear"},
    }
    fresh = tiny(seed=9)
    fresh.layers[0].dense.bias.requires_grad_(False)
    engine, optimizer, _, schedule = bitfall.initialize(
        model=fresh, config={**CONFIG, "scheduler": scheduler}
    )
    engine.load_checkpoint(tmp_path)
    assert schedule.last_batch_iteration == 2
    # 2 of 10 steps, as DeepSpeed counts
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.002)


def test_without_optimizer_states_training_begins_anew_at_the_weights(tmp_path, trained):
    TorchRun.of(*trained, 3, stage=1).write(tmp_path)
    fresh = tiny(seed=9)
    fresh.layers[0].dense.bias.requires_grad_(False)
    engine, optimizer, _, _ = bitfall.initialize(model=fresh, config=CONFIG)
    engine.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert optimizer.param_groups[0]["lr"] == 0.5
    for mine, theirs in zip(engine.module.parameters(), trained[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    moments = [optimizer.state[p]["exp_avg"] for p in optimizer.state]
    assert moments
    assert not any(moment.any() for moment in moments)
