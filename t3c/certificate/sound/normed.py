"""Softmax and norms: functions whose Jacobian is a diagonal less one product of vectors.

Both f satisfy f(s + delta) - f(s) = J delta, where J is their Jacobian averaged over the segment
between s and s + delta (mean value theorem, Rudin, Principles of mathematical analysis, 5.10 and
9.19). Here the Jacobian J0 of one point is taken out, which is linear and keeps the symbols, and
what is left is bounded by how far values of f leave that point's on any such segment. The same
formula serves the original's value (delta from the middle of the domain) and the difference.
"""

import torch
from torch import Tensor

from t3c.certificate.sound.form import BUDGET, Form, NoRule
from t3c.certificate.sound.pair import Pair, gamma

EXP = 64
"""Float32 roundings that an exponential is worth: T3C's are within 2.7e-6 (45), torch's within
2**-20 (16). Source: t3c.codegen.kernels.vectors, t3c.codegen.kernels.attention_words."""
FARTHEST = 100.0
"""Exponents below minus this are shares below 1e-43: underflow."""
ONE = 1 + 1e-9
"""For float64's own rounding."""


def softmax(p: Pair, seen: Tensor | None = None) -> Pair:
    """Exact softmax over the last axis; `roundings` says what float32 adds.

    J = diag(p) - p p^T. With p0 any weights of sum 1 and delta' = delta - (p0 . delta) 1, which
    leaves J delta alone for J 1 = 0:
        (J delta)_i = p_i (delta'_i - p . delta')          and p . delta' = (p - p0) . delta',
        |(J delta)_i - p0_i delta'_i|
            <= |p_i - p0_i| |delta'_i| + p_i sum_j |p_j - p0_j| |delta'_j|.
    ||J||_2 <= 1/2. Source: Gao, Pavel, On the properties of the softmax function (arXiv
    1704.00805).
    Ends of p: p_i = 1 / sum_j exp(s_j - s_i), of which every term is monotone in s_j - s_i.

    Args:
        p: Scores [..., n].
        seen: Whether a position takes part; None: all. Broadcasts to the scores.
    """
    shape = p.x.c.shape
    live = torch.ones(shape, dtype=torch.bool) if seen is None else seen.expand(shape)
    if not bool(live.any(-1).all()):
        raise NoRule("a row of softmax sees nothing")
    middle = (p.x.low + p.x.high) / 2
    gaps = _gaps(p.x)
    base = _shares_at(middle, live)
    low, high = _shares(_joined(gaps, _gaps_at(middle)), live)
    x = _slope(_shifted(p.x, -middle), base, low, high, "value")
    x = _shifted(x, base).tightened(*_shares(gaps, live))
    steps = _gaps(p.d)
    other = _gaps(p.changed)
    other = (
        torch.maximum(other[0], gaps[0] + steps[0]),
        torch.minimum(other[1], gaps[1] + steps[1]),
    )
    other = torch.minimum(*other), torch.maximum(*other)
    hull = p.hull
    about = _shares_at((hull[0] + hull[1]) / 2, live)
    on_way = _shares(_joined(gaps, other), live)
    d = _slope(p.d, about, *on_way, "error")
    before, after = _shares(gaps, live), _shares(other, live)
    d = d.tightened(after[0] - before[1], after[1] - before[0])
    d = d.tightened(*_change(steps, before, live))
    return Pair(x.cut("value"), d.cut("error"))


def roundings(p: Pair) -> float:
    """Float32 roundings, relative to each share, of a softmax of these scores.

    An exponent s - max s is rounded relative to itself, its exponential within `EXP`, and the sum
    of n of them within n; each counts above and below the line.
    """
    gap = max(float((f.high.amax(-1) - f.low.amin(-1)).max()) for f in (p.x, p.changed))
    return 2 * (EXP + 4 * min(gap, FARTHEST)) + p.x.c.shape[-1] + 8


Ends = tuple[Tensor, Tensor]


