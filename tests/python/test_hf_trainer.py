"""Hugging Face's Trainer under `bitfall run`, end to end: ZeRO stages, ranks, resume, bits."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, environment, run_cli
from safetensors.numpy import load_file
from test_launcher import MPI_AS_TESTED

pytest.importorskip("bitfall._core", reason="the C++ module is not built")
for package in ("torch", "transformers", "accelerate"):
    pytest.importorskip(package, reason=f"{package} is not installed")

GROUPS = 4
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {"stage": 1},
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "quantize_training": {
        "enabled": True,
        "quantize_verbose": True,
        "quantize_bits": {"start_bits": 12, "target_bits": 8},
        "quantize_schedule": {"quantize_period": 2, "schedule_offset": 2},
        "quantize_groups": GROUPS,
    },
}
# Of trainer_scenarios.py: under one process and two, and under one.
STAGES = ("dropout", "stage0", "stage1", "stage2")
CURVATURE_AND_FP16 = ("eigenvalues", "eigenvalues_torch", "fp16")


def bitfall_run(folder: Path, *words: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """`bitfall run` in `folder`, where test.json is CONFIG."""
    if ranks > 1 and shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed")
    (folder / "test.json").write_text(json.dumps(CONFIG))
    launcher = ["--np", str(ranks)] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, "-m", "bitfall", "run", *launcher, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment() | MPI_AS_TESTED,
        check=False,
    )


RunScenarios = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def run_scenarios(
    tiny_model_dir: Path,
    sentiment_files: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunScenarios:
    """Gives (folder, results.json) of trainer_scenarios.py."""

    def run(*names: str, ranks: int = 1) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("trainer")
        script = Path(__file__).with_name("trainer_scenarios.py")
        words = (script, tiny_model_dir, *sentiment_files, "test.json", folder, *names)
        done = bitfall_run(folder, *words, ranks=ranks)
        assert done.returncode == 0, done.stderr
        results = json.loads((folder / "results.json").read_text())
        assert {result["world_size"] for result in results.values()} == {ranks}
        return folder, results

    return run


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def trained(
    request: pytest.FixtureRequest, run_scenarios: RunScenarios
) -> tuple[Path, dict[str, Any]]:
    return run_scenarios(*STAGES, ranks=request.param)


@pytest.fixture(scope="module")
def trained_in_one_process(run_scenarios: RunScenarios) -> tuple[Path, dict[str, Any]]:
    return run_scenarios(*CURVATURE_AND_FP16)


@pytest.mark.parametrize("name", STAGES)
def test_learns_evaluates_and_predicts(trained, name: str):
    result = trained[1][name]
    assert result["accuracy"] >= 0.9
    assert result["predicted_accuracy"] == result["accuracy"]
    assert result["logits_shape"] == [41, 2]
    assert result["loss"][-1] < 0.7 * result["loss"][0]
    assert all(math.isfinite(norm) and norm > 0 for norm in result["grad_norm"])
    assert result["learning_rate"][-1] < result["learning_rate"][5]


@pytest.mark.parametrize("name", STAGES)
def test_resumes_to_the_same_weights(trained, name: str):
    assert_resumed_alike(*trained, name)


def assert_resumed_alike(folder: Path, results: dict[str, Any], name: str) -> None:
    whole = load_file(folder / name / "model.safetensors")
    resumed = load_file(folder / f"{name}_resumed" / "model.safetensors")
    assert whole.keys() == resumed.keys()
    for parameter in whole:
        np.testing.assert_array_equal(whole[parameter], resumed[parameter], err_msg=parameter)
    assert results[name]["resumed_loss"] == results[name]["loss"]


@pytest.mark.parametrize("name", CURVATURE_AND_FP16)
def test_eigenvalues_and_fp16_learn_and_resume(trained_in_one_process, name: str):
    folder, results = trained_in_one_process
    assert results[name]["accuracy"] >= 0.9
    assert_resumed_alike(folder, results, name)


def test_eigenvalues_are_the_same_with_and_without_the_native_encoder(trained_in_one_process):
    _, results = trained_in_one_process
    natively, in_torch = (
        [step for step in results[name]["eigenvalues"] if step]
        for name in ("eigenvalues", "eigenvalues_torch")
    )
    assert [e["name"] for e in natively[0]] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    for ours, theirs in zip(natively[0], in_torch[0], strict=True):
        assert ours["value"] == pytest.approx(theirs["value"], rel=1e-2)
    # The layer with the larger one keeps its bits for longer.
    traces = [list(bits.values()) for bits in results["eigenvalues"]["bits"]]
    assert any(first != second for first, second, _ in traces)


def test_overflow_lowers_the_scale_and_moves_nothing(trained_in_one_process):
    result = trained_in_one_process[1]["fp16"]
    skipped, scales = result["skipped"], result["loss_scale"]
    overflows = skipped.index(False)
    assert overflows >= 2
    assert scales[overflows] == 2.0 ** (22 - overflows)
    assert max(scales[overflows:]) > scales[overflows]  # it grows again
    assert all(result["bits"][step] == result["bits"][0] for step in range(overflows))
    assert len(set(result["learning_rate"][:overflows])) == 1


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_every_stage_trains_the_same(trained, name: str):
    _, results = trained
    assert results[name]["loss"] == pytest.approx(results["stage0"]["loss"], rel=1e-2)
    assert results[name]["grad_norm"] == pytest.approx(results["stage0"]["grad_norm"], rel=5e-2)
    assert results[name]["bits"] == results["stage0"]["bits"]


def test_bits_fall_as_in_bitfall_glue(
    trained, tiny_model_dir: Path, sentiment_files: tuple[Path, Path], tmp_path: Path
):
    (tmp_path / "test.json").write_text(json.dumps(CONFIG))
    train, dev = sentiment_files
    flags = ["--model_name_or_path", tiny_model_dir, "--output_dir", tmp_path / "out"]
    flags += ["--train_file", train, "--validation_file", dev, "--do_train", "--max_seq_length", 16]
    flags += ["--max_steps", 40, "--per_device_train_batch_size", 8, "--learning_rate", 3e-3]
    flags += ["--gradient_accumulation_steps", 2, "--deepspeed", tmp_path / "test.json"]
    assert run_cli("glue", *flags) == 0
    lines = (tmp_path / "out" / "bitfall_log.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "step"]
    expected = [event["bits"] for event in events]
    assert len({tuple(bits.values()) for bits in expected}) >= 5  # 12 to 8
    assert trained[1]["stage0"]["bits"] == expected


def test_saved_weights_lie_on_the_grid(trained):
    weights = load_file(trained[0] / "stage0" / "model.safetensors")
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    for group in weights[name].reshape(GROUPS, -1):
        assert len(np.unique(group)) <= 2**8
    assert len(np.unique(weights[name])) > 2


def test_an_own_script_with_hugging_faces_flags(
    tiny_model_dir: Path, sentiment_files: tuple[Path, Path], tmp_path: Path
):
    train, dev = sentiment_files
    done = bitfall_run(
        tmp_path,
        *(ROOT / "examples" / "text_classification.py", "--model_name_or_path", tiny_model_dir),
        *("--train_file", train, "--validation_file", dev, "--test_file", dev),
        *("--do_train", "--do_eval", "--do_predict", "--max_seq_length", 16, "--use_cpu", "--bf16"),
        *("--per_device_train_batch_size", 16, "--learning_rate", 3e-3, "--num_train_epochs", 4),
        *("--output_dir", "out", "--report_to", "none", "--deepspeed", "test.json"),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_accuracy"] >= 0.9
    predicted = (tmp_path / "out" / "predictions.txt").read_text().split()
    assert len(predicted) == 41
    assert set(predicted) == {"no", "yes"}


def test_a_wrong_config_is_an_error_that_names_the_key(
    tiny_model_dir: Path, sentiment_files: tuple[Path, Path], tmp_path: Path, monkeypatch
):
    monkeypatch.setitem(CONFIG, "quantize_training", {"enabled": True, "quantize_bit": {}})
    done = bitfall_run(
        tmp_path,
        *(ROOT / "examples" / "text_classification.py", "--model_name_or_path", tiny_model_dir),
        *("--train_file", sentiment_files[0], "--do_train", "--max_steps", 1, "--use_cpu"),
        *("--output_dir", "out", "--report_to", "none", "--deepspeed", "test.json"),
    )
    assert done.returncode == 1
    assert "quantize_training.quantize_bit" in done.stderr
    assert "quantize_bits" in done.stderr
