"""`bitfall schedule`: the published tables of steps, warnings, JSON and refusals."""

import json

import pytest
from bitfall.cli import main

# Steps at which 16, 15, ... 8 bits begin with period 100 and offset 100 (spec of the original).
DEEPSPEED_CLOCK = [17, 34, 51, 84, 151, 284, 551, 1084, 2151]
STEP_CLOCK = [101, 200, 300, 500, 900, 1700, 3300, 6500, 12900]
DEEPSPEED_EIGENVALUES = {
    1: [2, 4, 5, 8, 14, 25, 47, 91, 180],
    2: [2, 4, 8, 25, 91, 358, 1425, 5691, 22758],
    3: [2, 4, 11, 52, 302, 1802, 10802, 64802, 388802],
    4: [2, 4, 14, 91, 714, 5691, 45514, 364091, 2912714],
    5: [2, 4, 16, 141, 1391, 13891, 138891, 1388891, 13888891],
}


@pytest.fixture
def config(tmp_path):
    """Writes a config; keyword arguments overwrite parts of quantize_training."""

    def write(clock="step", eigenvalue=False, **overrides):
        training = {
            "enabled": True,
            "quantize_bits": {"start_bits": 16, "target_bits": 8},
            "quantize_schedule": {"quantize_period": 100, "schedule_offset": 100, "clock": clock},
        }
        if eigenvalue:
            training["eigenvalue"] = {"enabled": True}
        path = tmp_path / "test.json"
        document = {"train_batch_size": 32, "quantize_training": {**training, **overrides}}
        path.write_text(json.dumps(document), encoding="utf-8")
        return str(path)

    return write


def plan(capsys, *arguments):
    assert main(["schedule", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def begin_steps(result, state):
    return [result["begins_at_step"], *(drop["step"] for drop in state["drops"])]


@pytest.mark.parametrize(
    ("clock", "expected"), [("step", STEP_CLOCK), ("deepspeed-0.6", DEEPSPEED_CLOCK)]
)
def test_json_has_the_published_steps(config, capsys, clock, expected):
    result = plan(capsys, config(clock), "--layers", "12")
    assert result["clock"] == clock
    names = [f"bert.encoder.layer.{i}" for i in range(12)]
    assert [state["name"] for state in result["states"]] == [*names, "other"]
    for state in result["states"]:
        assert begin_steps(result, state) == expected
        assert [drop["bits"] for drop in state["drops"]] == list(range(15, 7, -1))
        assert state["factor"] == 1


def test_eigenvalues_stretch_the_periods_of_their_layer(config, capsys):
    values = [0.1, 0.25, 0.5, 0.75, 1.0, 0.0] + [0.2] * 6
    text = ",".join(map(str, values))
    result = plan(capsys, config("deepspeed-0.6", eigenvalue=True), "--eigenvalues", text)
    factors = [1, 2, 3, 4, 5, 1] + [1] * 6
    assert [state["factor"] for state in result["states"]] == [*factors, 1]
    for state in result["states"]:
        assert begin_steps(result, state) == DEEPSPEED_EIGENVALUES[state["factor"]]


def test_unknown_eigenvalues_give_the_fastest_and_the_slowest_case(config, capsys):
    result = plan(capsys, config("deepspeed-0.6", eigenvalue=True), "--layers", "2")
    found = [(state["name"], state["factor"]) for state in result["states"]]
    layers = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert found == [(layers[0], 1), (layers[1], 1), ("other", 1), (layers[0], 5), (layers[1], 5)]


def test_json_stops_at_the_planned_steps(config, capsys):
    result = plan(capsys, config(), "--layers", "1", "--steps", "900")
    assert [drop["step"] for drop in result["states"][0]["drops"]] == [200, 300, 500, 900]


def test_layers_come_from_the_model(config, capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3}', encoding="utf-8")
    assert len(plan(capsys, config(), "--model", str(tmp_path))["states"]) == 4


def test_layers_come_from_the_config(config, capsys):
    path = config(eigenvalue={"enabled": True, "layer_num": 5})
    result = plan(capsys, path, "--eigenvalues", "0,0,0,0,0")
    assert len(result["states"]) == 6


def test_table_warns_and_names_a_period_that_reaches_the_target(config, capsys):
    path = config(quantize_schedule={"quantize_period": 400, "schedule_offset": 0})
    assert main(["schedule", path, "--layers", "12", "--steps", "345"]) == 0
    out = capsys.readouterr().out
    assert "bert.encoder.layer.0..11" in out
    assert "(400)" in out  # 15 bits begin after the end
    assert "warning: target_bits 8 is out of reach" in out
    assert "a quantize_period of 2 or less reaches it" in out  # 2 * 2^7 = 256 <= 345
    path = config(quantize_schedule={"quantize_period": 2, "schedule_offset": 0})
    assert main(["schedule", path, "--layers", "12", "--steps", "345"]) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eigenvalues", "0.1,2"], "expected numbers in [0, 1]"),
        (["--eigenvalues", "0.1,nan"], "expected numbers in [0, 1]"),
        (["--eigenvalues", "a"], "expected numbers in [0, 1]"),
        (["--layers", "0"], "expected a whole number, 1 or more"),
        (["--layers", "2", "--eigenvalues", "0.1"], "1 values for 2 layers"),
        (["--model", "/nonexistent"], "/nonexistent/config.json: No such file"),
        (["--steps", "-5"], "expected a whole number"),
    ],
)
def test_wrong_arguments_are_one_error(config, capsys, arguments, message):
    assert main(["schedule", config(eigenvalue=True), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_eigenvalues_without_the_section_are_refused(config, capsys):
    assert main(["schedule", config(), "--layers", "1", "--eigenvalues", "0.5"]) == 1
    assert "eigenvalue.enabled is not true" in capsys.readouterr().err


def test_config_without_quantization_is_refused(config, capsys):
    assert main(["schedule", config(enabled=False)]) == 1
    assert "quantization is off" in capsys.readouterr().err


def test_missing_config_names_the_file(capsys):
    assert main(["schedule", "no_such.json"]) == 1
    assert "no_such.json: No such file" in capsys.readouterr().err
