"""Residuals: effective weights are what layers compute; operator norms are those of an SVD."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from t3c.certificate.residual import apply, effective, operator_norm
from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2
from t3c.core.sites import ConvSite, LinearSite
from tests.controller.models import conv, linear


def window(size: int, stride: int, padding: int, dilation: int, kernel: int = 3) -> ConvSite:
    out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return ConvSite(
        "c",
        5,
        3,
        (kernel, kernel),
        (stride, stride),
        (padding, padding),
        (dilation, dilation),
        1,
        (size, size),
        (out, out),
        False,
    )


def explicit(site: ConvSite, weight: Tensor) -> Tensor:
    """The convolution as a matrix: one column for each input pixel and channel."""
    pixels = site.in_channels * site.in_size[0] * site.in_size[1]
    images = torch.eye(pixels).reshape(pixels, site.in_channels, *site.in_size)
    return functional.conv2d(
        images, weight, None, site.stride, site.padding, site.dilation
    ).reshape(pixels, -1)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "dilation", "kernel"),
    [(8, 1, 1, 1, 3), (9, 2, 1, 1, 3), (8, 1, 2, 2, 3), (7, 1, 0, 1, 3), (8, 2, 0, 1, 1)],
)
def test_norm_of_a_convolution_is_that_of_its_explicit_matrix(
    size: int, stride: int, padding: int, dilation: int, kernel: int
) -> None:
    torch.manual_seed(0)
    site = window(size, stride, padding, dilation, kernel)
    weight = torch.randn(5, 3, kernel, kernel)
    exact = float(torch.linalg.matrix_norm(explicit(site, weight), 2))
    found = operator_norm(site, weight)
    assert found == pytest.approx(exact, rel=0.01)
    assert found <= exact * (1 + 1e-5)
    if kernel > 1:  # not the norm of the reshaped weight
        flat = float(torch.linalg.matrix_norm(weight.reshape(5, -1), 2))
        assert abs(flat - exact) > 0.05 * exact


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (1, 40), (40, 1), (128, 128)])
def test_norm_of_a_matrix_is_its_largest_singular_value(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)  # flat spectra, as of rounding, are the hard case
    weight = torch.rand(shape) - 0.5
    site = LinearSite("l", *shape, 1, False)
    exact = float(torch.linalg.matrix_norm(weight, 2))
    assert operator_norm(site, weight) == pytest.approx(exact, rel=0.01)
    assert operator_norm(site, torch.zeros(shape)) == 0.0


@pytest.mark.parametrize(
    "fmt", [Dense(8), Dense(4), Dense(32), LowRank(16, 8), LowRank(48, 4), LowRank(16, 32)]
)
def test_the_effective_weight_of_a_linear_layer_is_what_it_multiplies_by(fmt: Format) -> None:
    torch.manual_seed(2)
    layer = linear("fc", 64, 128, 8)
    x = torch.randn(32, 128)
    layer.state = fmt, True
    with torch.no_grad():
        got = layer(x)
        want = apply(layer.site, effective(layer, fmt), x, layer.bias)
    # what is left is the rounding of activations, to 8 bits
    assert float((got - want).norm() / want.norm()) < (1e-5 if fmt.bits == 32 else 0.02)
    assert float((effective(layer, fmt) - layer.weight).detach().norm()) > (
        0 if fmt != Dense(32) else -1
    )


@pytest.mark.parametrize("fmt", [Dense(8), Tucker2(16, 32), Tucker2(8, 8, 32), CP(8), CP(8, 32)])
def test_the_effective_weight_of_a_convolution_is_what_it_multiplies_by(fmt: Format) -> None:
    torch.manual_seed(3)
    layer = conv("c", 64, 32, 12, 2)
    x = torch.randn(2, 32, 12, 12)
    layer.state = fmt, True
    with torch.no_grad():
        got = layer(x)
        want = apply(layer.site, effective(layer, fmt), x, layer.bias)
    assert float((got - want).norm() / want.norm()) < (1e-5 if fmt.bits == 32 else 0.03)


def test_no_format_leaves_the_original() -> None:
    layer = linear("fc", 16, 16, 1)
    assert effective(layer, None) is layer.weight or torch.equal(
        effective(layer, None), layer.weight
    )
