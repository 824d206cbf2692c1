"""Training goes on from a DeepSpeed checkpoint exactly as it would have without the change."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("torch")

from bitfall._core import CheckpointError
from bitfall.deepspeed_checkpoint import read_deepspeed_checkpoint
from bitfall.deepspeed_checkpoint.convert import write_for_engine
from deepspeed_files import Run
from tiny_engine import make_batch, make_engine

FP16 = {"fp16": {"enabled": True, "initial_scale_power": 10}}


def as_deepspeed(folder, **options) -> Run:
    """The run that an engine's checkpoint describes."""
    moments = load_file(folder / "optimizer.safetensors")
    state = json.loads((folder / "state.json").read_text())
    return Run(
        masters=load_file(folder / "model.safetensors"),
        **{
            end: {n.removesuffix(f".{end}"): a for n, a in moments.items() if n.endswith(f".{end}")}
            for end in ("exp_avg", "exp_avg_sq")
        },
        step=state["optimizer_steps"],
        global_steps=state["global_step"] + state["skipped_steps"],
        skipped_steps=state["skipped_steps"],
        **options,
    )


def shapes_and_state(folder):
    """What write_for_engine needs to know of the engine that wrote `folder`."""
    shapes = {name: a.shape for name, a in load_file(folder / "model.safetensors").items()}
    return shapes, (folder / "state.json").read_text()


def losses(engine, count: int) -> list[float]:
    return [engine.train_batch([make_batch()])["loss"] for _ in range(count)]


@pytest.mark.parametrize(
    ("options", "sections"),
    [
        ({"stage": 2, "ranks": 3, "groups": 2}, {}),
        ({"stage": 0, "groups": 2}, {}),
        ({"stage": 1, "ranks": 2, "dtype": "bf16"}, {"bf16": {"enabled": True}}),
    ],
    ids=["stage2", "stage0", "bf16"],
)
def test_training_goes_on_bit_for_bit(tmp_path, tiny_model_dir, options, sections):
    engine = make_engine(tiny_model_dir, **sections)
    losses(engine, 3)
    engine.save_checkpoint(str(tmp_path / "own"), "three", "{}")
    run = as_deepspeed(tmp_path / "own" / "three", **options)
    run.write(tmp_path / "theirs")
    expected = losses(engine, 3)

    fresh = make_engine(tiny_model_dir, **sections)
    fresh.save_checkpoint(str(tmp_path / "fresh"), "zero", "{}")
    shapes, state = shapes_and_state(tmp_path / "fresh" / "zero")
    found = read_deepspeed_checkpoint(tmp_path / "theirs", parameter_groups=run.names)
    write_for_engine(found, shapes, state, tmp_path / "made" / "tag", with_moments=True)
    fresh.load_checkpoint(str(tmp_path / "made"), "tag")
    assert fresh.global_step == 3
    assert losses(fresh, 3) == expected


def converted(tmp_path, run: Run, state: dict, with_moments=True) -> dict:
    """state.json of a converted `run`; `state` is the engine's."""
    run.write(tmp_path / "theirs")
    found = read_deepspeed_checkpoint(tmp_path / "theirs")
    made = tmp_path / "made"
    write_for_engine(found, run.shapes, json.dumps(state), made, with_moments)
    return json.loads((made / "state.json").read_text())


ENGINE_STATE = {
    "config": {"fp16": {"enabled": True, "loss_scale": 0}},
    "loss_scaler": {"scale": 2.0, "iteration": 0, "last_overflow_iteration": -1, "hysteresis": 7},
    "bit_schedule": {"ticks": 11},
}


def test_counters_and_loss_scale(tmp_path):
    state = converted(tmp_path, Run(dtype="fp16"), ENGINE_STATE)
    assert (state["global_step"], state["skipped_steps"], state["boundaries"]) == (4, 1, 5)
    assert state["optimizer_steps"] == 4
    assert state["loss_scaler"] == {
        "scale": 512.0,
        "iteration": 6,
        "last_overflow_iteration": 2,
        "hysteresis": 1,
    }
    assert state["bit_schedule"] == ENGINE_STATE["bit_schedule"]


def test_loss_scale_stays_where_the_file_has_none_or_the_engine_a_fixed_one(tmp_path):
    state = converted(tmp_path, Run(stage=1), ENGINE_STATE)
    assert state["loss_scaler"] == ENGINE_STATE["loss_scaler"]
    fixed = ENGINE_STATE | {"config": {"fp16": {"enabled": True, "loss_scale": 128}}}
    state = converted(tmp_path / "fixed", Run(dtype="fp16"), fixed)
    assert state["loss_scaler"] == ENGINE_STATE["loss_scaler"]
    unfused = Run(stage=0, dtype="fp16", optimizer="unfused")
    state = converted(tmp_path / "unfused", unfused, ENGINE_STATE)
    assert state["loss_scaler"]["scale"] == 512.0
    assert state["loss_scaler"]["hysteresis"] == 7


def test_moments_that_are_missing_are_zero_or_left_to_the_caller(tmp_path):
    run = Run()
    run.write(tmp_path / "theirs")
    found = read_deepspeed_checkpoint(tmp_path / "theirs")
    del found.exp_avg["hidden.bias"]
    shapes, state = run.shapes, json.dumps(ENGINE_STATE)
    write_for_engine(found, shapes, state, tmp_path / "made", with_moments=True)
    moments = load_file(tmp_path / "made" / "optimizer.safetensors")
    assert not moments["hidden.bias.exp_avg"].any()
    np.testing.assert_array_equal(moments["hidden.bias.exp_avg_sq"], run.exp_avg_sq["hidden.bias"])
    write_for_engine(found, shapes, state, tmp_path / "without", with_moments=False)
    assert load_file(tmp_path / "without" / "optimizer.safetensors") == {}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("elsewhere", (2,), "'elsewhere' is not there"),
        ("hidden.bias", (6,), r"float32 \[5\], but the model has float32 \[6\]"),
        ("position_ids", (6,), "is int64"),
    ],
)
def test_checkpoint_of_another_model(tmp_path, name, shape, message):
    Run().write(tmp_path / "theirs")
    found = read_deepspeed_checkpoint(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=message):
        write_for_engine(found, {name: shape}, "{}", tmp_path / "made", with_moments=True)
