"""The compiled module as Python sees it: types, errors, arrays, and the engine on a tiny BERT."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_engine import EIGENVALUE, QUANTIZE, completed, make_batch, make_engine

_core = pytest.importorskip("bitfall._core", reason="the C++ module is not built")


def test_error_classes_are_what_python_code_expects() -> None:
    assert issubclass(_core.Error, RuntimeError)
    for name in ("ConfigError", "ShapeError"):
        assert issubclass(getattr(_core, name), _core.Error)
        assert issubclass(getattr(_core, name), ValueError)
    for name in ("Unsupported", "Backend", "Communication", "ModelFile", "Checkpoint", "Training"):
        assert issubclass(getattr(_core, f"{name}Error"), _core.Error)
    assert _core.ConfigError.__module__ == "bitfall._core"


def test_parse_config_gives_values_origins_and_errors() -> None:
    config = completed(quantize_training=QUANTIZE | {"eigenvalue": EIGENVALUE})
    assert config.quantize_enabled
    assert config.eigenvalue_enabled
    assert config.train_micro_batch_size_per_gpu == 4
    assert config.gradient_accumulation_steps == 1
    assert config.compute_dtype == "f32"
    assert json.loads(config.json)["optimizer"]["params"]["lr"] == 1e-3
    assert config.origins["optimizer.params.lr"] == "file"
    with pytest.raises(_core.ConfigError, match=r"test\.json"):
        _core.parse_config("{", "test.json", {})
    with pytest.raises(AttributeError):
        config.seed = 3


def test_plan_bits_needs_no_model() -> None:
    config = completed(quantize_training=QUANTIZE | {"eigenvalue": EIGENVALUE})
    plan = _core.plan_bits(config, 2, [0.0, 1.0], "bert.encoder.layer")
    assert [state["name"] for state in plan] == [
        "bert.encoder.layer.0",
        "bert.encoder.layer.1",
        "other",
    ]
    assert [state["block"] for state in plan] == [0, 1, -1]
    assert [state["factor"] for state in plan] == [1, 5, 1]
    assert [bits for bits, _ in plan[0]["drops"]] == [10, 9, 8, 7, 6, 5, 4]
    # Drop k happens at offset + period (2 f)^k, k = 0, 1, ...
    assert [step for _, step in plan[0]["drops"]][1:] == [1, 2, 4, 8, 16, 32]
    assert [step for _, step in plan[1]["drops"]][1:4] == [1, 10, 100]
    assert _core.longest_period_that_reaches(config, 0, 2, 1, 64) == 2
    with pytest.raises(_core.ShapeError, match="3 values for 2 layers"):
        _core.plan_bits(config, 2, [0.0, 1.0, 0.5], "bert.encoder.layer")
    with pytest.raises(_core.ConfigError, match=r"expected 0\.\.1"):
        _core.plan_bits(config, 1, [1.5], "bert.encoder.layer")
    with pytest.raises(_core.ConfigError, match="num_layers = 0"):
        _core.plan_bits(config, 0, None, "bert.encoder.layer")
    with pytest.raises(_core.ConfigError, match="group = 1"):
        _core.longest_period_that_reaches(config, 1, 2, 1, 64)
    with pytest.raises(_core.ConfigError, match="quantization is off"):
        _core.plan_bits(completed(), 2, None, "bert.encoder.layer")


@pytest.mark.parametrize("q_type", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", [3, 8, 12])
def test_integers_stand_for_the_fake_quantized_values(
    q_type: str, rounding: str, bits: int
) -> None:
    array = np.random.default_rng(1).normal(size=(6, 32)).astype(np.float32)
    options: dict[str, Any] = {"groups": 4, "q_type": q_type, "rounding": rounding, "seed": 7}
    fake = _core.fake_quantize(array, bits, **options)
    codes, scales, zero_points = _core.quantize(array, bits, **options)
    assert fake.dtype == np.float32
    assert fake.shape == codes.shape == array.shape
    assert scales.shape == zero_points.shape == (4,)
    grouped = (codes.reshape(4, -1) + zero_points[:, None]).astype(np.float32) * scales[:, None]
    np.testing.assert_array_equal(grouped.reshape(array.shape), fake)
    for group in fake.reshape(4, -1):
        assert len(np.unique(group)) <= 2**bits
    if rounding == "nearest":  # half a step, and one more where the largest code is clamped
        assert np.abs(fake - array).max() <= 1.5 * scales.max()


def test_symmetric_nearest_follows_the_published_formula() -> None:
    array = np.random.default_rng(2).normal(size=64).astype(np.float32)
    step = np.float32(2) * np.abs(array).max() / np.float32(16)
    expected = np.clip(np.rint(array / step), -8, 7).astype(np.float32) * step
    np.testing.assert_array_equal(_core.fake_quantize(array, 4), expected)


def test_stochastic_rounding_depends_on_the_seed_alone() -> None:
    array = np.random.default_rng(3).normal(size=256).astype(np.float32)
    first, again, other = (
        _core.fake_quantize(array, 3, rounding="stochastic", seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_quantize_refuses_what_it_would_have_to_convert() -> None:
    array = np.ones((4, 8), np.float32)
    with pytest.raises(_core.ShapeError, match=r"float64.*expected float32"):
        _core.fake_quantize(array.astype(np.float64), 8)
    with pytest.raises(_core.ShapeError, match="C-contiguous"):
        _core.fake_quantize(array.T, 8)
    with pytest.raises(_core.ShapeError, match="empty"):
        _core.quantize(array[:0], 8)
    with pytest.raises(TypeError):
        _core.fake_quantize([1.0, 2.0], 8)
    with pytest.raises(_core.ShapeError):
        _core.fake_quantize(array, 8, groups=5)
    with pytest.raises(_core.ConfigError):
        _core.fake_quantize(array, 0)
    with pytest.raises(_core.ConfigError, match="q_type"):
        _core.fake_quantize(array, 8, q_type="affine")
    with pytest.raises(_core.ConfigError, match="rounding"):
        _core.fake_quantize(array, 8, rounding="up")
    with pytest.raises(_core.TrainingError):
        _core.quantize(array * np.float32(np.nan), 8)


def test_world_of_one() -> None:
    communicator = _core.make_communicator()
    assert (communicator.rank, communicator.world_size, communicator.local_rank) == (0, 1, 0)
    assert communicator.broadcast(b"\0abc\xff") == b"\0abc\xff"
    assert communicator.all_gather(b"") == [b""]
    communicator.barrier()
    with pytest.raises(_core.CommunicationError, match="root 1"):
        communicator.broadcast(b"", root=1)


def test_training_reports_a_step(tiny_model_dir: Path) -> None:
    engine = make_engine(tiny_model_dir, quantize_training=QUANTIZE)
    assert engine.num_layers == 2
    first = engine.train_batch([make_batch()])
    assert (first["step"], engine.global_step, engine.skipped_steps) == (1, 1, 0)
    assert first["bits"] == {
        "bert.encoder.layer.0": 9,
        "bert.encoder.layer.1": 9,
        "other": 9,
    }
    assert {drop["name"] for drop in first["drops"]} == set(first["bits"])
    assert first["drops"][0]["old_bits"] == 10
    assert first["eigenvalues"] == []
    losses = [engine.train_batch([make_batch()])["loss"] for _ in range(30)]
    assert losses[-1] < 0.5 * first["loss"]
    timings = engine.timings()
    assert timings["forward"] > 0
    assert timings["backward"] > 0
    assert engine.timings()["forward"] == 0
    memory = engine.memory_bytes()
    assert memory["master"] == memory["working"] == memory["gradient"] > 0


@pytest.mark.parametrize("head", ["classification", "regression", "span"])
def test_evaluate_gives_loss_and_logits(tiny_model_dir: Path, head: str) -> None:
    engine = make_engine(tiny_model_dir, head)
    batch = make_batch()
    labels = {
        "classification": batch["labels"],
        "regression": np.linspace(-1, 1, 4).astype(np.float32),
        "span": np.array([[0, 1], [1, 2], [0, 6], [3, 3]], np.int32),
    }[head]
    loss, logits = engine.evaluate({**batch, "labels": labels})
    assert logits.dtype == np.float32
    assert logits.shape == {"classification": (4, 2), "regression": (4, 1), "span": (19, 2)}[head]
    if head == "classification":
        shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
        expected = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(4), labels]
        assert loss == pytest.approx(expected.mean(), rel=1e-5)
    if head == "regression":
        assert loss == pytest.approx(((logits[:, 0] - labels) ** 2).mean(), rel=1e-5)
    del batch["labels"]
    without, same = engine.evaluate(batch)
    assert without is None
    np.testing.assert_array_equal(same, logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": np.zeros(19, np.int64)}, "int64.*expected int32"),
        ({"input_ids": np.zeros((19, 1), np.int32)}, "2 dimensions"),
        ({"input_ids": np.zeros(38, np.int32)[::2]}, "C-contiguous"),
        ({"input_ids": [0] * 19}, "is a list, expected a numpy array"),
        ({"input_ids": np.full(19, 24, np.int32)}, "24"),
        ({"input_ids": np.full(19, -1, np.int32)}, "-1"),
        ({"labels": np.zeros((4, 3), np.int32)}, "3 columns"),
        ({"labels": np.zeros(3, np.int32)}, "labels"),
        ({"labels": np.full(4, 9, np.int32)}, "9"),
        ({"labels": np.zeros(4, np.float32)}, "labels"),
        ({"sequence_starts": np.array([0, 5, 5, 15, 19], np.int32)}, "sequence"),
        ({"sequence_starts": np.array([], np.int32)}, "sequence|sample"),
        ({"sample_keys": np.arange(3, dtype=np.int32)}, "sample"),
        ({"attention_mask": np.ones(19, np.int32)}, "attention_mask.*unknown"),
    ],
)
def test_malformed_batches_are_refused(
    tiny_model_dir: Path, change: dict[str, Any], message: str
) -> None:
    engine = make_engine(tiny_model_dir)
    with pytest.raises(_core.ShapeError, match=message):
        engine.evaluate({**make_batch(), **change})
    with pytest.raises(_core.ShapeError, match=message):
        engine.train_batch([{**make_batch(), **change}])
    engine.train_batch([make_batch()])  # still works


def test_missing_keys_and_wrong_numbers_of_micro_batches(tiny_model_dir: Path) -> None:
    engine = make_engine(tiny_model_dir)
    for key in ("input_ids", "sequence_starts", "sample_keys"):
        batch = make_batch()
        del batch[key]
        with pytest.raises(_core.ShapeError, match=f"{key}.*missing"):
            engine.evaluate(batch)
    with pytest.raises(_core.ShapeError, match="gradient_accumulation_steps"):
        engine.train_batch([make_batch(), make_batch()])


def test_engine_refuses_wrong_heads_and_folders(tiny_model_dir: Path, tmp_path: Path) -> None:
    config, communicator = completed(), _core.make_communicator()
    with pytest.raises(_core.ConfigError, match="classification"):
        _core.Engine(str(tiny_model_dir), "ranking", 2, config, communicator)
    with pytest.raises(_core.ConfigError):
        _core.Engine(str(tiny_model_dir), "regression", 3, config, communicator)
    with pytest.raises(_core.ModelFileError, match=r"config\.json"):
        _core.Engine(str(tmp_path), "classification", 2, config, communicator)


def test_checkpoint_resumes_bit_for_bit(tiny_model_dir: Path, tmp_path: Path) -> None:
    sections = {"quantize_training": QUANTIZE | {"eigenvalue": EIGENVALUE}}
    engine = make_engine(tiny_model_dir, **sections)
    for _ in range(3):
        engine.train_batch([make_batch()])
    engine.save_checkpoint(str(tmp_path), "global_step3", '{"epoch": 1}')
    resumed = make_engine(tiny_model_dir, **sections)
    assert json.loads(resumed.load_checkpoint(str(tmp_path))) == {"epoch": 1}
    assert resumed.global_step == 3
    for _ in range(3):
        assert engine.train_batch([make_batch()]) == resumed.train_batch([make_batch()])
    with pytest.raises(_core.CheckpointError):
        resumed.load_checkpoint(str(tmp_path), "global_step9")


def test_saved_models_hold_masters_grid_values_and_integers(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    engine = make_engine(tiny_model_dir, quantize_training=QUANTIZE)
    for _ in range(40):
        engine.train_batch([make_batch()])
    for kind in ("master", "quantized", "integers"):
        engine.save_model(str(tmp_path / kind), kind)
    master = load_file(tmp_path / "master" / "model.safetensors")
    quantized = load_file(tmp_path / "quantized" / "model.safetensors")
    integers = load_file(tmp_path / "integers" / "quantized.safetensors")
    assert master.keys() == quantized.keys()
    sizes, errors = engine.quantized_sizes(), engine.quantization_error()
    assert set(sizes) == set(master)
    for name, size in sizes.items():
        assert size["numel"] == master[name].size
        if size["bits"] == 32:
            np.testing.assert_array_equal(quantized[name], master[name])
            np.testing.assert_array_equal(integers[name], master[name])
            continue
        expected = _core.fake_quantize(master[name], size["bits"], groups=4)
        np.testing.assert_array_equal(quantized[name], expected)
        codes, scales, _ = _core.quantize(master[name], size["bits"], groups=4)
        np.testing.assert_array_equal(integers[f"{name}.scales"], scales)
        np.testing.assert_array_equal(
            unpack(integers[f"{name}.codes"], size["bits"], size["numel"]), codes.reshape(-1)
        )
        difference = np.linalg.norm((quantized[name] - master[name]).astype(np.float64))
        norm = np.linalg.norm(master[name].astype(np.float64))
        assert errors[name] == pytest.approx(difference / norm, rel=1e-4)
    assert {size["bits"] for size in sizes.values()} == {4, 32}
    fresh = make_engine(tmp_path / "quantized")
    np.testing.assert_allclose(
        fresh.evaluate(make_batch())[1], engine.evaluate(make_batch())[1], rtol=0, atol=1e-6
    )
    with pytest.raises(_core.ConfigError, match="weights = 'int8'"):
        engine.save_model(str(tmp_path), "int8")
    with pytest.raises(_core.ConfigError, match="nothing is quantized"):
        fresh.save_model(str(tmp_path), "integers")


def unpack(codes: np.ndarray, bits: int, numel: int) -> np.ndarray:
    """Signed codes of `bits` each from a little-endian stream of bits."""
    stream = np.unpackbits(codes.view(np.uint8), bitorder="little")[: numel * bits]
    weights = 1 << np.arange(bits)
    weights[-1] *= -1
    return stream.reshape(numel, bits).astype(np.int32) @ weights.astype(np.int32)


def test_other_threads_run_during_a_step(tiny_model_dir: Path) -> None:
    engine = make_engine(tiny_model_dir)
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            stop.wait(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for _ in range(50):
            engine.train_batch([make_batch()])
    finally:
        stop.set()
        thread.join()
    assert ticks[0] > 5


def test_cpu_isa_is_one_of_the_known() -> None:
    assert _core.cpu_isa() in {"generic", "avx2", "avx512", "avx512_bf16"}
