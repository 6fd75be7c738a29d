"""Products of two forms, and of two pairs.

(c + G s)(b + H s) = c b + (c H + b G) s + s^T G^T H s: the first two terms are a form again, the
last is bounded with the symbols that both factors share, so that what cancels in a sum of products
cancels here, too. Source: Bonaert et al., Fast and precise certification of transformers (PLDI
2021), section 4.8; the bound with one ball among the symbols is ours, below.
"""

import torch
from torch import Tensor

from t3c.certificate.sound.form import Form, NoRule, over, sums
from t3c.certificate.sound.pair import Pair, gamma

SHARED = 1024
"""Symbols whose products are bounded together; those of others by their magnitudes."""
CHUNK = 4_000_000
"""Numbers of quadratic forms held at once."""


def product(a: Form, b: Form, symbol: str) -> Form:
    """The matrix product of a [..., m, k] and b [..., k, n], one value of each at a time.

    Args:
        a: Left factor.
        b: Right factor, over the same symbols.
        symbol: Kind of the symbols that the remainder becomes.
    """
    c = a.c @ b.c
    g = sums(over(lambda t: t @ b.c, a.g, c), over(lambda t: a.c @ t, b.g, c), c.shape)
    h = sums(over(lambda t: t @ b.c, a.h, c), over(lambda t: a.c @ t, b.h, c), c.shape)
    reach_a, reach_b = _reach(a), _reach(b)
    error = a.e @ (b.c.abs() + reach_b + b.e) + (a.c.abs() + reach_a) @ b.e
    shift, shared = _quadratic(a, b, reach_a, reach_b)
    zero = torch.zeros_like(c)
    made = Form(a.space, c + shift, g, h, zero, 0.0).widened(error + shared, symbol=symbol)
    return made.tightened(*_between(a, b))


def _reach(f: Form) -> Tensor:
    """Largest magnitude of the symbols' sum, by element."""
    up = f.space.support(f.g)[1]
    return up + f.h.abs().sum(0) if len(f.h) else up


def _between(a: Form, b: Form) -> tuple[Tensor, Tensor]:
    """Ends of the product from the ends of the factors."""
    (al, ah), (bl, bh) = a.ends, b.ends
    al, ah = al[..., None], ah[..., None]
    bl, bh = bl[..., None, :, :], bh[..., None, :, :]
    corners = [al * bl, al * bh, ah * bl, ah * bh]
    low = torch.minimum(torch.minimum(*corners[:2]), torch.minimum(*corners[2:])).sum(-2)
    high = torch.maximum(torch.maximum(*corners[:2]), torch.maximum(*corners[2:])).sum(-2)
    slack = 1e-12 * (low.abs() + high.abs())
    return low - slack, high + slack


