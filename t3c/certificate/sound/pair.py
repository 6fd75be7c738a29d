"""A value of the original and its difference in the compressed version, operator by operator."""

from dataclasses import dataclass

import torch
from torch import Tensor

from t3c.certificate.sound.form import Form, Linear
from t3c.certificate.sound.slopes import Curve
from t3c.core.grid import Grid

U = 2.0**-24
"""Unit round-off of float32."""


def gamma(n: float) -> float:
    """N u / (1 - n u), the relative error of n float32 roundings; 1 % more for float64's own.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.
    """
    return 1.01 * n * U / (1 - n * U)


@dataclass(frozen=True, slots=True)
class Pair:
    """What float32 computes: x in the original, x + d in the compressed version.

    Attributes:
        x: The original's value.
        d: The difference.
        grid: Grid that the compressed value lies on, if it is known to.
        shares: Both values are exact and sum to one over the last axis; float32 adds as many
            roundings, relative to each element. None: not known, and all rounding is in the forms.
    """

    x: Form
    d: Form
    grid: Grid | None = None
    shares: float | None = None

    @property
    def changed(self) -> Form:
        """The compressed version's value."""
        return self.x + self.d

    @property
    def hull(self) -> tuple[Tensor, Tensor]:
        """Ends of both values together."""
        other = self.changed
        return torch.minimum(self.x.low, other.low), torch.maximum(self.x.high, other.high)

    def settled(self) -> "Pair":
        """With the rounding of shares in the forms."""
        return self if self.shares is None else Pair(self.x, self.d).rounded(self.shares)

    def rounded(self, ulps: float, least: Tensor | float = 0.0) -> "Pair":
        """With the float32 rounding of elementwise operators in both versions.

        Args:
            ulps: Roundings relative to the result.
            least: Added to the magnitude of both results, for sums that cancel inside.
        """
        peak, other = self.x.peak + least, self.changed.peak + least
        x = self.x.widened(gamma(ulps) * peak)
        return Pair(x, self.d.widened(gamma(ulps) * (peak + other)))


def linear(p: Pair, op: Linear, magnitude: Linear, norm: float | None, roundings: int) -> Pair:
    """The same linear operator in both versions."""
    x, d = p.x.map(op, magnitude, norm), p.d.map(op, magnitude, norm)
    if not roundings:
        return Pair(x, d, p.grid)
    a = magnitude(p.x.peak[None])[0] * gamma(roundings)
    b = magnitude(p.changed.peak[None])[0] * gamma(roundings)
    return Pair(x.widened(a), d.widened(a + b))


def relu(p: Pair) -> Pair:
    """max(x, 0): x by its triangle, the difference by the best of three slopes."""
    low, high = p.x.low, p.x.high
    other = p.changed
    l2, h2 = other.low, other.high
    open_ = (low < 0) & (high > 0)
    lam = torch.where(open_, high / (high - low).clamp_min(1e-300), (low >= 0).double())
    half = torch.where(open_, -lam * low / 2, 0.0)
    x = p.x.scaled(lam)
    x = _shifted(x, half).widened(half, symbol="value")
    x = x.tightened(low.clamp_min(0), high.clamp_min(0))
    zero = torch.zeros_like(low)
    dl, dh = p.d.low, p.d.high
    keep = (
        torch.maximum(-(-low).clamp_min(0), -dh.clamp_min(0)),
        torch.minimum((-l2).clamp_min(0), -dl.clamp_max(0)),
    )
    drop = (
        torch.maximum(-high.clamp_min(0), dl.clamp_max(0)),
        torch.minimum(h2.clamp_min(0), dh.clamp_min(0)),
    )
    between = p.d.peak / 2
    options = torch.stack([(keep[1] - keep[0]) / 2, (drop[1] - drop[0]) / 2, between])
    best = options.argmin(0)
    slope = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)[best]
    center = torch.stack([(keep[1] + keep[0]) / 2, (drop[1] + drop[0]) / 2, zero])
    radius = options.gather(0, best[None])[0]
    d = _shifted(p.d.scaled(slope), center.gather(0, best[None])[0])
    d = d.widened(radius, symbol="error")
    if p.x.space.mode in ("norm", "both"):  # slope 1/2 everywhere keeps the norm, too
        plain = p.d.scaled(torch.full_like(low, 0.5)).widened(between, p.d.norm / 2)
        d = plain if plain.norm < d.norm else d
    d = d.tightened(torch.minimum(dl, zero), torch.maximum(dh, zero))
    return Pair(x, d, p.grid)


def curve(p: Pair, f: Curve) -> Pair:
    """A smooth function by the mean value theorem.

    Float32 margin: 40 roundings of the result and of 1 + |argument|, for sums such as
    x (1 + erf(x / sqrt 2)) / 2 lose all relative accuracy where they cancel, and kernels know erf
    to 2e-6 only. Source: t3c.codegen.kernels.emit.
    """
    low, high = p.x.low, p.x.high
    m, top = f.slopes(low, high)
    middle, half = (low + high) / 2, (high - low) / 2
    mean, spread = (m + top) / 2, (top - m) / 2
    x = _shifted(p.x.scaled(mean), f.f(middle) - mean * middle)
    x = x.widened(spread * half, symbol="value").tightened(*f.values(low, high))
    a, b = p.hull
    m, top = f.slopes(a, b)
    least, most = f.secants((low, high), p.d.ends)
    m, top = torch.maximum(m, least), torch.minimum(top, most)
    m, top = torch.minimum(m, top), torch.maximum(m, top)
    spread = (top - m) / 2
    d = p.d.scaled((m + top) / 2)
    d = d.widened(spread * p.d.peak, float(spread.max()) * p.d.norm, symbol="error")
    before, after = f.values(low, high), f.values(p.changed.low, p.changed.high)
    found = Pair(x, d.tightened(after[0] - before[1], after[1] - before[0]))
    return found.rounded(40, 1 + torch.maximum(a.abs(), b.abs()))


def _shifted(f: Form, by: Tensor) -> Form:
    return Form(f.space, f.c + by, f.g, f.h, f.e, f.r)


def snapped(p: Pair, grid: Grid) -> Pair:
    """The compressed value rounded to a fixed grid."""
    if p.grid == grid:
        return p
    return Pair(p.x, p.d.widened(grid_error(p.changed, grid), symbol="error"), grid)


def grid_error(value: Form, grid: Grid) -> Tensor:
    """Largest |x - q(x)| by element: half a step, or what is cut off; never above |x|."""
    bottom, top = (end * grid.scale for end in grid.ends)
    error = torch.maximum(value.high - top, bottom - value.low)
    error = error.clamp_min(grid.scale / 2) + 4 * U * value.peak
    return torch.minimum(error, value.peak * (1 + 1e-4))


def dynamic_error(value: Form, axes: tuple[int, ...]) -> Tensor:
    """Largest |x - q(x)| by element with the scale max|x| / 127 of each slice over `axes`.

    Half a step, and three float32 roundings of a code up to 127; never above |x|.
    """
    peak = value.peak.amax(axes, keepdim=True).clamp_min(1e-12)
    step = (peak / 254 * (1 + 2e-4)).expand_as(value.peak)
    return torch.minimum(step, value.peak * (1 + 1e-4))