def _gaps(s: Form) -> Ends:
    """Ends [..., i, j] of s_j - s_i."""
    n = s.c.shape[-1]
    low, high = s.ends
    apart = low[..., None, :] - high[..., :, None], high[..., None, :] - low[..., :, None]
    if (len(s.g) + len(s.h) + 2) * s.c.numel() * n <= 4 * BUDGET:
        found = s.map(
            lambda t: t[..., None, :] - t[..., :, None], lambda t: t[..., None, :] + t[..., :, None]
        )
        least, most = torch.maximum(apart[0], found.low), torch.minimum(apart[1], found.high)
        apart = torch.minimum(least, most), torch.maximum(least, most)
    eye = torch.eye(n, dtype=torch.bool)
    return apart[0].masked_fill(eye, 0.0), apart[1].masked_fill(eye, 0.0)


def _gaps_at(s: Tensor) -> Ends:
    gaps = s[..., None, :] - s[..., :, None]
    return gaps, gaps


def _joined(a: Ends, b: Ends) -> Ends:
    return torch.minimum(a[0], b[0]), torch.maximum(a[1], b[1])


def _shares(gaps: Ends, live: Tensor) -> Ends:
    """Ends of a softmax from the ends of s_j - s_i."""
    there = live[..., None, :]

    def share(gap: Tensor) -> Tensor:
        terms = torch.where(there, gap.clamp(-700, 700).exp(), 0.0)
        return torch.where(live, 1 / terms.sum(-1).clamp_min(1e-300), 0.0)

    return share(gaps[1]) / ONE, (share(gaps[0]) * ONE).clamp_max(1.0)


def _shares_at(s: Tensor, live: Tensor) -> Tensor:
    return torch.softmax(s.masked_fill(~live, float("-inf")), -1)


def _slope(delta: Form, base: Tensor, low: Tensor, high: Tensor, symbol: str) -> Form:
    """J delta for every p between two ends; see `softmax`."""
    radius = torch.maximum((high - base).abs(), (base - low).abs())

    def centred(t: Tensor) -> Tensor:
        return t - (base * t).sum(-1, keepdim=True)

    def bound(t: Tensor) -> Tensor:
        return (1 - 2 * base) * t + (base * t).sum(-1, keepdim=True)

    away = delta.map(centred, bound).peak * ONE
    # also delta'_i = sum_j base_j (delta_i - delta_j), at most the spread of delta's ends
    spread = delta.high.amax(-1, keepdim=True) - delta.low.amin(-1, keepdim=True)
    away = torch.minimum(away, spread)
    mean = torch.minimum((radius * away).sum(-1, keepdim=True), away.amax(-1, keepdim=True))
    error = radius * away + torch.maximum(high, base) * mean
    straight = delta.map(lambda t: base * centred(t), lambda t: base * bound(t), 0.5 * ONE)
    return straight.widened(error * ONE + 1e-15, delta.norm, symbol=symbol)


def _change(steps: Ends, before: Ends, live: Tensor) -> Ends:
    """Ends of the change of a share p whose scores change by delta.

    p' / p = 1 / (p + sum_{j != i} p_j exp(delta_j - delta_i)) >= 1 / (p + (1 - p) e^m) for m =
    max(0, max_j delta_j - delta_i): the change is at least -p (1 - p)(e^m - 1) / (p + (1 - p)
    e^m), whose magnitude is largest at p = e^(m/2) / (1 + e^(m/2)); and upwards with m = max_j
    delta_i - delta_j by the same formula for 1 - p.
    """
    hide = ~live[..., None, :]

    def most(m: Tensor, low: Tensor, high: Tensor) -> Tensor:
        m = m.clamp(0, 700)
        p = torch.minimum(torch.maximum(torch.sigmoid(m / 2), low), high)
        return p * (1 - p) * -torch.expm1(-m) / (p * torch.exp(-m) + 1 - p).clamp_min(1e-300)

    up = (-steps[0]).masked_fill(hide, 0.0).amax(-1)
    down = steps[1].masked_fill(hide, 0.0).amax(-1)
    low, high = before
    least = torch.where(live, most(down, low, high) * ONE, 0.0)
    best = torch.where(live, most(up, 1 - high, 1 - low) * ONE, 0.0)
    return -least, best


