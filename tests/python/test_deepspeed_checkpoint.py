"""DeepSpeed's own checkpoints are read completely, in every layout, and never run code."""

from __future__ import annotations

import sys

import numpy as np
import pytest

pytest.importorskip("torch")

from bitfall._core import CheckpointError
from bitfall.deepspeed_checkpoint import read_deepspeed_checkpoint
from deepspeed_files import GLOBAL_STEPS, SKIPPED, STEP, TIED, Run

LAYOUTS = [
    Run(stage=1),
    Run(stage=1, ranks=2, dtype="bf16", groups=2),
    Run(stage=2, ranks=3, dtype="fp16", groups=2),
    Run(stage=2, ranks=2, elastic=True),
    Run(stage=2, ranks=2, dtype="fp16", old=True),
    Run(stage=1, ranks=16, groups=2),  # more ranks than the small group has elements to share
    Run(stage=0, frozen=False),
    Run(stage=0, groups=2, frozen=False),
    Run(stage=0, groups=2, dtype="fp16"),
    Run(stage=0, groups=2, dtype="bf16", optimizer="unfused"),
    Run(stage=0, dtype="fp16", frozen=False, old=True),
]


def same(actual: dict, expected: dict) -> bool:
    """Equal names, dtypes, shapes and values."""
    return actual.keys() == expected.keys() and all(
        actual[name].dtype == expected[name].dtype and np.array_equal(actual[name], expected[name])
        for name in expected
    )


@pytest.mark.parametrize("run", LAYOUTS, ids=lambda run: f"{run.stage}-{run.ranks}-{run.dtype}")
def test_weights_moments_and_counters_of_every_layout(tmp_path, run):
    run.write(tmp_path)
    checkpoint = read_deepspeed_checkpoint(tmp_path)
    assert "deepspeed" not in sys.modules
    assert same(checkpoint.weights, run.expected_weights())
    assert same(checkpoint.exp_avg, run.exp_avg)
    assert same(checkpoint.exp_avg_sq, run.exp_avg_sq)
    assert checkpoint.parameter_groups == run.names
    assert checkpoint.optimizer_step == STEP
    assert checkpoint.global_steps == GLOBAL_STEPS
    assert checkpoint.skipped_steps == SKIPPED
    assert checkpoint.version == ("0.6.7" if run.old else "0.19.6")
    assert checkpoint.lr_scheduler == {"last_batch_iteration": GLOBAL_STEPS - 1}
    if not run.elastic:
        assert [group["lr"] for group in checkpoint.hyperparameters] == [0.01] * run.groups
    if run.dtype == "fp16":
        scale = checkpoint.loss_scale
        assert (scale.dynamic, scale.scale, scale.iteration) == (True, 512.0, 6)
        assert scale.last_overflow_iteration == 2
        assert scale.hysteresis == (None if run.stage == 0 else 1)


def test_client_state_holds_plain_values(tmp_path):
    Run().write(tmp_path)
    state = read_deepspeed_checkpoint(tmp_path).client_state
    assert state.keys() == {"epoch", "best", "digest", "random_state", "args"}
    assert (state["epoch"], state["best"], state["digest"]) == (3, 0.75, b"\x00\xff")
    assert state["args"] == {"seed": 42, "device": "cpu"}
    assert state["random_state"].tolist() == [0, 1, 2, 3]


def test_tied_weights_are_one_array(tmp_path):
    Run(old=True).write(tmp_path)  # which has no list of them
    weights = read_deepspeed_checkpoint(tmp_path).weights
    for name, source in TIED.items():
        assert weights[name] is weights[source]


def test_without_optimizer_states_only_weights_are_read(tmp_path):
    run = Run(stage=2, ranks=2, dtype="bf16")
    run.write(tmp_path)
    checkpoint = read_deepspeed_checkpoint(tmp_path, optimizer_states=False)
    assert same(checkpoint.weights, run.expected_weights())
    assert (checkpoint.exp_avg, checkpoint.optimizer_step) == ({}, 0)


def test_tag_is_the_latest_or_the_one_asked_for(tmp_path):
    Run().write(tmp_path, "global_step5")
    Run(dtype="bf16").write(tmp_path, "pytorch_model")
    assert read_deepspeed_checkpoint(tmp_path).folder.name == "pytorch_model"
    assert read_deepspeed_checkpoint(tmp_path, "global_step5").folder.name == "global_step5"


