import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t3c.core import ops
from t3c.core.codes import GROUP, Grouped, quantize_groups


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 200), st.integers(0, 2**31))
def test_four_bits_are_near_and_scales_are_halves(rows: int, cols: int, seed: int) -> None:
    w = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    w[0, :GROUP] = 0
    made = quantize_groups(w)
    assert made.q.min() >= -8
    assert made.q.max() <= 7
    assert not np.any(made.scale.view(np.uint32) & 0xFFFF)
    steps = np.repeat(np.abs(made.scale), GROUP, 1)[:, :cols]
    off = np.abs(made.dequantize() - w)
    clipped = np.isin(made.q, (-8, 7))
    assert np.all((off <= 0.501 * steps) | clipped)
    assert np.all(made.dequantize()[0, :GROUP] == 0)


def test_codes_of_normal_weights_err_by_a_tenth() -> None:
    w = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    error = np.linalg.norm(quantize_groups(w).dequantize() - w) / np.linalg.norm(w)
    assert 0.08 < error < 0.095


def test_a_prefix_keeps_the_scales_of_its_groups() -> None:
    w = np.random.default_rng(0).standard_normal((5, 150)).astype(np.float32)
    whole = quantize_groups(w)
    for cols, groups in ((64, 1), (65, 2), (150, 3)):
        part = whole.prefix(3, cols)
        assert part.scale.shape == (3, groups)
        assert np.array_equal(part.dequantize(), whole.dequantize()[:3, :cols])


def test_group_sums_add_up_to_the_product() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 130)).astype(np.float32)
    w = quantize_groups(rng.standard_normal((7, 130)).astype(np.float32))
    q, scale = ops.quantize(x, (1,))
    want = q.astype(np.float64) @ w.dequantize().astype(np.float64).T * scale
    assert ops.group_accumulators(x, w).shape == (3, 3, 7)
    np.testing.assert_allclose(ops.linear(x, w), want, rtol=1e-5, atol=1e-5)


def test_wrong_scales_are_refused() -> None:
    q = np.zeros((2, 65), np.int8)
    with pytest.raises(TypeError, match="need int8 codes and float32 scales"):
        Grouped(q, np.ones((2, 2), np.float64))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="does not fit codes"):
        Grouped(q, np.ones((2, 1), np.float32))
    with pytest.raises(ValueError, match="must be bfloat16"):
        Grouped(q, np.full((2, 2), 1 / 3, np.float32))