def norm(p: Pair, gain: Tensor | None, bias: Tensor | None, eps: float, *, centred: bool) -> Pair:
    """A norm over the last axis: gain * u / sqrt(mean(u^2) + eps) + bias, u = x (- its mean).

    With rho = 1 / sqrt(mean(u^2) + eps) and y = rho u: J delta = rho (delta - y tau), tau = mean(y
    delta). With any y0 of ||y0||^2 <= n, any rho0, tau0 = mean(y0 delta) and k = mean(|y - y0|
    |delta|): |tau - tau0| <= k and
        |(J delta)_i - rho0 (delta_i - y0_i tau0)|
            <= |rho - rho0| |delta_i - y0_i tau0| + rho (|y_i - y0_i| |tau| + |y0_i| k).
    ||J||_2 <= rho, |y_i| <= sqrt(n), and <= sqrt(n - 1) where u sums to zero: u_i^2 <= (n - 1)
    times the sum of the others' squares. Source: Kim, Papamakarios, Mnih, The Lipschitz constant of
    self-attention (arXiv 2006.04710) for why such bounds need a domain.
    Ends of y: y_i = u_i / sqrt((u_i^2 + rest) / n + eps) grows with u_i and shrinks with the rest.
    The sum of squares is at least (w . u)^2 for any unit vector w, which keeps symbols.

    Float32: means and sums of squares of n terms within gamma_(n + 8), squares of differences from
    the rounded mean, in two passes or by Welford's update (Chan, Golub, LeVeque 1983): within
    gamma_(2 n + 8) (1 + k) + (gamma k)^2 of the variance, k^2 = mean(x^2) / (variance + eps).
    """
    n = p.x.c.shape[-1]
    before, change = (_centred(p.x), _centred(p.d)) if centred else (p.x, p.d)
    after = before + change
    middle = (before.low + before.high) / 2
    if centred:
        middle = middle - middle.mean(-1, keepdim=True)
    ends = before.ends
    own = _Values.of(ends, _power(before, middle), n, eps, centred)
    around = _joined(ends, (middle, middle))
    towards = torch.minimum(_power(before, middle), middle.square().sum(-1, keepdim=True))
    way = _Values.of(around, towards, n, eps, centred)
    root = (middle.square().mean(-1, keepdim=True) + eps).rsqrt()
    x = _turned(_shifted(before, -middle), middle * root, way, n, "value")
    x = _shifted(x, middle * root).tightened(own.low, own.high)
    hull = _joined(ends, after.ends)
    center = (hull[0] + hull[1]) / 2
    segment = torch.minimum(_power(before, center), _power(after, center))
    way = _Values.of(hull, segment, n, eps, centred)
    root = (center.square().mean(-1, keepdim=True) + eps).rsqrt()
    d = _turned(change, center * root, way, n, "error")
    new = _Values.of(after.ends, _power(after, center), n, eps, centred)
    d = d.tightened(new.low - own.high, new.high - own.low)
    one = _float32(p.x, own, n, eps, centred)
    two = _float32(p.changed, new, n, eps, centred)
    x, d = x.cut("value").widened(one), d.cut("error").widened(one + two)
    return _affine(x, d, gain, bias)


class _Values:
    """What y = rho u can be.

    Attributes:
        low: Least y by element.
        high: Largest y.
        least: Least rho by row.
        most: Largest rho.
    """

    __slots__ = ("high", "least", "low", "most")

    def __init__(self, low: Tensor, high: Tensor, least: Tensor, most: Tensor) -> None:
        self.low, self.high, self.least, self.most = low, high, least, most

    @classmethod
    def of(cls, ends: Ends, power: Tensor, n: int, eps: float, centred: bool) -> "_Values":
        """From the ends of u and the least sum of squares of a row."""
        low, high = ends
        most = torch.maximum(low.square(), high.square())
        least = torch.where((low > 0) | (high < 0), torch.minimum(low.square(), high.square()), 0.0)
        total = torch.maximum(least.sum(-1, keepdim=True), power)
        above = most.sum(-1, keepdim=True)

        def far(u: Tensor) -> Tensor:
            """|y| at most, for |u| = u."""
            others = least.sum(-1, keepdim=True) - least
            if centred and n > 1:
                others = torch.maximum(others, u * u / (n - 1))
            return u / (torch.maximum(u * u + others, total) / n + eps).sqrt() * ONE

        def near(u: Tensor) -> Tensor:
            """|y| at least, for |u| = u."""
            return u / ((u * u + above - most) / n + eps).sqrt() / ONE

        def end(u: Tensor, sign: float) -> Tensor:
            size = u.abs()
            return torch.where(u * sign > 0, sign * far(size), -sign * near(size))

        roots = (above / n + eps).rsqrt() / ONE, (total / n + eps).rsqrt() * ONE
        return cls(end(low, -1.0), end(high, 1.0), *roots)


