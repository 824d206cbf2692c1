"""`bitfall glue` from flags to files, with the real engine on a tiny model."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_CONFIG, environment, run_cli
from safetensors.numpy import load_file

MOQ = {
    "quantize_training": {
        "enabled": True,
        "quantize_verbose": True,
        "quantize_bits": {"start_bits": 12, "target_bits": 8},
        "quantize_schedule": {"quantize_period": 4, "schedule_offset": 0},
        "quantize_groups": 4,
    }
}


@pytest.fixture
def run(tiny_model_dir: Path, sentiment_files: tuple[Path, Path], tmp_path: Path):
    """Trains the tiny model in tmp_path/out; further flags override. Returns the exit code."""

    def call(*flags: object, output_dir: Path | None = None, **config: object) -> int:
        command = base_flags(tiny_model_dir, sentiment_files, output_dir or tmp_path / "out")
        if config:
            (tmp_path / "ds.json").write_text(json.dumps(config))
            command += ["--deepspeed", tmp_path / "ds.json"]
        return run_cli(*command, *flags)

    return call


def base_flags(model: Path, files: tuple[Path, Path], output_dir: Path) -> list[object]:
    return [
        *("glue", "--model_name_or_path", model, "--output_dir", output_dir),
        *("--train_file", files[0], "--validation_file", files[1], "--do_train", "--do_eval"),
        *("--max_seq_length", 16, "--per_device_train_batch_size", 16, "--learning_rate", 1e-2),
        *("--num_train_epochs", 3, "--logging_steps", 10),
    ]


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


def events(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "bitfall_log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def comparable(folder: Path) -> list[dict]:
    """Everything that a resumed run must repeat exactly."""
    kept = []
    for kind in ("step", "drop", "eigenvalues", "evaluate"):
        for event in events(folder, kind):
            event.pop("tokens_per_second", None)
            metrics = event.get("metrics", {})
            for name in [name for name in metrics if "runtime" in name or "per_second" in name]:
                del metrics[name]
            kept.append(event)
    return kept


def test_learns_and_writes_what_users_look_for(run, tmp_path: Path, capsys):
    assert run(**MOQ) == 0
    out = tmp_path / "out"
    assert results(out)["eval_accuracy"] >= 0.9
    assert results(out)["train_samples"] == 203
    losses = [event["loss"] for event in events(out, "step")]
    assert len(losses) == 39  # ceil(203 / 16) steps in each of 3 epochs
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    for name in ("train_results.json", "eval_results.json", "trainer_state.json", "report.html"):
        assert (out / name).is_file()
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}
    assert config["hidden_size"] == TINY_CONFIG["hidden_size"]
    assert (out / "vocab.txt").is_file()
    screen = capsys.readouterr().out
    assert "12 bits" in screen
    assert "12 -> 11 bits" in screen
    assert "step 10/39" in screen
    (end,) = events(out, "end")
    assert end["finished"]
    assert 0 < max(end["quantization_error"].values()) < 0.1


def test_saved_weights_lie_on_the_grid(run, tmp_path: Path):
    assert run(**MOQ) == 0
    quantized = load_file(tmp_path / "out" / "model.safetensors")
    master = load_file(tmp_path / "out" / "master" / "model.safetensors")
    assert (tmp_path / "out" / "quantized.safetensors").is_file()
    assert quantized.keys() == master.keys()
    for name, weights in quantized.items():
        if weights.ndim >= 2:
            for group in weights.reshape(4, -1):
                assert len(np.unique(group)) <= 256
            assert np.abs(weights - master[name]).max() > 0
        else:
            assert np.array_equal(weights, master[name])


def test_saved_model_scores_the_same_again(run, tmp_path: Path, sentiment_files, capsys):
    assert run(**MOQ) == 0
    capsys.readouterr()
    again = tmp_path / "again"
    flags = ["--validation_file", sentiment_files[1], "--do_eval", "--max_seq_length", 16]
    flags += ["--model_name_or_path", tmp_path / "out", "--output_dir", again]
    assert run_cli("glue", *flags) == 0
    assert results(again)["eval_accuracy"] == results(tmp_path / "out")["eval_accuracy"]
    assert results(again)["eval_loss"] == pytest.approx(
        results(tmp_path / "out")["eval_loss"], rel=1e-5
    )


@pytest.mark.parametrize("precision", ["f32", "bf16", "fp16"])
def test_resume_is_bit_for_bit(run, tmp_path: Path, precision: str):
    flags = ["--save_steps", 10, "--eval_strategy", "epoch", "--gradient_accumulation_steps", 2]
    flags += [] if precision == "f32" else [f"--{precision}"]
    moq = json.loads(json.dumps(MOQ))
    moq["quantize_training"]["eigenvalue"] = {"enabled": True, "max_iter": 5}
    if precision == "fp16":
        moq["fp16"] = {"enabled": True, "initial_scale_power": 24}  # overflows a few times
    assert run(*flags, **moq) == 0
    whole, part = tmp_path / "out", tmp_path / "part"
    part.mkdir()
    shutil.copytree(whole / "checkpoint-10", part / "checkpoint-10")
    (part / "latest").write_text("checkpoint-10")
    shutil.copy(whole / "bitfall_log.jsonl", part)
    assert run(*flags, "--resume_from_checkpoint", "true", output_dir=part, **moq) == 0
    assert comparable(part) == comparable(whole)
    for name in ("model.safetensors", "master/model.safetensors", "quantized.safetensors"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
    histories = [
        json.loads((folder / "trainer_state.json").read_text())["log_history"]
        for folder in (whole, part)
    ]
    assert [entry.get("loss") for entry in histories[0]] == [
        entry.get("loss") for entry in histories[1]
    ]


def interrupt(command: list[str], out: Path, number: signal.Signals) -> tuple[int, str]:
    """Sends a signal after some steps; returns the exit code and what was printed."""
    log = out / "bitfall_log.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().count('"event": "step"') > 20):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_a_resumed_run_may_be_longer(run, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert run("--max_steps", 4, "--save_steps", 4) == 0
    assert run("--max_steps", 6, "--resume_from_checkpoint", "true") == 0
    assert "was to have 4 steps, this one 6" in capsys.readouterr().out
    state = json.loads((out / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (6, 6)
    rates = [event["learning_rate"] for event in events(out, "step")]
    assert len(rates) == 6
    assert rates[4] > rates[3]  # of the new schedule


def test_interrupt_writes_a_checkpoint_and_resumes(
    tiny_model_dir: Path, sentiment_files, tmp_path: Path
):
    out = tmp_path / "out"
    flags = base_flags(tiny_model_dir, sentiment_files, out)
    flags += ["--num_train_epochs", 50]
    command = [sys.executable, "-m", "bitfall", *(str(flag) for flag in flags)]
    code, output = interrupt(command, out, signal.SIGINT)
    assert code == 130
    assert "--resume_from_checkpoint true" in output
    tag = (out / "latest").read_text()
    assert 20 < int(tag.split("-")[1]) < 650
    assert run_cli(*flags, "--resume_from_checkpoint", out / tag) == 0
    assert [event["step"] for event in events(out, "step")] == list(range(1, 651))


def test_mpirun_passes_on_the_request_to_stop(
    tiny_model_dir: Path, sentiment_files, tmp_path: Path
):
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("mpirun is not installed")
    out = tmp_path / "out"
    flags = base_flags(tiny_model_dir, sentiment_files, out)
    command = [mpirun, "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable]
    command += ["-m", "bitfall", *(str(flag) for flag in flags), "--num_train_epochs", "500"]
    code, output = interrupt(command, out, signal.SIGUSR1)
    assert code == 130
    assert output.count("--resume_from_checkpoint true") == 1
    assert (out / (out / "latest").read_text()).is_dir()


def test_two_ranks_equal_one(tiny_model_dir: Path, sentiment_files, tmp_path: Path):
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("mpirun is not installed")
    losses = {}
    for ranks, stage in ((1, 0), (2, 0), (2, 2)):
        config = tmp_path / "ds.json"
        config.write_text(json.dumps({**MOQ, "zero_optimization": {"stage": stage}}))
        out = tmp_path / f"out{ranks}{stage}"
        flags = base_flags(tiny_model_dir, sentiment_files, out)
        flags += ["--per_device_train_batch_size", 16 // ranks, "--deepspeed", config]
        flags += ["--max_steps", 20]
        launcher = [mpirun, "--allow-run-as-root", "--oversubscribe", "-np", str(ranks)]
        command = [*launcher, sys.executable, "-m", "bitfall", *(str(flag) for flag in flags)]
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("step 20/20") == 1  # one log, from rank 0
        losses[ranks, stage] = [event["loss"] for event in events(out, "step")]
        for name in ("model.safetensors", "quantized.safetensors", "master/model.safetensors"):
            assert (out / name).is_file()
    assert losses[2, 0] == pytest.approx(losses[1, 0], rel=1e-3)
    assert losses[2, 0][0] == pytest.approx(losses[1, 0][0], rel=1e-6)
    assert losses[2, 2] == pytest.approx(losses[2, 0], rel=1e-6)


def test_error_on_any_rank_ends_all(tiny_model_dir: Path, sentiment_files, tmp_path: Path):
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("mpirun is not installed")
    broken = tmp_path / "train.csv"
    broken.write_text("text,label\ngood,yes\nbad\n")
    flags = base_flags(tiny_model_dir, (broken, sentiment_files[1]), tmp_path / "out")
    launcher = [mpirun, "--allow-run-as-root", "--oversubscribe", "-np", "2"]
    command = [*launcher, sys.executable, "-m", "bitfall", *(str(flag) for flag in flags)]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert f"{broken} line 3: 1 fields, expected 2" in done.stderr


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, [], "learning_rate"),
        ({"quantize_trainin": {}}, [], "quantize_training"),
        ({"train_batch_size": 12}, [], "12"),
        ({}, ["--resume_from_checkpoint", "true"], "no complete checkpoint"),
        ({}, ["--model_name_or_path", "./nowhere"], "./nowhere"),
        ({}, ["--output_dir", "/proc/none/out"], "--output_dir /proc/none"),
        ({}, ["--output_dir", __file__], "it is not a folder"),
        ({}, ["--deepspeed", "nowhere.json"], "nowhere.json"),
    ],
)
def test_errors_are_one_message(run, capsys, config: dict, flags: list, message: str):
    assert run(*flags, **config) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_damaged_checkpoints_are_refused(run, tmp_path: Path, capsys):
    assert run("--max_steps", 4, **MOQ) == 0
    capsys.readouterr()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = largest.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    resume = ["--max_steps", 4, "--resume_from_checkpoint", "true"]
    for damaged in (bytes(flipped), data[:-7], b""):
        largest.write_bytes(damaged)
        assert run(*resume, **MOQ) == 1
        assert largest.name in capsys.readouterr().err
    largest.write_bytes(data)
    assert run(*resume, **MOQ) == 0
    for flag, value, key in (("seed", 1, "seed"), ("learning_rate", 1e-3, "lr")):
        assert run(*resume, f"--{flag}", value, **MOQ) == 1
        assert key in capsys.readouterr().err


def test_output_folder_is_not_overwritten_by_accident(run, tmp_path: Path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    assert run("--max_steps", 2) == 1
    assert "--overwrite_output_dir" in capsys.readouterr().err
    assert run("--max_steps", 2, "--overwrite_output_dir") == 0
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_limit_of_checkpoints(run, tmp_path: Path):
    assert run("--save_steps", 5, "--save_total_limit", 2, "--max_steps", 22) == 0
    kept = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == ["checkpoint-20", "checkpoint-22"]


@pytest.mark.parametrize("task", ["cola", "mrpc", "rte", "sst2", "stsb", "wnli"])
def test_tasks_train_and_evaluate(glue_dir: Path, minilm_dir: Path, tmp_path: Path, task: str):
    flags = ["glue", "--model_name_or_path", minilm_dir, "--task_name", task]
    flags += ["--data_dir", glue_dir, "--output_dir", tmp_path / "out", "--do_train", "--do_eval"]
    flags += ["--max_train_samples", 32, "--max_eval_samples", 24, "--max_seq_length", 64]
    flags += ["--num_train_epochs", 1, "--per_device_train_batch_size", 16, "--bf16"]
    flags += ["--save_strategy", "no"]
    if task == "mrpc":
        flags += ["--do_predict", "--max_predict_samples", 5]
    assert run_cli(*flags) == 0
    scores = results(tmp_path / "out")
    expected = {
        "cola": {"eval_matthews_correlation"},
        "mrpc": {"eval_accuracy", "eval_f1", "eval_combined_score"},
        "stsb": {"eval_pearson", "eval_spearmanr", "eval_combined_score"},
    }.get(task, {"eval_accuracy"})
    assert expected <= set(scores)
    assert scores["eval_samples"] == 24
    assert np.isfinite(scores["train_loss"])
    if task == "mrpc":
        lines = (tmp_path / "out" / "predict_results_mrpc.txt").read_text().splitlines()
        assert lines[0] == "index\tprediction"
        assert len(lines) == 6
        assert lines[1].split("\t")[1] in ("equivalent", "not_equivalent")


def test_a_switch_for_torch_modules_is_not_ignored_in_silence(
    run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--max_steps", 1, bitfall={"native_encoder": False}) == 0
    assert "bitfall.native_encoder has no effect here" in capsys.readouterr().out
