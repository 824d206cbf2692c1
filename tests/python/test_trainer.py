"""The training loop's logic, with an engine that only remembers what it was given."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bitfall.arguments import GlueArguments
from bitfall.batches import BatchPlan
from bitfall.checkpoints import (
    checkpoint_to_resume,
    last_checkpoint,
    list_checkpoints,
    remove_old_checkpoints,
)
from bitfall.data import TokenizedData
from bitfall.errors import ArgumentsError, DataError
from bitfall.interrupt import StopRequest
from bitfall.progress import Progress
from bitfall.recorder import Recorder
from bitfall.trainer import Intervals, LoopState, Trainer, load_position
from bitfall.training_log import TrainingLog

CONFIG = SimpleNamespace(json="{}", steps_per_print=10)
IDENTITY = {"task": "toy", "seed": 5}


class FakeEngine:
    """Its one weight is a checksum of all batches so far, so that loss tells their order."""

    def __init__(self):
        self.weight, self.steps, self.stop_at = 0.0, 0, -1

    def train_batch(self, micro_batches):
        ids = np.concatenate([batch["input_ids"] for batch in micro_batches])
        self.weight = (self.weight * 31 + float((ids * np.arange(1, len(ids) + 1)).sum())) % 1009
        self.steps += 1
        if self.steps == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {
            "step": self.steps,
            "loss": self.weight,
            "grad_norm": 1.0,
            "learning_rate": 0.1,
            "loss_scale": 1.0,
            "skipped": False,
            "bits": {"layer.0": 8, "other": 8},
            "drops": [],
            "eigenvalues": [],
        }

    def save_checkpoint(self, directory, tag, client_state):
        folder = Path(directory, tag)
        folder.mkdir()
        state = {"weight": self.weight, "steps": self.steps, "client": client_state}
        (folder / "state.json").write_text(json.dumps(state))
        Path(directory, "latest").write_text(tag)

    def load_checkpoint(self, directory, tag=None):
        state = json.loads(Path(directory, tag, "state.json").read_text())
        self.weight, self.steps = state["weight"], state["steps"]
        return state["client"]

    def timings(self):
        return {"forward": 0.5}


def toy_data(count: int = 23) -> TokenizedData:
    ids = np.arange(count, dtype=np.int32)
    return TokenizedData(ids, ids * 0, np.arange(count + 1), ids % 2)


def make_trainer(folder: Path, alone, engine: FakeEngine, state: LoopState, **flags):
    """23 examples in batches of 5: 5 steps an epoch, 10 in all."""
    folder.mkdir(exist_ok=True)
    options = {"output_dir": str(folder), "num_train_epochs": 2.0, "logging_steps": 3} | flags
    arguments = GlueArguments(model_name_or_path="m", task_name="rte", do_train=True, **options)
    plan = BatchPlan(23, 5, 5, 5)
    total_steps = plan.total_steps(arguments.num_train_epochs, arguments.max_steps)
    log = TrainingLog(folder / "log.jsonl", state.log_offset)
    recorder = Recorder(CONFIG, Progress(), log, None)
    trainer = Trainer(
        engine,
        toy_data(),
        plan,
        Intervals.from_arguments(arguments, total_steps),
        arguments,
        recorder,
        alone,
        lambda: {"eval_accuracy": engine.weight / 1009},
        IDENTITY,
    )
    trainer.state = state
    return trainer


def log_events(folder: Path) -> list[dict]:
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in event.items() if k != "tokens_per_second"} for event in events]


def test_epochs_logs_and_final_checkpoint(tmp_path: Path, alone):
    engine = FakeEngine()
    trainer = make_trainer(tmp_path, alone, engine, LoopState(), save_steps=4)
    assert trainer.train()
    assert engine.steps == 10
    events = log_events(tmp_path)
    assert [event["step"] for event in events] == list(range(1, 11))
    assert [event["tokens"] for event in events] == [5, 5, 5, 5, 3] * 2
    assert [event["epoch"] for event in events[:6]] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "checkpoint-4",
        "checkpoint-8",
        "checkpoint-10",
    ]
    losses = [event["loss"] for event in events]
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history] == [3, 6, 9]
    assert history[1]["loss"] == pytest.approx(np.mean(losses[3:6]))


@pytest.mark.parametrize("checkpoint", [4, 5, 7])
def test_resume_repeats_the_uninterrupted_run(tmp_path: Path, alone, checkpoint: int):
    whole = make_trainer(
        tmp_path / "a",
        alone,
        FakeEngine(),
        LoopState(),
        save_steps=checkpoint,
        eval_strategy="epoch",
    )
    assert whole.train()
    engine = FakeEngine()
    other = tmp_path / "b"
    first = make_trainer(
        other, alone, engine, LoopState(), save_steps=checkpoint, eval_strategy="epoch"
    )
    engine.stop_at = checkpoint + 1  # its checkpoint is not used: the log is cut back
    assert not first.train()
    fresh = FakeEngine()
    state = load_position(fresh, other / f"checkpoint-{checkpoint}", IDENTITY)
    resumed = make_trainer(other, alone, fresh, state, save_steps=checkpoint, eval_strategy="epoch")
    (other / f"checkpoint-{checkpoint + 1}").rename(tmp_path / "unused")
    assert resumed.train()
    assert log_events(other) == log_events(tmp_path / "a")
    # Lines differ in the digits of tokens_per_second, hence the offset.
    assert replace(resumed.state, log_offset=0) == replace(whole.state, log_offset=0)


def test_signal_finishes_the_step_and_saves(tmp_path: Path, alone):
    engine = FakeEngine()
    engine.stop_at = 3
    trainer = make_trainer(tmp_path, alone, engine, LoopState())
    handler = signal.getsignal(signal.SIGTERM)
    assert not trainer.train()
    assert engine.steps == 3
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert signal.getsignal(signal.SIGTERM) == handler


def test_latest_that_is_no_text_names_no_checkpoint(tmp_path: Path):
    (tmp_path / "latest").write_bytes(b"\xff")
    assert last_checkpoint(tmp_path) is None


def test_second_signal_interrupts_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("strategy", "evaluated", "saved"),
    [("no", [], []), ("steps", [4, 7], [4, 7]), ("epoch", [5, 7], [5, 7])],
)
def test_strategies_with_max_steps(tmp_path: Path, alone, strategy: str, evaluated, saved):
    trainer = make_trainer(
        tmp_path,
        alone,
        FakeEngine(),
        LoopState(),
        max_steps=7,
        eval_strategy=strategy,
        eval_steps=4,
        save_strategy=strategy,
        save_steps=4,
    )
    assert trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "eval_accuracy" in entry] == evaluated
    assert [int(path.name.split("-")[1]) for path in list_checkpoints(tmp_path)] == saved


def test_losses_that_are_not_finite_stay_out_of_means(tmp_path: Path, alone):
    engine = FakeEngine()
    trainer = make_trainer(tmp_path, alone, engine, LoopState(), max_steps=3)
    original = engine.train_batch

    def overflow_once(micro_batches):
        result = original(micro_batches)
        return result | {"loss": float("inf"), "skipped": True} if engine.steps == 2 else result

    engine.train_batch = overflow_once
    assert trainer.train()
    events = log_events(tmp_path)
    assert events[1]["loss"] is None
    mean = (events[0]["loss"] + events[2]["loss"]) / 2
    assert trainer.state.log_history[0]["loss"] == pytest.approx(mean)


def test_checkpoint_of_another_run_is_refused(tmp_path: Path, alone):
    trainer = make_trainer(tmp_path, alone, FakeEngine(), LoopState(), max_steps=1)
    assert trainer.train()
    with pytest.raises(DataError, match="made with seed 5, this run has 6"):
        load_position(FakeEngine(), tmp_path / "checkpoint-1", IDENTITY | {"seed": 6})
    FakeEngine().save_checkpoint(tmp_path, "checkpoint-9", "{}")
    with pytest.raises(DataError, match="no training of"):
        load_position(FakeEngine(), tmp_path / "checkpoint-9", IDENTITY)


def test_log_that_lost_lines_is_refused(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    log = TrainingLog(path)
    log.write("step", step=1, loss=float("nan"))
    log.close()
    assert path.read_text() == '{"event": "step", "step": 1, "loss": null}\n'
    with pytest.raises(DataError, match="the checkpoint knows 1000"):
        TrainingLog(path, 1000)


def test_old_checkpoints_go_by_age(tmp_path: Path):
    for age, step in enumerate((100, 9, 10)):  # 100: from before a resume at an earlier step
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (1000 + age, 1000 + age))
    (tmp_path / "checkpoint-best").mkdir()
    remove_old_checkpoints(tmp_path, None)
    assert len(list_checkpoints(tmp_path)) == 3
    remove_old_checkpoints(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert (tmp_path / "checkpoint-best").is_dir()


def test_which_checkpoint_a_run_goes_on_from(tmp_path: Path):
    def choose(**flags):
        return checkpoint_to_resume(GlueArguments(output_dir=str(tmp_path), **flags))

    assert choose() is None  # empty folder
    with pytest.raises(ArgumentsError, match="no complete checkpoint"):
        choose(resume_from_checkpoint="true")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentsError, match="not empty; give --overwrite_output_dir"):
        choose()
    assert choose(overwrite_output_dir=True) is None
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(ArgumentsError, match="not empty"):
        choose()  # not complete: no latest file
    (tmp_path / "latest").write_text("checkpoint-5")
    for flags in ({}, {"resume_from_checkpoint": "True"}):
        assert choose(**flags) == tmp_path / "checkpoint-5"
    assert choose(overwrite_output_dir=True) is None
    assert choose(resume_from_checkpoint=str(tmp_path / "checkpoint-5")).name == "checkpoint-5"
    with pytest.raises(ArgumentsError, match="no such folder"):
        choose(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
