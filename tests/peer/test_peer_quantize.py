"""bitfall's quantization arithmetic against plain transcriptions of the published formulas."""

import moq_reference
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

core = pytest.importorskip("bitfall._core")

MAX_EXAMPLES = 60
# Normal f32 numbers whose grids are normal too: there the plain formulas need no special cases.
ORDINARY = st.one_of(
    st.just(0.0),
    st.floats(2.0**-66, 2.0**66, width=32),
    st.floats(-(2.0**66), -(2.0**-66), width=32),
    st.floats(-4, 4, width=32).filter(lambda x: abs(x) > 2.0**-66),
)
ANY_FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def weights_and_groups(draw, elements=ORDINARY):
    groups = draw(st.integers(1, 4))
    group_size = draw(st.integers(1, 60))
    array = draw(arrays.arrays(np.float32, groups * group_size, elements=elements))
    return array, groups


def is_narrow(array, groups):
    """Asymmetric groups narrower than f32 can tell are outside of the plain formula."""
    parts = array.reshape(groups, -1).astype(np.float64)
    widths = parts.max(axis=1) - parts.min(axis=1)
    return bool((widths * 2**6 < np.abs(parts).max(axis=1)).any())


@settings(max_examples=MAX_EXAMPLES, deadline=None)
@given(weights_and_groups(), st.integers(3, 15), st.sampled_from(["symmetric", "asymmetric"]))
def test_uniform_weights_equal_the_formula(drawn, bits, q_type):
    array, groups = drawn
    assume(q_type == "symmetric" or not is_narrow(array, groups))
    expected = moq_reference.fake_quantize(array, bits, groups, q_type)
    np.testing.assert_array_equal(core.fake_quantize(array, bits, groups, q_type), expected)


@settings(max_examples=MAX_EXAMPLES, deadline=None)
@given(weights_and_groups(), st.integers(1, 2))
def test_ternary_and_binary_weights_follow_the_formula(drawn, bits):
    array, groups = drawn
    sizes = np.abs(array.reshape(groups, -1).astype(np.float64))
    thresholds = 0.7 * sizes.mean(axis=1, keepdims=True)
    # A magnitude that f32 cannot tell from the threshold may fall on either side.
    assume(bits == 1 or not (np.abs(sizes - thresholds) <= 1e-6 * thresholds).any())
    expected = moq_reference.fake_quantize(array, bits, groups, "symmetric")
    np.testing.assert_allclose(core.fake_quantize(array, bits, groups), expected, rtol=1e-6)


@settings(max_examples=MAX_EXAMPLES, deadline=None)
@given(
    weights_and_groups(ANY_FINITE),
    st.integers(1, 15),
    st.sampled_from(["symmetric", "asymmetric"]),
    st.sampled_from(["nearest", "stochastic"]),
    st.integers(0, 2**63),
)
def test_codes_stand_for_the_same_weights(drawn, bits, q_type, rounding, seed):
    array, groups = drawn
    assume(bits > 2 or (q_type, rounding) == ("symmetric", "nearest"))
    weights = core.fake_quantize(array, bits, groups, q_type, rounding, seed)
    codes, scales, zero_points = core.quantize(array, bits, groups, q_type, rounding, seed)
    assert np.isfinite(weights).all()
    grid = (codes.reshape(groups, -1) + zero_points[:, None]).astype(np.float32)
    np.testing.assert_array_equal((grid * scales[:, None]).reshape(array.shape), weights)
    for group in weights.reshape(groups, -1):
        assert len(np.unique(group)) <= max(2**bits, 3)


@pytest.mark.parametrize("bits", [3, 4, 8, 12, 15])
def test_deepspeeds_arithmetic_gives_the_same_weights(bits):
    array = np.random.default_rng(bits).normal(0, 0.04, 4096).astype(np.float32)
    symmetric = moq_reference.deepspeed_symmetric(array, bits)
    np.testing.assert_array_equal(core.fake_quantize(array, bits), symmetric)
    # DeepSpeed subtracts the zero point before it divides: a code may differ where g / scale lies
    # within a rounding error of a tie.
    asymmetric = moq_reference.deepspeed_asymmetric(array, bits)
    ours = core.fake_quantize(array, bits, 1, "asymmetric")
    step = (array.max() - array.min()) / 2**bits
    assert np.abs(ours - asymmetric).max() <= 1.01 * step
    assert (np.abs(ours - asymmetric) > 0.01 * step).mean() < 0.01


def test_published_values():
    x = np.array([1, -1, 0.5, -0.25], np.float32)
    assert core.fake_quantize(x, 8).tolist() == [0.9921875, -1, 0.5, -0.25]
    assert core.fake_quantize(x, 8, 1, "asymmetric").tolist() == [0.9921875, -1, 0.5, -0.25]
    np.testing.assert_allclose(core.fake_quantize(x, 2), [0.8333333, -0.8333333, 0.8333333, 0])
    assert core.fake_quantize(x, 1).tolist() == [0.6875, -0.6875, 0.6875, -0.6875]
    w = np.array([-0.3, 0, 0.71, 0.2], np.float32)
    np.testing.assert_allclose(
        core.fake_quantize(w, 8, 1, "asymmetric"), [-0.2998437, 0, 0.7062109, 0.2012109], rtol=1e-6
    )
    np.testing.assert_allclose(
        core.fake_quantize(w, 4, 1, "asymmetric"), [-0.315625, 0, 0.63125, 0.189375], rtol=1e-6
    )
