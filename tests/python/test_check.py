"""`bitfall check`: origins of values, machine facts, warnings and refusals."""

import re
from pathlib import Path

import pytest
from bitfall.cli import main

TUTORIAL = Path(__file__).parents[2] / "configs" / "moq_tutorial.json"


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "test.json"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def row(out, key):
    """(value, origin) of the printed line for `key`."""
    match = re.search(rf"^  {re.escape(key)}  +(.*?)  +(.*)$", out, re.MULTILINE)
    assert match, out
    return match[1], match[2]


def test_shows_each_value_with_its_origin(config, capsys):
    path = config(
        '{"gradient_clipping": 0.5, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}'
    )
    assert main(["check", path, "--learning_rate", "3e-5"]) == 0
    out = capsys.readouterr().out
    assert row(out, "gradient_clipping") == ("0.5", "file")
    assert row(out, "optimizer.params.lr") == ("3e-05", "flag --learning_rate")
    assert row(out, "optimizer.params.adam_w_mode") == ("true", "default")
    assert re.search(r"^CPU kernels      (generic|avx2|avx512|avx512_bf16)$", out, re.MULTILINE)
    assert re.search(r"^processes        1 ", out, re.MULTILINE)


def test_tutorial_config_is_accepted_with_its_alias_named(capsys):
    assert main(["check", str(TUTORIAL), "--fp16"]) == 0
    out = capsys.readouterr().out
    assert f"{TUTORIAL}: accepted" in out
    assert "computes in      f16" in out
    assert re.search(r"^warning: .*quantize-algo", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "flags", "parts"),
    [
        ('{"optimizr": {}}', [], ["optimizr", "optimizer"]),
        ('{"gradient_clipping": -1}', [], ["gradient_clipping", "-1"]),
        ('{"gradient_clipping": 1, "gradient_clipping": 2}', [], ["gradient_clipping"]),
        (
            '{"gradient_clipping": 1.0}',
            ["--max_grad_norm", "2.0"],
            ["--max_grad_norm", "2.0", "1.0"],
        ),
        ("{", [], ["test.json"]),
    ],
)
def test_refusal_is_one_message_and_exit_code_1(config, capsys, text, flags, parts):
    assert main(["check", config(text), *flags]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bitfall: error: ")
    for part in parts:
        assert part in captured.err


def test_unknown_flag_names_the_nearest(config, capsys):
    assert main(["check", config("{}"), "--lerning_rate", "1"]) == 1
    assert "--learning_rate" in capsys.readouterr().err
