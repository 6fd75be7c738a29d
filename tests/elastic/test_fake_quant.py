import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t3c.core import codes, ops
from t3c.core.codes import Matrix
from t3c.elastic import fake_quant


def matrix(w: fake_quant.Codes) -> Matrix:
    return Matrix(w[0].numpy(), w[1].numpy())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**31))
def test_linear_equals_the_contract_bit_for_bit(m: int, k: int, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, w, b = torch.randn(m, k) * 3, torch.randn(n, k), torch.randn(n)
    x[0] = 0
    q, scale = fake_quant.quantize(x, (1,))
    want_q, want_scale = ops.quantize(x.numpy(), (1,))
    assert np.array_equal(q.numpy(), want_q)
    assert np.array_equal(scale.numpy(), want_scale)
    rounded = fake_quant.quantize_weight(w)
    want_w = codes.quantize_weight(w.numpy())
    assert np.array_equal(rounded[0].numpy(), want_w.q)
    assert np.array_equal(rounded[1].numpy(), want_w.scale)
    acc = fake_quant.product(q, rounded[0])
    assert np.array_equal(acc.numpy(), ops.linear_accumulators(x.numpy(), want_w))
    got = fake_quant.linear(x, rounded, b)
    assert np.array_equal(got.numpy(), ops.linear(x.numpy(), want_w, b.numpy()))


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(5, 8), st.integers(5, 8)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_convolution_equals_the_contract_bit_for_bit(
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    x, w, b = torch.randn(shape), torch.randn(5, shape[1], *kernel), torch.randn(5)
    rounded = fake_quant.quantize_weight(w)
    got = fake_quant.conv2d(x, rounded, b, stride, padding, dilation)
    want = ops.conv2d(x.numpy(), matrix(rounded), b.numpy(), stride, padding, dilation)
    assert np.array_equal(got.numpy(), want)


@pytest.mark.parametrize("exact", [True, False])
def test_products_of_extreme_codes_are_exact(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_quant, "_int_mm_is_exact", lambda _: exact)
    a = torch.full((3, 4096), 127, dtype=torch.int8)
    assert int(fake_quant.product(a, -a)[0, 0]) == -4096 * 127 * 127


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("floats", [True, False])
@pytest.mark.parametrize(("channels", "side"), [(115, 3), (116, 3), (1040, 1), (1041, 1), (3, 40)])
def test_accumulators_are_exact_on_either_path(
    channels: int, side: int, integers: bool, floats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if integers:
        monkeypatch.setattr(fake_quant, "_int_mm_is_exact", lambda _: False)
    if floats:
        monkeypatch.setattr(fake_quant, "_float_conv_is_exact", lambda _: False)
    draw = torch.Generator().manual_seed(0)
    extreme = torch.tensor([-127, 127, 126], dtype=torch.int8)
    q = extreme[torch.randint(3, (1, channels, side + 2, side + 1), generator=draw)]
    w = extreme[torch.randint(3, (2, channels, side, side), generator=draw)]
    w[0] = 127  # the sums of q = 127 reach the bound
    q[..., :side, :side] = 127
    got = fake_quant.accumulators(q, w, (2, 1), (1, 0))
    want = torch.nn.functional.conv2d(q.double(), w.double(), None, (2, 1), (1, 0))
    assert torch.equal(got, want.float())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 200), st.integers(1, 9), st.integers(0, 2**31))
def test_four_bits_agree_with_the_contract(m: int, k: int, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, w, b = torch.randn(m, k), torch.randn(n, k), torch.randn(n)
    w[0] = 0
    rounded = fake_quant.quantize_groups(w)
    want = codes.quantize_groups(w.numpy())
    assert np.array_equal(rounded[0].numpy(), want.q)
    assert np.array_equal(rounded[1].numpy(), want.scale)
    np.testing.assert_array_equal(fake_quant.spread(rounded).numpy(), want.dequantize())
    y = fake_quant.linear(x, rounded, b).numpy()
    np.testing.assert_allclose(y, ops.linear(x.numpy(), want, b.numpy()), rtol=2e-6, atol=2e-5)


def test_gradients_pass_straight_through() -> None:
    x = torch.randn(3, requires_grad=True)
    y = fake_quant.straight_through(torch.round(x), 2 * x)
    y.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(y.detach(), torch.round(x.detach()))
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2, 2]
