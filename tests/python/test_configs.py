"""Every file of configs/ loads, and the published settings are in it."""

import json
from pathlib import Path

import pytest
from bitfall import _core
from bitfall.arguments import GlueArguments
from bitfall.flag_values import flag_values

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.json"))

# Published with DeepSpeed's MoQ tutorial: start bits, period, eigenvalue.
PUBLISHED = {
    "stsb": (12, 10, False),
    "mrpc": (12, 10, True),
    "cola": (12, 8, True),
    "wnli": (12, 8, True),
    "sst2": (12, 400, False),
    "rte": (12, 8, True),
    "qnli": (12, 64, False),
    "qqp": (12, 18, True),
    "mnli": (14, 12, True),
}


def complete(path, **typed):
    arguments = GlueArguments(**typed, given=frozenset(typed))
    values = flag_values(arguments, world_size=1, num_training_steps=345)
    return _core.parse_config(path.read_text(encoding="utf-8"), str(path), values)


def test_there_is_one_file_per_task():
    names = {path.stem for path in FILES}
    assert names == {"moq_tutorial", "quickstart", *(f"glue_{task}" for task in PUBLISHED)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loads(path):
    config = complete(path, per_device_train_batch_size=32, learning_rate=2e-5)
    assert config.quantize_enabled
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (32, 1)
    training = json.loads(config.json)["quantize_training"]
    assert training["quantize_bits"]["target_bits"] == 8
    assert training["quantize_groups"] == 8


@pytest.mark.parametrize("task", PUBLISHED)
def test_glue_files_have_the_published_settings(task):
    start_bits, period, eigenvalue = PUBLISHED[task]
    config = complete(CONFIGS / f"glue_{task}.json", fp16=True, learning_rate=2e-5)
    training = json.loads(config.json)["quantize_training"]
    assert training["quantize_bits"]["start_bits"] == start_bits
    assert training["quantize_schedule"]["quantize_period"] == period
    assert training["quantize_schedule"]["clock"] == "deepspeed-0.6"
    assert config.eigenvalue_enabled is eigenvalue
    assert config.compute_dtype == "f16"
    assert config.warnings == []


def test_tutorial_file_is_as_printed_with_its_trailing_comma():
    text = (CONFIGS / "moq_tutorial.json").read_text(encoding="utf-8")
    assert text.endswith('"quantize_groups": 8,\n}\n}\n')
    config = complete(CONFIGS / "moq_tutorial.json", fp16=True, learning_rate=2e-5, warmup_steps=2)
    assert config.compute_dtype == "f16"
    assert any("quantize-algo" in warning for warning in config.warnings)


@pytest.mark.parametrize("flag", ["fp16", "bf16"])
def test_precision_follows_the_flag(flag):
    config = complete(CONFIGS / "glue_mrpc.json", **{flag: True})
    assert config.compute_dtype == {"fp16": "f16", "bf16": "bf16"}[flag]
    assert complete(CONFIGS / "glue_mrpc.json").compute_dtype == "f32"
