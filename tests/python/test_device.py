"""Where a run computes, and what is said about it."""

import json
import re

import pytest
from bitfall import _core
from bitfall.cli import main
from bitfall.device import choose_device

HAS_GPU = _core.choose_device("auto")[0] == "cuda"


class Ranks:
    """A communicator whose other ranks answer `others`."""

    def __init__(self, *others, rank=0):
        self.others, self.rank = others, rank

    def all_gather(self, data):
        gathered = [json.dumps(other).encode() for other in self.others]
        gathered.insert(self.rank, data)
        return gathered


def test_auto_takes_the_gpu_only_where_every_rank_has_one(monkeypatch):
    monkeypatch.setattr(_core, "choose_device", lambda _: ("cuda", "1 GPU: X"))
    assert choose_device("auto", Ranks()) == ("cuda", "1 GPU: X")
    assert choose_device("auto", Ranks(["cuda", "1 GPU: Y"])) == ("cuda", "1 GPU: X")
    assert choose_device("auto", Ranks(["cpu", "no driver"])) == ("cpu", "rank 1: no driver")
    assert choose_device("auto", Ranks(["cpu", "none"], rank=1)) == ("cpu", "rank 0: none")


def test_cpu_is_always_there():
    assert choose_device("cpu", Ranks()) == ("cpu", "as asked for")


@pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
def test_without_a_gpu_cuda_is_an_error_and_auto_says_why(capsys, tmp_path):
    device, reason = _core.choose_device("auto")
    assert device == "cpu"
    with pytest.raises(_core.BackendError, match="device cuda"):
        _core.choose_device("cuda")
    config = tmp_path / "test.json"
    config.write_text("{}", encoding="utf-8")
    assert main(["check", str(config)]) == 0
    shown = re.search(r"^device +cpu: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert shown
    assert shown[1] == reason
    assert main(["check", str(config), "--device", "cuda"]) == 1
    assert "device cuda" in capsys.readouterr().err
