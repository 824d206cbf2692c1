"""`import deepspeed` under `bitfall run`: the names Hugging Face uses, and clear refusals."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("bitfall._core", reason="the C++ module is not built")


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch):
    """bitfall's deepspeed in this process, for one test."""
    from bitfall import deepspeed_import

    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # set by init_distributed, unset at the end
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    deepspeed_import.install()
    yield importlib.import_module("deepspeed")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "name",
    [
        "initialize",
        "init_distributed",
        "add_config_arguments",
        "DeepSpeedEngine",
        "__version__",
        "comm.is_initialized",
        "comm.get_rank",
        "comm.all_reduce",
        "comm.ReduceOp.SUM",
        "runtime.lr_schedules.VALID_LR_SCHEDULES",
        "runtime.engine.DeepSpeedEngine",
        "runtime.config.DeepSpeedConfigError",
        "runtime.zero.partition_parameters.ZeroParamStatus",
        "utils.logger.setLevel",
        "utils.logging.log_dist",
        "checkpoint.utils.clone_tensors_for_torch_save",
        "ops.adam.DeepSpeedCPUAdam",
        "ops.adam.FusedAdam",
        "accelerator.get_accelerator",
        "zero.GatheredParameters",
    ],
)
def test_names_are_there_after_one_import(deepspeed, name: str):
    value = deepspeed
    for part in name.split("."):
        value = getattr(value, part)


def test_every_module_can_be_imported(deepspeed):
    folder = Path(deepspeed.__file__).parent
    for path in folder.rglob("*.py"):
        module = ".".join(["deepspeed", *path.relative_to(folder).with_suffix("").parts])
        importlib.import_module(module.removesuffix(".__init__"))


def test_hugging_face_finds_it():
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    source = """
from accelerate.utils import is_deepspeed_available, compare_versions
from transformers.dependency_versions_check import dep_version_check
from transformers.integrations import HfDeepSpeedConfig
dep_version_check("deepspeed")
print(is_deepspeed_available(), compare_versions("deepspeed", ">=", "0.18.2"))
print(HfDeepSpeedConfig({"zero_optimization": {"stage": 2}}).is_zero2())
"""
    code = "from bitfall import deepspeed_import; deepspeed_import.install()" + source
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.stdout == "True True\nTrue\n", done.stderr


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda ds: ds.zero.Init().__enter__(), "deepspeed.zero.Init: not in bitfall; .*stage 3"),
        (lambda ds: ds.zero.register_external_parameter(1, 2), "stage 3"),
        (lambda ds: ds.utils.set_z3_leaf_modules(None, []), "stages 0 to 2"),
        (lambda ds: ds.init_inference(None), "bitfall trains; load the saved model"),
        (lambda ds: ds.tp_model_init(None), "tensor parallelism is not planned"),
        (lambda ds: ds.runtime.lr_schedules.WarmupLR(None), 'name it in the config ."scheduler"'),
        (lambda ds: ds.ops.adam.FusedAdam([], amsgrad=True), "amsgrad=True"),
    ],
)
def test_what_is_not_planned_is_refused_when_used(deepspeed, use, message: str):
    from bitfall._core import UnsupportedError

    with pytest.raises(UnsupportedError, match=message):
        use(deepspeed)


@pytest.mark.parametrize("place", ["", "zero", "utils", "ops", "ops.adam", "runtime", "checkpoint"])
def test_missing_attributes_say_whose_they_are(deepspeed, place: str):
    module = importlib.import_module(f"deepspeed.{place}".rstrip("."))
    message = f"bitfall does not provide '{module.__name__}.PipelineModule'"
    with pytest.raises(AttributeError, match=re.escape(message)):
        _ = module.PipelineModule
    assert not hasattr(module, "PipelineModule")


def test_missing_modules_say_whose_they_are(deepspeed):
    with pytest.raises(ImportError, match=r"bitfall does not provide the module 'deepspeed\.moe'"):
        importlib.import_module("deepspeed.moe.layer")
    with pytest.raises(ImportError, match="PipelineModule"):
        exec("from deepspeed.runtime import PipelineModule")


def test_without_pytorch_the_extra_is_named():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from bitfall import deepspeed_import; deepspeed_import.install()\nimport deepspeed"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False
    )
    assert "needs PyTorch: pip install 'bitfall[torch]'" in done.stderr


def test_stage_3_helpers_do_nothing_below_stage_3(deepspeed):
    weight = torch.nn.Parameter(torch.zeros(2))
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0), torch.no_grad():
        weight += 1
    with deepspeed.zero.Init(enabled=False):
        assert torch.nn.Linear(2, 2).weight.shape == (2, 2)
    assert weight.tolist() == [1, 1]


def test_communication_in_a_world_of_one(deepspeed):
    comm = deepspeed.comm
    assert not comm.is_initialized()
    deepspeed.init_distributed(dist_backend="nccl")  # no ranks, so nothing that would need a GPU
    deepspeed.init_distributed()
    values = torch.tensor([1.0, 2.0])
    comm.all_reduce(values, op=comm.ReduceOp.SUM)
    comm.broadcast(values, src=0)
    comm.barrier()
    assert values.tolist() == [1, 2]
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["0", "0", "1"]
    assert (comm.get_rank(), comm.get_world_size(), comm.get_local_rank()) == (0, 1, 0)


def test_saved_tensors_own_their_elements_only(deepspeed):
    flat = torch.arange(1000.0)
    clone = deepspeed.checkpoint.utils.clone_tensors_for_torch_save
    copied = clone({"a": flat[10:12], "b": [flat[:3], (flat[5:6], "text")]})
    assert copied["a"].tolist() == [10, 11]
    assert copied["a"].untyped_storage().nbytes() == 8
    assert copied["b"][0].tolist() == [0, 1, 2]
    assert copied["b"][1][1] == "text"
    assert isinstance(copied["b"][1], tuple)


def test_deepspeeds_adam_is_torchs(deepspeed):
    weight = torch.nn.Parameter(torch.zeros(2))
    fused = deepspeed.ops.adam.FusedAdam([weight], lr=0.5, weight_decay=0.1)
    assert type(fused) is torch.optim.AdamW
    assert fused.defaults["lr"] == 0.5
    assert fused.defaults["weight_decay"] == 0.1
    plain = deepspeed.ops.adam.DeepSpeedCPUAdam([weight], adamw_mode=False)
    assert type(plain) is torch.optim.Adam


def test_config_arguments(deepspeed):
    import argparse

    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", "test.json"])
    assert (args.deepspeed, args.deepspeed_config) == (True, "test.json")


def test_accelerator(deepspeed):
    accelerator = deepspeed.accelerator.get_accelerator()
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert accelerator.device_name() == expected
    assert accelerator.device(0).type == expected
    assert torch.zeros(1, device=accelerator.current_device_name()).device.type == expected


def test_logging_on_some_ranks(deepspeed, caplog):
    log_dist = deepspeed.utils.log_dist
    with caplog.at_level("INFO", logger="DeepSpeed"):
        log_dist("everyone")
        log_dist("first", ranks=[0])
        log_dist("second", ranks=[1])
    assert [record.getMessage() for record in caplog.records] == [
        "[Rank 0] everyone",
        "[Rank 0] first",
    ]