def _quadratic(a: Form, b: Form, reach_a: Tensor, reach_b: Tensor) -> tuple[Tensor, Tensor]:
    """Center and radius of sum_k (G_a s)_ik (G_b s)_kj.

    With M = G_a^T G_b for one (i, j), S its symmetric part, t the symbols in [-1, 1] and u those
    of the unit ball: s^T M s = u^T S_uu u + 2 u^T S_ut t + sum_n S_nn t_n^2 + sum_{n!=m} S_nm t_n
    t_m, where t_n^2 is in [0, 1]. By Cauchy-Schwarz the first is at most ||S_uu||_F, the second at
    most 2 sum_n ||S_un||.
    """
    whole = reach_a @ reach_b
    zero = torch.zeros_like(whole)
    values, errors = max(len(a.g), len(b.g)), max(len(a.h), len(b.h))
    ball = min(a.space.ball, values)
    if not values + errors or not float(whole.max()) > 0:
        return zero, whole
    ga, gb = _stack(a, values, errors), _stack(b, values, errors)
    # those that weigh most; the ball stays whole, in front
    weigh_a, weigh_b = ga.flatten(1).norm(dim=1), gb.flatten(1).norm(dim=1)
    weight = weigh_a * weigh_b.sum() + weigh_b * weigh_a.sum()
    weight[:ball] = float("inf")
    count = min(int((weight > 0).sum()), max(SHARED, ball))
    if not count:
        return zero, whole
    kept = weight.topk(count).indices.sort().values
    ga, gb = ga[kept], gb[kept]
    near_a, near_b = _radius(ga, ball), _radius(gb, ball)
    # A B = near near + (A B - near near), the latter by magnitudes
    rest = (whole - near_a @ near_b).clamp_min(0) if count < len(weight) else zero
    shape = whole.shape
    m, k = ga.shape[-2:]
    n = gb.shape[-1]
    ga, gb = ga.reshape(count, -1, m, k), gb.reshape(count, -1, k, n)
    shift, radius = whole.new_zeros(ga.shape[1], m, n), whole.new_zeros(ga.shape[1], m, n)
    step = max(1, CHUNK // (count * count))
    for batch in range(ga.shape[1]):
        for row in range(m):
            left = ga[:, batch, row]  # [count, k]
            for at in range(0, n, step):
                right = gb[:, batch, :, at : at + step]  # [count, k, columns]
                both = torch.einsum("pk,qkc->cpq", left, right)
                s = (both + both.transpose(1, 2)) / 2
                shift[batch, row, at : at + step], radius[batch, row, at : at + step] = _form(
                    s, ball
                )
    shift, radius, plain = shift.reshape(shape), radius.reshape(shape), near_a @ near_b
    better = radius < plain
    return (
        torch.where(better, shift, zero),
        torch.where(better, radius, plain) + rest + 1e-13 * whole,
    )


def _form(s: Tensor, ball: int) -> tuple[Tensor, Tensor]:
    """Center and radius of quadratic forms with symmetric matrices [columns, p, p]."""
    diagonal = s[:, ball:, ball:].diagonal(dim1=1, dim2=2)
    rest = s[:, ball:, ball:].abs().sum((1, 2)) - diagonal.abs().sum(1)
    radius = rest + diagonal.abs().sum(1) / 2
    if ball:
        radius = radius + s[:, :ball, :ball].flatten(1).norm(dim=1)
        radius = radius + 2 * s[:, :ball, ball:].norm(dim=1).sum(1)
    return diagonal.sum(1) / 2, radius


def _radius(g: Tensor, ball: int) -> Tensor:
    return g[:ball].square().sum(0).sqrt() + g[ball:].abs().sum(0)


def _stack(f: Form, values: int, errors: int) -> Tensor:
    """All symbols [values + errors, ...] of a form."""
    shape = f.c.shape
    g = torch.cat([f.g, f.c.new_zeros(values - len(f.g), *shape)])
    h = torch.cat([f.h, f.c.new_zeros(errors - len(f.h), *shape)])
    return torch.cat([g, h])


def multiplied(a: Pair, b: Pair, terms: int | None = None) -> Pair:
    """The matrix product of two pairs, with float32 sums of `terms` products (None: exact).

    a' b' - a b = da (b + db / 2) + (a + da / 2) db.
    """
    x = product(a.x, b.x, "value")
    mid_a, mid_b = a.x + _half(a.d), b.x + _half(b.d)
    d = product(a.d, mid_b, "error") + product(mid_a, b.d, "error")
    after, before = _between(a.changed, b.changed), x.ends
    made = Pair(x, d.tightened(after[0] - before[1], after[1] - before[0]))
    if terms is None:
        return made
    one = gamma(terms) * (a.x.peak @ b.x.peak)
    two = gamma(terms) * (a.changed.peak @ b.changed.peak)
    return Pair(made.x.widened(one), made.d.widened(one + two))


def elementwise(a: Pair, b: Pair) -> Pair:
    """Products of elements of two pairs of one shape.

    Raises:
        NoRule: One broadcasts.
    """
    shape = a.x.c.shape
    if b.x.c.shape != shape:
        raise NoRule("a product of two values that broadcast")

    def apart(p: Pair) -> Pair:
        split = lambda t: t[..., None, None]  # noqa: E731
        return Pair(p.x.map(split, split, 1.0), p.d.map(split, split, 1.0))

    made = multiplied(apart(a), apart(b), 2)

    def whole(f: Form) -> Form:
        joined = lambda t: t[..., 0, 0]  # noqa: E731
        back = f.map(joined, joined, 1.0)
        return back if f.box is None else back.within(f.box[0][..., 0, 0], f.box[1][..., 0, 0])

    return Pair(whole(made.x), whole(made.d))


def _half(f: Form) -> Form:
    return f.scaled(torch.tensor(0.5))
