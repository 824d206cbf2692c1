"""Flags of `bitfall glue`: Hugging Face's spelling, meaning and defaults, and clear refusals."""

from __future__ import annotations

import pytest
from bitfall.arguments import add_arguments, from_namespace, steps_or_share, warmup_step_count
from bitfall.cli import CommandParser
from bitfall.errors import ArgumentsError
from conftest import run_cli

BASE = "--model_name_or_path m --output_dir o --task_name mrpc --do_train"
TUTORIAL = (
    "--model_name_or_path bert-base-cased --task_name mrpc --do_train --do_eval"
    " --max_seq_length 128 --per_device_train_batch_size 32 --learning_rate 2e-5"
    " --num_train_epochs 3 --output_dir /tmp/mrpc/ --fp16 --warmup_steps 2 --deepspeed test.json"
)


def parse(text: str):
    parser = CommandParser(prog="bitfall glue", allow_abbrev=False)
    add_arguments(parser)
    return from_namespace(parser.parse_args(text.split()))


def test_tutorial_command():
    arguments = parse(TUTORIAL)
    assert arguments.do_train
    assert arguments.do_eval
    assert arguments.fp16
    assert arguments.per_device_train_batch_size == 32
    assert arguments.learning_rate == 2e-5
    assert arguments.deepspeed == "test.json"
    assert "learning_rate" in arguments.given
    assert "weight_decay" not in arguments.given


def test_defaults_are_hugging_faces():
    arguments = parse(BASE)
    defaults = {
        "max_seq_length": 128,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-5,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "lr_scheduler_type": "linear",
        "seed": 42,
        "logging_steps": 500,
        "save_steps": 500,
        "save_strategy": "steps",
        "eval_strategy": "no",
        "fp16": False,
    }
    assert {name: getattr(arguments, name) for name in defaults} == defaults


@pytest.mark.parametrize(
    ("text", "expected"), [("--fp16", True), ("--fp16 true", True), ("--fp16 False", False)]
)
def test_booleans_bare_or_with_a_word(text: str, expected: bool):
    assert parse(f"{BASE} {text}").fp16 is expected


def test_old_alias_and_evaluation_implies_do_eval():
    arguments = parse(f"{BASE} --evaluation_strategy epoch")
    assert arguments.eval_strategy == "epoch"
    assert arguments.do_eval


def test_task_name_in_any_case():
    assert parse(BASE.replace("mrpc", "MRPC")).task_name == "mrpc"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("--model_name_or_path m --task_name mrpc --do_train", "--output_dir is missing"),
        ("--model_name_or_path m --output_dir o --do_train", "no data"),
        ("--model_name_or_path m --output_dir o --task_name mrpc", "nothing to do"),
        (f"{BASE} --fp16 --bf16", "only one compute type"),
        (f"{BASE} --fp16 perhaps", "expected true or false"),
        (f"{BASE} --train_file a.csv", "exclude each other"),
        (f"{BASE} --per_device_train_batch_size 0", "expected 1 or more"),
        (f"{BASE} --learning_rate nan", "--learning_rate nan"),
        (f"{BASE} --adam_beta2 1", "expected less than 1"),
        (f"{BASE} --warmup_ratio 1.5", "expected 0 to 1"),
        (f"{BASE} --save_steps 2.5", "whole number"),
        (f"{BASE} --num_train_epochs 0", "--num_train_epochs 0"),
        (f"{BASE} --lr_scheduler_type linera", "invalid choice"),
        ("--model_name_or_path m --output_dir o --do_eval --train_file a.csv", "needs --valid"),
        ("--model_name_or_path m --output_dir o --do_train --train_file a.txt", "expected a .csv"),
    ],
)
def test_refusals_name_the_flag(text: str, part: str):
    with pytest.raises(ArgumentsError, match=part):
        parse(text)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ("", 0),
        ("--warmup_ratio 0.06", 21),
        ("--warmup_steps 7 --warmup_ratio 0.5", 7),
        ("--warmup_steps 0.1", 35),
    ],
)
def test_warmup_as_in_hugging_face(flags: str, steps: int):
    assert warmup_step_count(parse(f"{BASE} {flags}"), 345) == steps


def test_steps_or_share():
    assert steps_or_share(500, 345) == 500
    assert steps_or_share(0.1, 345) == 35


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["glue", "--learning_rat", "1"], "did you mean '--learning_rate'?"),
        (["glu"], "did you mean 'glue'?"),
        (["glue", "--seed", "x"], "--seed"),
    ],
)
def test_command_line_errors_are_one_line(words, part, capsys):
    assert run_cli(*words) == 1
    error = capsys.readouterr().err
    assert part in error
    assert error.startswith("bitfall: error: ")
    assert error.count("\n") == 1


def test_help_lists_commands(capsys):
    assert run_cli("--help") == 0
    text = capsys.readouterr().out
    for command in ("glue", "schedule", "report", "check"):
        assert command in text
