"""bitfall's table of bits against a step-by-step transcription of both clocks."""

import json

import moq_reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

core = pytest.importorskip("bitfall._core")

STEPS = 400
LAYER_NAME = "bert.encoder.layer"


@st.composite
def schedules(draw):
    start_bits = draw(st.integers(3, 15))
    num_layers = draw(st.integers(1, 4))
    eigenvalues = None
    if draw(st.booleans()):
        eigenvalues = draw(st.lists(st.floats(0, 1), min_size=num_layers, max_size=num_layers))
    return {
        "clock": draw(st.sampled_from(["step", "deepspeed-0.6"])),
        "start_bits": start_bits,
        "target_bits": draw(st.integers(3, start_bits)),
        "period": draw(st.integers(1, 120)),
        "offset": draw(st.integers(0, 120)),
        "num_layers": num_layers,
        "eigenvalues": eigenvalues,
    }


def config_of(drawn):
    text = json.dumps(
        {
            "train_batch_size": 8,
            "quantize_training": {
                "enabled": True,
                "quantize_bits": {
                    "start_bits": drawn["start_bits"],
                    "target_bits": drawn["target_bits"],
                },
                "quantize_schedule": {
                    "clock": drawn["clock"],
                    "quantize_period": drawn["period"],
                    "schedule_offset": drawn["offset"],
                },
                "eigenvalue": {
                    "enabled": drawn["eigenvalues"] is not None,
                    "layer_name": LAYER_NAME,
                    "layer_num": drawn["num_layers"],
                },
            },
        }
    )
    return core.parse_config(text, "test.json", {})


def expected_drops(drawn, factor):
    state = moq_reference.State(drawn["start_bits"], drawn["target_bits"], drawn["period"], factor)
    if drawn["clock"] == "step":
        return moq_reference.documented_clock(state, drawn["offset"], STEPS)
    layer_num = drawn["num_layers"] if drawn["eigenvalues"] is not None else 0
    return moq_reference.deepspeed_counter(state, drawn["offset"], STEPS, layer_num)


@settings(max_examples=100, deadline=None)
@given(schedules())
def test_the_table_is_what_stepping_gives(drawn):
    plan = core.plan_bits(config_of(drawn), drawn["num_layers"], drawn["eigenvalues"], LAYER_NAME)
    assert [state["block"] for state in plan] == [*range(drawn["num_layers"]), -1]
    for state in plan:
        factor = 1
        if state["block"] >= 0 and drawn["eigenvalues"] is not None:
            factor = moq_reference.factor_of(drawn["eigenvalues"][state["block"]])
        assert state["factor"] == factor
        within = [tuple(drop) for drop in state["drops"] if drop[1] <= STEPS]
        assert within == expected_drops(drawn, factor), state["name"]
