"""The table of bits by step, against the worked numbers of the original schedule."""

from __future__ import annotations

import json

import pytest
from bitfall import _core
from bitfall.plan_table import (
    configured_layer_name,
    format_plan,
    plans_before_training,
    unreachable_targets,
)


def complete(**section) -> _core.CompletedConfig:
    defaults = {
        "enabled": True,
        "quantize_bits": {"start_bits": 16, "target_bits": 8},
        "quantize_schedule": {"quantize_period": 100, "schedule_offset": 100},
    }
    text = json.dumps({"train_batch_size": 8, "quantize_training": defaults | section})
    return _core.parse_config(text, "test.json", {})


def test_steps_without_eigenvalues():
    config = complete()
    states = plans_before_training(config, 2)
    assert [state["name"] for state in states] == [
        "bert.encoder.layer.0",
        "bert.encoder.layer.1",
        "other",
    ]
    steps = [(16, 101), (15, 200), (14, 300), (13, 500), (12, 900), (11, 1700), (10, 3300)]
    for state in states:
        assert state["factor"] == 1
        assert [tuple(drop) for drop in state["drops"]] == [*steps, (9, 6500), (8, 12900)]


def test_smallest_and_largest_factor_with_eigenvalues():
    config = complete(eigenvalue={"enabled": True, "layer_name": "bert.encoder.layer"})
    states = plans_before_training(config, 2)
    assert [state["factor"] for state in states] == [1, 1, 1, 5, 5]
    assert dict(states[-1]["drops"])[12] == 100_100
    assert configured_layer_name(config) == "bert.encoder.layer"


def test_table_merges_equal_blocks_and_marks_the_end():
    states = plans_before_training(complete(), 3)
    header, blocks, other = format_plan(states, 1000).splitlines()
    assert header.split("  ")[0] == "state"
    assert [cell for cell in header.split() if cell.isdigit()] == [
        str(bits) for bits in range(16, 7, -1)
    ]
    assert blocks.startswith("bert.encoder.layer.0..2  1  ")
    assert blocks.split()[2:8] == ["101", "200", "300", "500", "900", "(1700)"]
    assert other.split()[0] == "other"
    assert len({len(line) for line in (header, blocks, other)}) == 1
    assert len(format_plan(states, None, merge_equal=False).splitlines()) == 5


def test_widths_that_never_begin_are_dashes():
    schedule = {"quantize_period": 10**12, "schedule_offset": 0}
    config = complete(eigenvalue={"enabled": True}, quantize_schedule=schedule)
    states = plans_before_training(config, 2)
    assert states[-1]["drops"][-1][1] == 2**63 - 1
    *rows, legend = format_plan(states, 300).splitlines()
    assert rows[-1].split()[-1] == "-"
    assert "never begins" in legend
    assert "-" not in rows[1]
    warnings = unreachable_targets(config, states, 2, 300)
    assert "it never begins, training ends" in warnings[-1]
    assert str(2**63 - 1) not in "".join([*rows, *warnings])


def test_warning_names_a_period_that_reaches_the_target():
    config = complete()
    states = plans_before_training(config, 2)
    (warning,) = unreachable_targets(config, states, 2, 345)
    assert "target_bits 8 is out of reach for bert.encoder.layer.0..1 and other" in warning
    assert "begins at step 12900, training ends after 345 steps at 14 bits" in warning
    period = int(warning.split("a quantize_period of ")[1].split()[0])
    for candidate, reached in ((period, True), (period + 1, False)):
        schedule = {"quantize_period": candidate, "schedule_offset": 100}
        plan = plans_before_training(complete(quantize_schedule=schedule), 2)
        assert (plan[0]["drops"][-1][1] <= 345) == reached
    assert unreachable_targets(config, states, 2, 12900) == []


@pytest.mark.parametrize("steps", [50])
def test_warning_when_no_period_helps(steps: int):
    config = complete()
    states = plans_before_training(config, 2)
    (warning,) = unreachable_targets(config, states, 2, steps)
    assert "at full precision; no quantize_period reaches it" in warning
