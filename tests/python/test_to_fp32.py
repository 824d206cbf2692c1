"""`bitfall to-fp32` writes the f32 masters of DeepSpeed's and of bitfall's own checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from bitfall.safetensors_file import read_safetensors, write_safetensors
from conftest import environment, run_cli
from safetensors import safe_open
from safetensors.numpy import load_file, save_file


def deepspeed_run(**options):
    pytest.importorskip("torch")
    from deepspeed_files import Run

    return Run(**options)


def own_checkpoint(directory, tag="global_step7"):
    """As engine/checkpoint.h lays it out; returns the weights."""
    import zlib

    weights = {"layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    folder = directory / tag
    folder.mkdir(parents=True)
    (directory / "latest").write_text(tag)
    save_file(weights, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    sums = {"model.safetensors": {"bytes": len(data), "crc32": f"{zlib.crc32(data):x}"}}
    (folder / "checksums.json").write_text(json.dumps(sums))
    (folder / "state.json").write_text(json.dumps({"version": 1, "global_step": 7}))
    return weights


def test_deepspeed_checkpoint_becomes_a_model_file(tmp_path, capsys):
    run = deepspeed_run(stage=2, ranks=2, dtype="bf16", groups=2)
    run.write(tmp_path / "run")
    assert run_cli("to-fp32", tmp_path / "run", tmp_path / "out") == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = run.expected_weights()
    assert written.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(written[name], array)
        assert written[name].dtype == array.dtype
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    shown = capsys.readouterr().out
    elements = sum(array.size for array in expected.values())
    assert "(DeepSpeed 0.19.6)" in shown
    assert "step         5" in shown
    assert f"{len(expected)} tensors, {elements} elements" in shown


def test_own_checkpoint_is_copied(tmp_path, capsys):
    weights = own_checkpoint(tmp_path / "run")
    own_checkpoint(tmp_path / "run", "global_step8")
    output = tmp_path / "weights.safetensors"
    assert run_cli("to-fp32", tmp_path / "run", output, "--tag", "global_step7") == 0
    np.testing.assert_array_equal(load_file(output)["layer.weight"], weights["layer.weight"])
    shown = capsys.readouterr().out
    assert "global_step7 (bitfall)" in shown
    assert "1 tensors, 6 elements" in shown


def test_damaged_own_checkpoint_leaves_the_old_output(tmp_path, capsys):
    own_checkpoint(tmp_path / "run")
    path = tmp_path / "run" / "global_step7" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    output = tmp_path / "weights.safetensors"
    output.write_bytes(b"old")
    assert run_cli("to-fp32", tmp_path / "run", output) == 1
    assert "changed or cut short" in capsys.readouterr().err
    assert output.read_bytes() == b"old"
    assert sorted(child.name for child in tmp_path.iterdir()) == ["run", "weights.safetensors"]


def test_checkpoint_of_the_engine(tmp_path, tiny_model_dir):
    """A real one: its masters, bit for bit."""
    from tiny_engine import make_engine

    engine = make_engine(tiny_model_dir)
    engine.save_checkpoint(str(tmp_path), "checkpoint-0", "{}")
    engine.save_model(str(tmp_path), "master")
    assert run_cli("to-fp32", tmp_path, tmp_path / "out") == 0
    expected = load_file(tmp_path / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(written[name], array)


@pytest.mark.parametrize("section", ["bf16", "fp16"])
def test_frozen_parameters_and_buffers_of_a_torch_module(tmp_path, section):
    torch = pytest.importorskip("torch")
    import bitfall

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW"},
        section: {"enabled": True},
    }
    engine, _, _, _ = bitfall.initialize(model=model, config=config)
    engine.save_checkpoint(tmp_path / "run")
    assert run_cli("to-fp32", tmp_path / "run", tmp_path / "out") == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        exact = name == "0.weight" or not value.is_floating_point()
        np.testing.assert_allclose(written[name], value.numpy(), rtol=0 if exact else 2**-7)
        assert written[name].dtype == value.numpy().dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "out"], "no file 'latest'"),
        (["run", "out", "--tag", "global_step1"], "there is no such checkpoint"),
        (["run", "out", "--tag", "empty"], "neither a checkpoint of DeepSpeed"),
        (["run", "run/latest"], "not a folder"),
        (["run", "missing/a.safetensors"], "no such folder; make it first"),
    ],
)
def test_wrong_use(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    own_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "empty").mkdir()
    assert run_cli("to-fp32", *arguments) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_needs_neither_torch_nor_deepspeed(tmp_path):
    deepspeed_run(dtype="fp16").write(tmp_path / "run")
    program = (
        "import sys; sys.modules['torch'] = sys.modules['deepspeed'] = None\n"
        "from bitfall.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "to-fp32", tmp_path / "run", tmp_path / "out"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_safetensors_of_every_dtype(tmp_path):
    names = ["float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    arrays = {name: np.array([[0, 1, 2], [3, 4, 5]]).T.astype(name) for name in names}
    arrays["scalar"], arrays["empty"] = np.float32(2.5).reshape(()), np.empty((0, 3), np.float32)
    write_safetensors(tmp_path / "all.safetensors", arrays, {"format": "pt"})
    path = tmp_path / "all.safetensors"
    for read in (load_file(path), read_safetensors(path.read_bytes())):
        assert read.keys() == arrays.keys()
        for name, array in arrays.items():
            assert read[name].dtype == array.dtype
            np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "{",
        '{"a": 1}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 4]}}',
    ],
)
def test_malformed_safetensors(header):
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    with pytest.raises(ValueError, match=r"."):
        read_safetensors(data)
    with pytest.raises(ValueError, match=r"."):
        read_safetensors(data[:5])


def test_deepspeeds_own_functions_under_bitfall_run(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from bitfall import deepspeed_import

    run = deepspeed_run(stage=1, dtype="bf16")
    run.write(tmp_path / "theirs")
    own_checkpoint(tmp_path / "own")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    deepspeed_import.install()
    try:
        from deepspeed.utils import zero_to_fp32

        states = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "theirs"))
        for name, array in run.expected_weights().items():
            np.testing.assert_array_equal(states[name].numpy(), array)
        model = torch.nn.Module()
        model.layer = torch.nn.Linear(3, 2, bias=False)
        zero_to_fp32.load_state_dict_from_zero_checkpoint(model, str(tmp_path / "own"))
        assert model.layer.weight.tolist() == [[0, 1, 2], [3, 4, 5]]
        zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(
            str(tmp_path / "own"), str(tmp_path / "out"), max_shard_size="5GB"
        )
        assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["layer.weight"]
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
            del sys.modules[name]
