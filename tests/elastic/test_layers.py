"""Elastic linear layers and convolutions."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from t3c.core import ops
from t3c.core.codes import Matrix
from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2
from t3c.core.sites import ConvSite, LinearSite
from t3c.elastic.conv import ElasticConv
from t3c.elastic.linear import ElasticLinear


def linear(n: int, k: int, bias: bool = True) -> ElasticLinear:
    b = torch.randn(n) if bias else None
    return ElasticLinear(LinearSite("fc", n, k, 3, bias), torch.randn(n, k), b)


def conv(
    kernel: tuple[int, int], stride: int = 1, padding: int = 0, dilation: int = 1
) -> ElasticConv:
    h, w = (
        (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for n, k in zip((9, 8), kernel, strict=True)
    )
    site = ConvSite(
        name="conv",
        out_channels=6,
        in_channels=5,
        kernel=kernel,
        stride=(stride, stride),
        padding=(padding, padding),
        dilation=(dilation, dilation),
        batch=2,
        in_size=(9, 8),
        out_size=(h, w),
        bias=True,
    )
    return ElasticConv(site, torch.randn(6, 5, *kernel), torch.randn(6))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 3), (3, 5), (4, 4), (1, 7)])
def test_full_rank_linear_is_the_layer(n: int, k: int) -> None:
    layer, x = linear(n, k), torch.randn(2, 3, k)
    want = functional.linear(x, layer.weight, layer.bias)
    for moment in (None, torch.randn(k, k).mul(0.1).matrix_exp() @ torch.eye(k)):
        layer.set_moment(None if moment is None else moment @ moment.t())
        layer.state = (LowRank(min(n, k), 32), True)
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


GEOMETRY = [
    (k, s, p, d)
    for k, s, p, d in product(((1, 1), (2, 2), (3, 3), (1, 3)), (1, 2, 3), (0, 1, 2), (1, 2))
    if k != (1, 1) or d == 1
]


def test_full_rank_convolution_is_the_layer_at_every_geometry() -> None:
    x = torch.randn(2, 5, 9, 8)
    for k, s, p, d in GEOMETRY:
        layer = conv(k, s, p, d)
        site = layer.site
        want = functional.conv2d(x, layer.weight, layer.bias, s, p, d)
        assert tuple(want.shape[2:]) == site.out_size
        layer.state = (LowRank(5, 32) if site.pointwise else Tucker2(5, 6, 32), True)
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)


def test_integers_equal_the_numpy_contract() -> None:
    layer, x = linear(5, 7), torch.randn(4, 7)
    found = layer.codes([Dense(), LowRank(3)])
    assert found.dense is not None
    assert found.low is not None
    assert found.high is not None
    with torch.no_grad():
        layer.state = (Dense(), True)
        assert np.array_equal(layer(x).numpy(), ops.linear(x.numpy(), found.dense, found.bias))
        layer.state = (LowRank(3), True)
        want = ops.low_rank(x.numpy(), found.low, found.high, found.bias)
        assert np.array_equal(layer(x).numpy(), want)


def test_tucker_integers_equal_the_numpy_contract() -> None:
    layer, x = conv((3, 3), 2, 1), torch.randn(2, 5, 9, 8)
    found = layer.codes([Tucker2(3, 4)])
    assert found.dense is None
    assert found.reduce is not None
    assert found.core is not None
    assert found.expand is not None
    y = ops.conv2d(x.numpy(), _window(found.reduce))
    y = ops.conv2d(y, found.core, None, (2, 2), (1, 1))
    want = ops.conv2d(y, _window(found.expand), found.bias)
    with torch.no_grad():
        layer.state = (Tucker2(3, 4), True)
        assert np.array_equal(layer(x).numpy(), want)


def _window(m: Matrix) -> Matrix:
    return Matrix(m.q[:, :, None, None], m.scale)


@pytest.mark.parametrize(
    ("layer", "small", "large"),
    [
        (linear(9, 7), LowRank(2), LowRank(5)),
        (linear(90, 130), LowRank(3, 4), LowRank(70, 4)),
        (conv((1, 1)), LowRank(2), LowRank(5)),
        (conv((3, 3)), Tucker2(2, 1), Tucker2(4, 6)),
        (conv((3, 3)), CP(2), CP(5)),
    ],
)
def test_codes_of_a_smaller_rank_are_a_prefix(
    layer: ElasticLinear | ElasticConv, small: Format, large: Format
) -> None:
    few, many = layer.codes([small]), layer.codes([small, large])
    for name in ("low", "high", "reduce", "core", "expand", "cp_in", "cp_out", "low4", "high4"):
        a, b = getattr(few, name), getattr(many, name)
        assert (a is None) is (b is None)
        if a is not None:
            cut = b.prefix(*a.q.shape[:2])
            assert np.array_equal(a.q, cut.q)
            assert np.array_equal(a.scale, cut.scale)


def test_rank_falls_gracefully_and_bits_order() -> None:
    layer, x = linear(32, 48), torch.randn(64, 48)

    def drift(fmt: Format) -> float:
        layer.state = (fmt, True)
        with torch.no_grad():
            return float((layer(x) - functional.linear(x, layer.weight, layer.bias)).norm())

    by_rank = [drift(LowRank(r, 32)) for r in (4, 8, 16, 24, 32)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert drift(Dense(32)) <= drift(Dense(8)) < drift(Dense(4))


def test_layer_is_elastic_before_any_factor_is_computed() -> None:
    layer = linear(8, 8)
    assert layer.low is None
    layer.state = (LowRank(2, 32), True)
    layer(torch.randn(1, 8))
    assert isinstance(layer.low, Tensor)


def test_training_reaches_weight_and_factors_through_the_integers() -> None:
    layer, x = linear(6, 5), torch.randn(4, 5)
    for fmt, names in ((Dense(), ["weight"]), (LowRank(3), ["low", "high"])):
        layer.state = (fmt, True)
        layer(x).sum().backward()
        for name in names:
            grad = getattr(layer, name).grad
            assert grad is not None
            assert bool(torch.isfinite(grad).all())
    before = layer.codes_of("weight")[1].clone()
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.allclose(layer.codes_of("weight")[1], 2 * before)


@pytest.mark.parametrize(
    ("layer", "fmt", "message"),
    [
        (linear(4, 6), LowRank(5), "has rank 5, the largest is 4"),
        (linear(4, 6), Tucker2(1, 1), "is a convolution format"),
        (conv((1, 1)), LowRank(1, 4), "has 4 bits, allowed are 8 and 32"),
        (conv((3, 3)), LowRank(2), "lowrank needs 1x1"),
        (conv((1, 1)), Tucker2(1, 1), "has a 1x1 window"),
        (conv((3, 3)), Tucker2(6, 1), "has rank 6, the largest is 5"),
    ],
)
def test_formats_that_do_not_fit_are_refused(
    layer: ElasticLinear | ElasticConv, fmt: Format, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layer.check(fmt)


def test_wrong_factors_codes_and_weights_are_refused() -> None:
    layer = linear(4, 6)
    with pytest.raises(ValueError, match="no factor 'core'"):
        layer.set_factors({"core": torch.randn(2, 2)})
    with pytest.raises(ValueError, match="low is"):
        layer.set_factors({"low": torch.randn(2, 5)})
    with pytest.raises(ValueError, match="low holds NaN or infinity"):
        layer.set_factors({"low": torch.full((2, layer.site.k), float("nan"))})
    with pytest.raises(ValueError, match="codes of weight"):
        layer.set_codes("weight", linear(3, 6).codes([Dense()]).dense)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="its weight"):
        ElasticLinear(layer.site, torch.randn(3, 6))
    with pytest.raises(ValueError, match="does not fit"):
        ElasticConv(conv((3, 3)).site, torch.randn(3, 6, 3, 3))
    with pytest.raises(ValueError, match="kxk is 'svd'"):
        ElasticConv(conv((3, 3)).site, torch.randn(6, 5, 3, 3), None, "svd")


def test_given_codes_are_used() -> None:
    layer, x = linear(4, 6), torch.randn(2, 6)
    other = linear(4, 6).codes([Dense()]).dense
    assert other is not None
    layer.set_codes("weight", other)
    assert layer.codes([Dense()]).dense is not None
    layer.state = (Dense(), True)
    with torch.no_grad():
        want = ops.linear(x.numpy(), other, layer.bias.numpy() if layer.bias is not None else None)
        assert np.array_equal(layer(x).numpy(), want)
