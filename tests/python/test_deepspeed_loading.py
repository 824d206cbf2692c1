"""A torch module goes on from a DeepSpeed checkpoint as plain torch.optim.AdamW would."""

from __future__ import annotations

import copy

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")

import bitfall
import torch
from bitfall._core import CheckpointError
from bitfall.bridge.deepspeed_loading import (
    client_optimizer_state,
    load_deepspeed_checkpoint,
    restore_rest,
    restore_updater,
)
from bitfall.deepspeed_checkpoint import read_deepspeed_checkpoint
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
    path, client_state = load_deepspeed_checkpoint(engine, tmp_path, None)
    assert (path, client_state["epoch"]) == (str(tmp_path / "global_step5"), 3)
    assert engine.global_steps == 3

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
    load_deepspeed_checkpoint(engine, tmp_path, None)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_a_torch_optimizer_gets_its_state(tmp_path, trained):
    model, optimizer = trained
    TorchRun.of(model, optimizer, 3, stage=1).write(tmp_path)
    found = read_deepspeed_checkpoint(tmp_path)
    fresh = copy.deepcopy(model)
    names = [name for name, p in fresh.named_parameters() if p.requires_grad]
    other = torch.optim.AdamW([dict(fresh.named_parameters())[name] for name in names], lr=0.5)
    groups = [{key: value for key, value in other.param_groups[0].items() if key != "params"}]
    other.load_state_dict(client_optimizer_state(found, groups, [names]))
    rest = batches(4, seed=2)
    assert train(fresh, other, rest) == train(model, optimizer, rest)


def test_checkpoint_of_another_model_changes_nothing(tmp_path, trained):
    TorchRun.of(*trained, 3, stage=1).write(tmp_path)
    found = read_deepspeed_checkpoint(tmp_path)
    engine, _, _, _ = bitfall.initialize(model=tiny(width=8), config=CONFIG)
    before = [parameter.clone() for parameter in engine.module.parameters()]
    parts = engine._trained, engine._communicator
    with pytest.raises(CheckpointError, match=r"'embed\.weight' is float32 \[24, 16\], but"):
        restore_updater(found, engine._updater, *parts, with_moments=True)
    for old, new in zip(before, engine.module.parameters(), strict=True):
        assert torch.equal(old, new)
    with pytest.raises(CheckpointError, match=r"has shape \[16\] for 'shift', which is \[8\]"):
        restore_rest(found, engine.module, engine._trained, strict=True)
    other = tiny()
    other.register_buffer("extra", torch.zeros(2))
    with pytest.raises(CheckpointError, match="has no 'extra'"):
        restore_rest(found, other, [], strict=True)
    restore_rest(found, other, [], strict=False)
    assert torch.equal(other.shift, trained[0].shift)


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
    load_deepspeed_checkpoint(engine, tmp_path, None)
    assert schedule.last_batch_iteration == 2
    # 2 of 10 steps, as DeepSpeed counts
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.002)


def test_without_optimizer_states_training_begins_anew_at_the_weights(tmp_path, trained):
    TorchRun.of(*trained, 3, stage=1).write(tmp_path)
    fresh = tiny(seed=9)
    fresh.layers[0].dense.bias.requires_grad_(False)
    engine, optimizer, _, _ = bitfall.initialize(model=fresh, config=CONFIG)
    load_deepspeed_checkpoint(engine, tmp_path, None, optimizer_states=False)
    assert optimizer.param_groups[0]["lr"] == 0.5
    for mine, theirs in zip(engine.module.parameters(), trained[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not any(torch.from_dlpack(m).any() for m in engine._updater.capsules("exp_avg"))