def test_names_of_the_live_optimizer_settle_what_the_file_leaves_open(tmp_path):
    run = Run(stage=0)  # a frozen parameter, of which the f32 optimizer's state says nothing
    run.write(tmp_path)
    with pytest.raises(CheckpointError, match="which tensor of the optimizer"):
        read_deepspeed_checkpoint(tmp_path)
    checkpoint = read_deepspeed_checkpoint(tmp_path, parameter_groups=run.names)
    assert same(checkpoint.exp_avg, run.exp_avg)
    assert same(checkpoint.weights, run.expected_weights())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([["embed.weight"]], "more tensors than"),
        ([["norm.weight"]], "does not fit"),
        ([["elsewhere"]], "no parameter"),
        ([["embed.weight"], []], "1 param groups, but the optimizer 2"),
    ],
)
def test_names_of_another_optimizer_are_refused(tmp_path, names, message):
    Run(stage=0).write(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_deepspeed_checkpoint(tmp_path, parameter_groups=names)


def test_two_groups_that_both_fit_are_ambiguous(tmp_path):
    run = Run(stage=0, dtype="fp16", groups=2)
    for name in ("norm.weight", "hidden.weight"):
        run.masters[name] *= 0
        run.module[name] *= 0
    run.write(tmp_path)
    with pytest.raises(CheckpointError, match=r"at 'norm\.weight'"):
        read_deepspeed_checkpoint(tmp_path)


def rank_file(folder, rank):
    return folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def test_missing_rank(tmp_path):
    folder = Run(ranks=3).write(tmp_path)
    rank_file(folder, 1).unlink()
    with pytest.raises(CheckpointError, match="the file of rank 1 is missing"):
        read_deepspeed_checkpoint(tmp_path)
    rank_file(folder, 2).unlink()
    with pytest.raises(CheckpointError, match="3 ranks wrote this checkpoint, but the files of 1"):
        read_deepspeed_checkpoint(tmp_path)
    rank_file(folder, 0).unlink()
    with pytest.raises(CheckpointError, match=r"optimizer's files .* are missing"):
        read_deepspeed_checkpoint(tmp_path)


def test_files_of_two_runs_in_one_folder(tmp_path):
    folder = Run(ranks=2, dtype="bf16").write(tmp_path)
    (folder / f"bf16_{rank_file(folder, 1).name}").rename(rank_file(folder, 1))
    rank_file(folder, 0).write_bytes(b"")
    with pytest.raises(CheckpointError, match="rank 0 is there twice"):
        read_deepspeed_checkpoint(tmp_path)
    without = Run(stage=0).write(tmp_path, "whole")
    rank_file(without, 0).write_bytes(b"")
    with pytest.raises(CheckpointError, match="a run without it"):
        read_deepspeed_checkpoint(tmp_path, "whole")


def test_shapes_that_do_not_add_up(tmp_path):
    small, large = Run(), Run()
    large.masters["hidden.bias"] = np.zeros(9, np.float32)
    folder, other = small.write(tmp_path / "a"), large.write(tmp_path / "b")
    rank_file(folder, 0).write_bytes(rank_file(other, 0).read_bytes())
    with pytest.raises(CheckpointError, match="do not belong together"):
        read_deepspeed_checkpoint(tmp_path / "a")


def test_state_of_another_optimizer(tmp_path):
    run = Run(stage=0, frozen=False)
    optimizer = run.whole_optimizer()
    for state in optimizer["state"].values():
        state["momentum_buffer"] = state.pop("exp_avg")
    run.whole_optimizer = lambda: optimizer
    run.write(tmp_path)
    with pytest.raises(CheckpointError, match="not Adam's exp_avg"):
        read_deepspeed_checkpoint(tmp_path)
    weights = read_deepspeed_checkpoint(tmp_path, optimizer_states=False).weights
    assert same(weights, run.expected_weights())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "ZeRO stage 3"),
        ("mp_rank_01_model_states.pt", "a model in parts"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "a model in parts"),
    ],
)
def test_layouts_that_are_not_read(tmp_path, name, message):
    folder = Run().write(tmp_path)
    (folder / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        read_deepspeed_checkpoint(tmp_path)


@pytest.mark.parametrize("tag", ["", "../elsewhere", ".hidden", "a\nb", "x" * 300])
def test_tag_that_is_no_folder_name(tmp_path, tag):
    Run().write(tmp_path)
    (tmp_path / "latest").write_text(tag)
    with pytest.raises(CheckpointError, match="no checkpoint tag"):
        read_deepspeed_checkpoint(tmp_path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no file 'latest'"):
        read_deepspeed_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_deepspeed_checkpoint(tmp_path, "global_step9")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="missing; copy the checkpoint anew"):
        read_deepspeed_checkpoint(tmp_path, "empty")