def _power(u: Form, along: Tensor) -> Tensor:
    """A lower bound of a row's sum of squares: (w . u)^2 with w along a vector."""
    w = along / along.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    dot = u.map(
        lambda t: (t * w).sum(-1, keepdim=True), lambda t: (t * w.abs()).sum(-1, keepdim=True)
    )
    return dot.low.clamp_min(0).square() / ONE


def _centred(x: Form) -> Form:
    n = x.c.shape[-1]
    own = abs(1 - 2 / n)
    return x.map(
        lambda t: t - t.mean(-1, keepdim=True), lambda t: own * t + t.mean(-1, keepdim=True), ONE
    )


def _turned(delta: Form, base: Tensor, way: _Values, n: int, symbol: str) -> Form:
    """J delta for every y and rho of a segment; see `norm`."""
    root = (way.least + way.most) / 2
    off = (way.most - way.least) / 2
    radius = torch.maximum((way.high - base).abs(), (base - way.low).abs())

    def project(t: Tensor) -> Tensor:
        return t - base * (base * t).mean(-1, keepdim=True)

    def bound(t: Tensor) -> Tensor:
        own = (1 - base.square() / n).abs() - base.square() / n
        return own * t + base.abs() * (base.abs() * t).mean(-1, keepdim=True)

    away = delta.map(project, bound).peak
    tau0 = delta.map(
        lambda t: (base * t).mean(-1, keepdim=True),
        lambda t: (base.abs() * t).mean(-1, keepdim=True),
    ).peak
    k = (radius * delta.peak).mean(-1, keepdim=True)
    length = delta.peak.square().mean(-1, keepdim=True).sqrt()  # |mean(y delta)| at most
    tau = torch.minimum(tau0 + k, length)
    k = torch.minimum(k, tau0 + length)
    error = off * away + way.most * (radius * tau + base.abs() * k)
    most = float(root.max())
    straight = delta.map(lambda t: root * project(t), lambda t: root * bound(t), most * ONE)
    rows = delta.c.numel() // n
    known = min(float(way.most.max()) * delta.norm, 2 * (n * rows) ** 0.5) + most * delta.norm
    return straight.widened(error * ONE + 1e-15, known * ONE, symbol=symbol)


def _float32(x: Form, y: _Values, n: int, eps: float, centred: bool) -> Tensor:
    """Float32 rounding of rho u, by element."""
    peak = torch.maximum(y.low.abs(), y.high.abs())
    if not centred:
        return gamma(n + 16) * peak
    power = x.peak.square().mean(-1, keepdim=True)
    k = power.sqrt() * y.most  # y.most is 1 / sqrt(variance + eps)
    relative = gamma(2 * n + 8) * (1 + k) + (gamma(n + 8) * k).square()
    if not float(relative.max()) < 0.5:
        raise NoRule("float32 may lose the variance of a row")
    shift = gamma(n + 8) * (x.peak + x.peak.mean(-1, keepdim=True)) * y.most
    return (peak + shift) * (relative + gamma(16)) + shift


def _affine(x: Form, d: Form, gain: Tensor | None, bias: Tensor | None) -> Pair:
    """Times a gain and plus a bias, in float32."""
    made = Pair(x, d)
    if gain is not None:
        made = Pair(stretched(x, gain.double()), stretched(d, gain.double()))
    made = made.rounded(2)
    if bias is not None:
        made = Pair(_shifted(made.x, bias.double()), made.d).rounded(1)
    return made


def stretched(f: Form, by: Tensor) -> Form:
    """Times a constant tensor; ends that are known are kept."""
    made = f.scaled(by)
    if f.box is None:
        return made
    a, b = f.box[0] * by, f.box[1] * by
    return made.tightened(torch.minimum(a, b), torch.maximum(a, b))


def _shifted(f: Form, by: Tensor) -> Form:
    """Plus a constant tensor; ends that are known are kept."""
    made = Form(f.space, f.c + by, f.g, f.h, f.e, f.r)
    return made if f.box is None else made.within(f.box[0] + by, f.box[1] + by)
