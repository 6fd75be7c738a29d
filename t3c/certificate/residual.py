"""What a format makes of a layer's weight, and its distance to the original as an operator."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional, grad

from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2
from t3c.core.sites import ConvSite, LinearSite, Site
from t3c.elastic import fake_quant
from t3c.elastic.layer import FLOAT_FACTORS, ElasticLayer

_conv2d_input: Callable[..., Tensor] = vars(grad)["conv2d_input"]

STEPS = 48
"""Most steps of an iteration for an operator norm; half of all layers need fewer than 20."""
SETTLED = 1e-4
"""Relative growth in one step below which a norm counts as found."""


@torch.no_grad()
def effective(layer: ElasticLayer, fmt: Format | None) -> Tensor:
    """The dense weight that a layer in a format multiplies by: rounded, factors multiplied out.

    Args:
        layer: The layer.
        fmt: Its format; None: the original.
    """

    def part(name: str) -> Tensor:
        if name in FLOAT_FACTORS or fmt is None or fmt.bits == 32:
            return layer.weight if name == "weight" else layer.factor(name)
        return fake_quant.spread(layer.codes_of(name, fmt.bits))

    match fmt:
        case None | Dense():
            return part("weight")
        case LowRank(rank):
            return (part("high")[:, :rank] @ part("low")[:rank]).reshape(layer.weight.shape)
        case Tucker2(rank_in, rank_out):
            core = part("core")[:rank_out, :rank_in]
            outer = part("expand")[:, :rank_out], part("reduce")[:rank_in]
            return torch.einsum("ob,bahw,ai->oihw", outer[0], core, outer[1])
        case CP(rank):
            tall, wide = part("cp_tall")[:rank], part("cp_wide")[:rank]
            outer = part("cp_out")[:, :rank], part("cp_in")[:rank]
            return torch.einsum("or,rh,rw,ri->oihw", outer[0], tall, wide, outer[1])


def apply(site: Site, weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer's operator with another weight."""
    if isinstance(site, LinearSite):
        return functional.linear(x, weight, bias)
    return functional.conv2d(x, weight, bias, site.stride, site.padding, site.dilation)


def operator_norm(site: Site, weight: Tensor, steps: int = STEPS) -> float:
    """The largest singular value of the layer's operator; of a convolution at its input size.

    Power iteration whose iterates are kept: the largest singular value in their span (the
    bidiagonal of Golub and Kahan) approaches the norm from below, in far fewer steps than the last
    iterate's. Source: Golub and Van Loan, Matrix Computations, section 10.4.

    Args:
        site: Geometry.
        weight: The weight, in the layer's shape.
        steps: At most so many.
    """
    if isinstance(site, LinearSite) or _plain(site):
        flat = weight.detach().reshape(len(weight), -1)
        return _golub_kahan(_Matrix(flat), steps)
    return _golub_kahan(_Convolution(site, weight.detach()), steps)


def _plain(site: ConvSite) -> bool:
    """Whether every pixel that the window reads is multiplied by the same matrix."""
    return site.pointwise


class _Matrix:
    """A matrix as an operator."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.inputs = torch.Size((weight.shape[1],))

    def forward(self, v: Tensor) -> Tensor:
        return self.weight @ v

    def back(self, u: Tensor) -> Tensor:
        return u @ self.weight


class _Convolution:
    """A convolution of one image as an operator."""

    def __init__(self, site: ConvSite, weight: Tensor) -> None:
        self.site, self.weight = site, weight
        self.inputs = torch.Size((1, site.in_channels, *site.in_size))

    def forward(self, v: Tensor) -> Tensor:
        return apply(self.site, self.weight, v)

    def back(self, u: Tensor) -> Tensor:
        s = self.site
        found: Tensor = _conv2d_input(self.inputs, self.weight, u, s.stride, s.padding, s.dilation)
        return found


def _golub_kahan(operator: _Matrix | _Convolution, steps: int) -> float:
    """Largest singular value of the iterates' bidiagonal; both sides made orthogonal again."""
    draw = torch.Generator().manual_seed(0)
    v = torch.randn(operator.inputs, generator=draw).to(operator.weight.device)
    v = v / v.norm()
    rights: list[Tensor] = []
    lefts: list[Tensor] = []
    band: list[tuple[float, float]] = []
    found, beta = 0.0, 0.0
    for _ in range(min(steps, v.numel())):
        rights.append(v)
        u = _orthogonal(operator.forward(v), lefts)
        alpha = float(u.norm())
        band.append((alpha, beta))
        before, found = found, _largest(band)
        if alpha <= 1e-12 * max(found, 1e-300) or found - before < SETTLED * found:
            break
        u = u / alpha
        lefts.append(u)
        v = _orthogonal(operator.back(u), rights)
        beta = float(v.norm())
        if beta <= 1e-12 * found:
            break
        v = v / beta
    return found


def _orthogonal(vector: Tensor, others: list[Tensor]) -> Tensor:
    for other in others:
        vector = vector - (vector * other).sum() * other
    return vector


def _largest(band: list[tuple[float, float]]) -> float:
    """Largest singular value of the upper bidiagonal matrix (diagonal, entry above it)."""
    size = len(band)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for i, (alpha, beta) in enumerate(band):
        matrix[i, i] = alpha
        if i:
            matrix[i - 1, i] = beta
    found = float(torch.linalg.matrix_norm(matrix, 2))
    return found if math.isfinite(found) else math.inf
