"""GLUE data from the hub: the parquet files that a download would give, written by the tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bitfall.errors import DataError
from bitfall.hub_data import DATASET, download, hub_files, read_hub_file
from bitfall.tasks import TASKS
from conftest import Alone, environment, run_cli

huggingface_hub = pytest.importorskip("huggingface_hub")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

SPLIT_ROWS = {"train": 18, "dev": 7, "test": 5}
REVISION = "0" * 40


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


def write_task(root: Path, name: str, columns: tuple[str, ...]) -> None:
    """All files of a task: classes 0 and 1 in turn, -1 in the test set."""
    for split, count in SPLIT_ROWS.items():
        for file in hub_files(TASKS[name], split).values():
            table: dict[str, list] = {column: ["the film was good"] * count for column in columns}
            table["label"] = [-1 if split == "test" else i % 2 for i in range(count)]
            table["idx"] = list(range(count))
            write_parquet(root / file, table)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch):
    """A folder in the hub's place; its calls are (file, local_files_only)."""
    calls: list[tuple[str, bool]] = []

    def hf_hub_download(repo_id, filename, *, repo_type, local_files_only):
        assert (repo_id, repo_type) == (DATASET, "dataset")
        calls.append((filename, local_files_only))
        path = tmp_path / "hub" / filename
        if not path.is_file():
            raise ConnectionError("no route to the hub\nand more")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.delenv("BITFALL_GLUE_DIR", raising=False)
    return calls


def glue_flags(model: Path, task: str, out: Path) -> list[object]:
    return [
        *("glue", "--model_name_or_path", model, "--task_name", task, "--output_dir", out),
        *("--do_train", "--do_eval", "--num_train_epochs", 1, "--max_seq_length", 16),
    ]


@pytest.mark.parametrize(
    ("task", "columns"),
    [("mrpc", ("sentence1", "sentence2")), ("mnli", ("premise", "hypothesis"))],
)
def test_run_without_data_dir(tiny_model_dir: Path, tmp_path: Path, hub, task: str, columns):
    write_task(tmp_path / "hub", task, columns)
    out = tmp_path / "out"
    assert run_cli(*glue_flags(tiny_model_dir, task, out), "--do_predict") == 0
    results = json.loads((out / "all_results.json").read_text())
    assert (results["train_samples"], results["eval_samples"]) == (18, 7)
    assert {path.name for path in out.glob("predict_*")} == {
        f"predict_results_{name}.txt" for name in hub_files(TASKS[task], "test")
    }
    assert not any(local for _, local in hub)


def test_names_of_the_files():
    assert hub_files(TASKS["rte"], "dev") == {"rte": "rte/validation-00000-of-00001.parquet"}
    assert hub_files(TASKS["mnli"], "train") == {"mnli": "mnli/train-00000-of-00001.parquet"}
    assert hub_files(TASKS["mnli"], "test") == {
        "mnli": "mnli/test_matched-00000-of-00001.parquet",
        "mnli-mm": "mnli/test_mismatched-00000-of-00001.parquet",
    }


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_reads_its_columns(tmp_path: Path, task: str):
    columns = {
        "cola": ["sentence"],
        "sst2": ["sentence"],
        "qqp": ["question1", "question2"],
        "qnli": ["question", "sentence"],
        "mnli": ["premise", "hypothesis"],
    }.get(task, ["sentence1", "sentence2"])
    labels = [0.5, 5.0] if task == "stsb" else [1, 0]
    table = {name: [f"{name} 0", f"{name} 1"] for name in columns}
    path = write_parquet(tmp_path / "a.parquet", {"idx": [0, 1], "label": labels, **table})
    examples = read_hub_file(path, TASKS[task], "dev")
    assert examples.labels == labels
    assert examples.first == [f"{columns[0]} 0", f"{columns[0]} 1"]
    assert examples.second == (table[columns[1]] if len(columns) == 2 else None)
    assert read_hub_file(path, TASKS[task], "test").labels is None


def test_only_the_first_rank_of_a_machine_downloads(tmp_path: Path, hub):
    write_task(tmp_path / "hub", "rte", ("sentence1", "sentence2"))
    other = Alone()
    other.rank, other.world_size, other.local_rank = 1, 2, 1
    assert download(TASKS["rte"], ["dev"], other)["dev"]["rte"].is_file()
    assert hub == [("rte/validation-00000-of-00001.parquet", True)]


def test_without_network_one_message_says_what_to_give(
    tiny_model_dir: Path, tmp_path: Path, hub, capsys
):
    assert run_cli(*glue_flags(tiny_model_dir, "mrpc", tmp_path / "out")) == 1
    (message,) = capsys.readouterr().err.splitlines()
    for part in ("no route to the hub", DATASET, "--data_dir", "MRPC/train.tsv", "MRPC/dev.tsv"):
        assert part in message


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sentence1": ["a"], "label": [1]}, "column 'sentence2' is missing"),
        ({"sentence1": ["a"], "sentence2": ["b"], "label": [-1]}, "row 0: label -1"),
        ({"sentence1": ["a"], "sentence2": ["b"], "label": [2]}, "row 0: label 2"),
        ({"sentence1": ["a"], "sentence2": [None], "label": [1]}, "sentence2 is None"),
        ({"sentence1": [], "sentence2": [], "label": []}, "no rows"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, columns: dict, message: str):
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=message) as error:
        read_hub_file(path, TASKS["rte"], "dev")
    assert str(path) in str(error.value)


def test_damaged_files_are_refused(tmp_path: Path):
    path = write_parquet(
        tmp_path / "a.parquet", {"sentence1": ["a"], "sentence2": ["b"], "label": [1]}
    )
    data = path.read_bytes()
    for damaged in (b"", b"PAR1", data[:-9], data[: len(data) // 2], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="not a readable parquet file"):
            read_hub_file(path, TASKS["rte"], "dev")


def test_two_ranks_share_the_cache(tiny_model_dir: Path, tmp_path: Path):
    """With the hub's library itself, offline: first with an empty cache, then with a filled one."""
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("mpirun is not installed")
    flags = glue_flags(tiny_model_dir, "rte", tmp_path / "out")
    command = [mpirun, "--allow-run-as-root", "--oversubscribe", "-np", "2"]
    command += [sys.executable, "-m", "bitfall", *(str(flag) for flag in flags)]
    variables = environment() | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    variables.pop("BITFALL_GLUE_DIR", None)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=120, check=False
        )

    refused = run()
    assert refused.returncode != 0
    assert "--data_dir" in refused.stderr
    assert "Traceback" not in refused.stderr
    repository = tmp_path / "home" / "hub" / "datasets--nyu-mll--glue"
    write_task(repository / "snapshots" / REVISION, "rte", ("sentence1", "sentence2"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    done = run()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "eval_results.json").is_file()
