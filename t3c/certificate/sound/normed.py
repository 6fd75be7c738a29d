"""Softmax and norms: the change of each is a diagonal less one product of vectors, exactly.

Both f have a formula f(s + delta) - f(s) = A (delta - b (a . delta)) whose factors A, a, b are
known from the ends of f at s and at s + delta. The formula at one choice of factors is linear and
keeps symbols; what is left is bounded by how far the factors leave that choice. The same formula
serves the original's value (delta from the middle of the domain) and the difference.
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

    log p'_i - log p_i = delta_i - m for one m of a row, so that p'_i - p_i = l_i (delta_i - m) with
    l_i the logarithmic mean of p_i and p'_i; as the changes of a row sum to zero, m is the mean of
    delta with weights l. With any l0 > 0, delta' = delta - (its mean with weights l0) and r_i >=
    |l_i - l0_i|:
        |p'_i - p_i - l0_i delta'_i| <= r_i |delta'_i| + l_i sum_j r_j |delta'_j| / sum_j l_j.
    A logarithmic mean grows with both arguments and is at most the arithmetic one: sum l <= 1, and
    diag(l0) - l0 l0^T / sum l0 has a norm of at most 1/2, as the Jacobian has. Sources: Carlson,
    The logarithmic mean (1972); Gao, Pavel, On the properties of the softmax function (arXiv
    1704.00805); the formula is ours, derived above.
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
    gaps, steps, other = _gaps(p.x), _gaps(p.d), _gaps(p.changed)
    other = _ordered(
        torch.maximum(other[0], gaps[0] + steps[0]), torch.minimum(other[1], gaps[1] + steps[1])
    )
    at, before, after = _shares_at(middle, live), _shares(gaps, live), _shares(other, live)
    x = _slope(_shifted(p.x, -middle), (at / ONE, at * ONE), before, "value")
    x = _shifted(x, at).tightened(*before)
    d = _slope(p.d, before, after, "error")
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


def _ordered(low: Tensor, high: Tensor) -> Ends:
    return torch.minimum(low, high), torch.maximum(low, high)


def _shares(gaps: Ends, live: Tensor) -> Ends:
    """Ends of a softmax from the ends of s_j - s_i."""
    there = live[..., None, :]

    def share(gap: Tensor) -> Tensor:
        terms = torch.where(there, gap.clamp(-700, 700).exp(), 0.0)
        return torch.where(live, 1 / terms.sum(-1).clamp_min(1e-300), 0.0)

    return share(gaps[1]) / ONE, (share(gaps[0]) * ONE).clamp_max(1.0)


def _shares_at(s: Tensor, live: Tensor) -> Tensor:
    return torch.softmax(s.masked_fill(~live, float("-inf")), -1)


def _log_means(low: Ends, high: Ends) -> Ends:
    """Ends of the logarithmic mean (a - b) / log(a / b) of two numbers between ends.

    Args:
        low: Least values of both, not negative.
        high: Largest values of both.
    """

    def mean(a: Tensor, b: Tensor) -> Tensor:
        least, most = torch.minimum(a, b), torch.maximum(a, b)
        apart = (most - least).clamp_min(1e-300) / least.clamp_min(1e-300)
        # below 1e-6 the arithmetic mean is within 1e-13 of it, relative
        found = torch.where(apart < 1e-6, (a + b) / 2, (most - least) / torch.log1p(apart))
        return torch.minimum(torch.maximum(found, least), most)

    # where a least end is next to nothing, ends that need no logarithm
    least = torch.where(torch.minimum(*low) > 1e-280, mean(*low), 0.0)
    most = torch.where(torch.minimum(*high) > 1e-280, mean(*high), (high[0] + high[1]) / 2)
    return least / ONE, most * ONE


def _slope(delta: Form, before: Ends, after: Ends, symbol: str) -> Form:
    """The change of a softmax whose ends are known at both sides; see `softmax`."""
    low, high = _log_means((before[0], after[0]), (before[1], after[1]))
    l0 = (low + high) / 2
    l0 = l0 / l0.sum(-1, keepdim=True).clamp_min(1.0)  # no more than 1 in all
    weights = l0 / l0.sum(-1, keepdim=True)
    radius = torch.maximum(high - l0, l0 - low)

    def centred(t: Tensor) -> Tensor:
        return t - (weights * t).sum(-1, keepdim=True)

    def bound(t: Tensor) -> Tensor:
        return (1 - 2 * weights) * t + (weights * t).sum(-1, keepdim=True)

    away = delta.map(centred, bound).peak * ONE
    # delta' is also a mean of differences of delta, at most the spread of its ends
    spread = delta.high.amax(-1, keepdim=True) - delta.low.amin(-1, keepdim=True)
    away = torch.minimum(away, spread)
    total = low.sum(-1, keepdim=True).clamp_min(1e-300)
    mean = torch.minimum((radius * away).sum(-1, keepdim=True) / total, away.amax(-1, keepdim=True))
    error = radius * away + high * mean
    straight = delta.map(lambda t: l0 * centred(t), lambda t: l0 * bound(t), 0.5 * ONE)
    return straight.widened(error * ONE + 1e-15, delta.norm, symbol=symbol)


def _change(steps: Ends, before: Ends, live: Tensor) -> Ends:
    """Ends of the change of a share p whose scores change by delta.

    p' / p = 1 / (p + sum_{j != i} p_j exp(delta_j - delta_i)) >= 1 / (p + (1 - p) e^m) for m =
    max(0, max_j delta_j - delta_i): the change is at least -p (1 - p)(e^m - 1) / (p + (1 - p)
    e^m), whose magnitude is largest at p = e^(m/2) / (1 + e^(m/2)); and upwards with m = max_j
    delta_i - delta_j by the same formula for 1 - p. Both p and 1 - p are needed to all digits:
    beyond m = 75, p rounds to 1.
    """
    hide = ~live[..., None, :]

    def most(m: Tensor, p: Ends, rest: Ends) -> Tensor:
        m = m.clamp(0, 700)
        p_at = torch.minimum(torch.maximum(torch.sigmoid(m / 2), p[0]), p[1])
        at = torch.minimum(torch.maximum(torch.sigmoid(-m / 2), rest[0]), rest[1])
        return p_at * at * -torch.expm1(-m) / (p_at * torch.exp(-m) + at).clamp_min(1e-300)

    up = (-steps[0]).masked_fill(hide, 0.0).amax(-1)
    down = steps[1].masked_fill(hide, 0.0).amax(-1)
    rest = 1 - before[1], 1 - before[0]
    least = torch.where(live, most(down, before, rest) * ONE, 0.0)
    best = torch.where(live, most(up, rest, before) * ONE, 0.0)
    return -least, best


def norm(p: Pair, gain: Tensor | None, bias: Tensor | None, eps: float, *, centred: bool) -> Pair:
    """A norm over the last axis: gain * u / sqrt(mean(u^2) + eps) + bias, u = x (- its mean).

    With sigma = sqrt(mean(u^2) + eps), y = u / sigma and delta = u' - u:
        y' - y = (delta - y tau) / sigma',  tau = sigma' - sigma = mean(z delta),
        z = (u + u') / (sigma + sigma') = k y + (1 - k) y',  k = sigma / (sigma + sigma').
    With any rho0, y0, z0 and tau0 = mean(z0 delta), and rho' = 1 / sigma':
        |(y' - y)_i - rho0 (delta_i - y0_i tau0)|
            <= |rho' - rho0| |delta_i - y0_i tau0| + rho' (|y_i - y0_i| |tau| + |y0_i| |tau - tau0|)
    and |tau - tau0| <= mean(|z - z0| |delta|), |tau| <= sqrt(mean(delta^2)), for ||z||^2 <= n.
    |y_i| <= sqrt(n), and <= sqrt(n - 1) where u sums to zero: u_i^2 <= (n - 1) times the sum of the
    others' squares. Source: Kim, Papamakarios, Mnih, The Lipschitz constant of self-attention
    (arXiv 2006.04710) for why such bounds need a domain; the formula is ours, derived above.
    Ends of y: y_i = u_i / sqrt((u_i^2 + rest) / n + eps) grows with u_i and shrinks with the rest.
    The sum of squares is at least (w . u)^2 for any unit vector w, which keeps symbols.

    Float32: means and sums of squares of n terms within gamma_(n + 8), squares of differences from
    the rounded mean, in two passes or by Welford's update (Chan, Golub, LeVeque 1983): within
    gamma_(2 n + 8) (1 + k) + (gamma k)^2 of the variance, k^2 = mean(x^2) / (variance + eps).
    """
    n = p.x.c.shape[-1]
    before, change = (_centred(p.x), _centred(p.d)) if centred else (p.x, p.d)
    after = before + change
    middle, other = (before.low + before.high) / 2, (after.low + after.high) / 2
    if centred:
        middle = middle - middle.mean(-1, keepdim=True)
    own = _Values.of(before.ends, _power(before, middle), n, eps, centred)
    new = _Values.of(after.ends, _power(after, other), n, eps, centred)
    point = _Values.at(middle, eps)
    x = _turned(_shifted(before, -middle), point, own, n, "value")
    x = _shifted(x, point.middle).tightened(own.low, own.high)
    d = _turned(change, own, new, n, "error")
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

    @property
    def middle(self) -> Tensor:
        """The middle of its ends."""
        return (self.low + self.high) / 2

    @property
    def radius(self) -> Tensor:
        """Half of what is between its ends."""
        return (self.high - self.low) / 2

    @classmethod
    def at(cls, u: Tensor, eps: float) -> "_Values":
        """Of one u."""
        root = (u.square().mean(-1, keepdim=True) + eps).rsqrt()
        return cls(u * root, u * root, root / ONE, root * ONE)

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


def _turned(delta: Form, before: _Values, after: _Values, n: int, symbol: str) -> Form:
    """The change of y whose values are known at both sides; see `norm`."""
    root = (after.least + after.most) / 2
    off = (after.most - after.least) / 2
    y0, y1 = before.middle, after.middle
    # k = sigma / (sigma + sigma') = rho' / (rho + rho'), which grows with rho' and falls with rho
    least = after.least / (before.most + after.least) / ONE
    most = after.most / (before.least + after.most) * ONE
    k, apart = (least + most) / 2, (most - least) / 2
    z0 = k * y0 + (1 - k) * y1
    # k' y + (1 - k') y' - z0 = k (y - y0) + (1 - k) (y' - y1) + (k' - k) (y - y')
    wide = torch.maximum((before.high - after.low).abs(), (after.high - before.low).abs())
    z_radius = (k * before.radius + (1 - k) * after.radius + apart * wide) * ONE

    def project(t: Tensor) -> Tensor:
        return t - y0 * (z0 * t).mean(-1, keepdim=True)

    def bound(t: Tensor) -> Tensor:
        own = (1 - y0 * z0 / n).abs() - (y0 * z0).abs() / n
        return own * t + y0.abs() * (z0.abs() * t).mean(-1, keepdim=True)

    away = delta.map(project, bound).peak
    tau0 = delta.map(
        lambda t: (z0 * t).mean(-1, keepdim=True), lambda t: (z0.abs() * t).mean(-1, keepdim=True)
    ).peak
    length = delta.peak.square().mean(-1, keepdim=True).sqrt()
    change = torch.minimum((z_radius * delta.peak).mean(-1, keepdim=True), tau0 + length)
    tau = torch.minimum(tau0 + change, length)
    error = off * away + after.most * (before.radius * tau + y0.abs() * change)
    norm = float(root.max()) * (1 + float((y0.norm(dim=-1) * z0.norm(dim=-1)).max()) / n) * ONE
    straight = delta.map(lambda t: root * project(t), lambda t: root * bound(t), norm)
    both = 2 * delta.c.numel() ** 0.5  # ||y|| and ||y'|| are at most sqrt(n) in each row
    return straight.widened(error * ONE + 1e-15, (both + norm * delta.norm) * ONE, symbol=symbol)


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
