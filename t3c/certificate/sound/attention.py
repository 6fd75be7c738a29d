"""Scaled dot product attention: products, a softmax, and rows of weights that sum to one."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from t3c.certificate.sound import normed
from t3c.certificate.sound.form import Form, constant
from t3c.certificate.sound.pair import Pair, gamma
from t3c.certificate.sound.product import multiplied

HIDES = -1e20
"""Masks from here down leave a share of zero, whatever is added."""
SHARE, VALUE, WORDS = 4095, 2047, 2**31 - 1
"""Codes of 16-bit attention. Source: t3c.codegen.kernels.attention_words."""
HALF = 0.5 * (1 + 1e-3)
"""Largest error of a code: half, and the float32 roundings of one up to 32767."""


def attention(q: Pair, k: Pair, v: Pair, mask: Tensor | None, causal: bool, scale: float) -> Pair:
    """softmax(q k^T scale + mask) v on [..., heads, positions, size], all heads apart.

    The difference also covers kernels that multiply 16-bit codes where the sizes allow them.

    Args:
        q: Queries.
        k: Keys, as many heads.
        v: Values.
        mask: Added to the scores, or booleans of what is seen; None: all is seen.
        causal: Whether position s sees positions 0..s only.
        scale: Factor of the scores.
    """
    size = q.x.c.shape[-1]
    seen, added = _mask(mask, causal, (q.x.c.shape[-2], k.x.c.shape[-2]))
    scores = multiplied(q, _turned(k), size + 10)
    scores = _each(scores, lambda f: f.scaled(torch.tensor(scale)))
    if added is not None:
        scores = Pair(scores.x + constant(scores.x.space, added), scores.d).rounded(1)
    words = size % 16 == 0 and v.x.c.shape[-1] % 8 == 0
    if words:
        coded = _score_codes(q.changed, k.changed, abs(scale))
        scores = Pair(scores.x, scores.d.widened(coded, symbol="error"))
    shares = normed.softmax(scores, seen)
    made = weighted(shares, v, normed.roundings(scores), seen)
    if not words:
        return made
    return Pair(made.x, made.d.widened(_value_codes(v.changed), symbol="error"))


def weighted(shares: Pair, v: Pair, roundings: float, seen: Tensor | None = None) -> Pair:
    """Means of v [..., n, m] with weights [..., m_rows, n] that are not negative and sum to one.

    P V = w V + P (V - 1 w V) for any row of weights w: products are with what is apart from a
    mean, and errors of P count for that only. Every mean lies between the ends of what it averages.

    Args:
        shares: The weights, exact.
        v: What they average.
        roundings: Relative float32 error of a weight, in units of round-off.
        seen: Where weights are not zero; None: nowhere known to be.
    """
    base = (shares.x.low + shares.x.high).mean(-2, keepdim=True)
    base = base / base.sum(-1, keepdim=True).clamp_min(1e-300)  # [..., 1, n]

    def middle(t: Tensor) -> Tensor:
        return base @ t

    def apart(t: Tensor) -> Tensor:
        return t - base @ t

    def bound(t: Tensor) -> Tensor:
        return (1 - 2 * base).transpose(-1, -2) * t + base @ t

    mean = _each(v, lambda f: f.map(middle, middle))
    rest = _each(v, lambda f: f.map(apart, bound))
    made = multiplied(shares, rest)
    made = Pair(made.x + mean.x, made.d + mean.d)
    before, after = _hull(v.x, seen), _hull(v.changed, seen)
    x = made.x.tightened(*before).cut("value")
    d = made.d.tightened(after[0] - before[1], after[1] - before[0]).cut("error")
    margin = gamma(2 * roundings + v.x.c.shape[-2] + 8)  # twice: weights sum to one but for these
    one = margin * v.x.peak.amax(-2, keepdim=True).expand(x.c.shape)
    two = margin * v.changed.peak.amax(-2, keepdim=True).expand(x.c.shape)
    return Pair(x.widened(one), d.widened(one + two))


def _mask(
    mask: Tensor | None, causal: bool, size: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """(what is seen, what is added), None for all and nothing."""
    seen = torch.ones(size, dtype=torch.bool).tril() if causal else None
    if mask is None:
        return seen, None
    open_ = mask if mask.dtype == torch.bool else mask > HIDES
    both = open_ if seen is None else open_ & seen
    if mask.dtype == torch.bool or not bool((mask * open_.to(mask)).nan_to_num().any()):
        return both, None
    return both, torch.where(open_, mask, 0.0).double()


def _hull(v: Form, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ends of any mean of rows that are seen."""
    low, high = v.ends
    if seen is None:
        return low.amin(-2, keepdim=True), high.amax(-2, keepdim=True)
    hide = ~seen[..., None]
    least = low[..., None, :, :].masked_fill(hide, math.inf).amin(-2)
    most = high[..., None, :, :].masked_fill(hide, -math.inf).amax(-2)
    return least, most


def _score_codes(q: Form, k: Form, scale: float) -> Tensor:
    """What rounding queries and keys to codes of one scale for each head adds to the scores."""
    largest = min(32767, math.isqrt(WORDS // q.c.shape[-1]))

    def error(f: Form) -> Tensor:
        return (HALF / largest * f.peak.amax((-2, -1), keepdim=True)).expand(f.c.shape)

    eq, ek = error(q), error(k).transpose(-1, -2)
    both = eq @ (k.peak.transpose(-1, -2) + ek) + q.peak @ ek
    return scale * both * (1 + 1e-4)


def _value_codes(v: Form) -> Tensor:
    """What codes of values, and of a softmax whose largest is SHARE, add to a mean.

    Weights a_j + e_j with sum a_j = A >= SHARE and |e_j| <= E instead of a_j: the mean moves by
    sum_j e_j (v_j - m) / sum_j (a_j + e_j) for the new mean m, at most n E (high - low) / (SHARE -
    1): the code of the largest is SHARE itself but for one.
    """
    n = v.c.shape[-2]
    width = v.high.amax(-2, keepdim=True) - v.low.amin(-2, keepdim=True)
    step = HALF / VALUE * v.peak.amax((-2, -1), keepdim=True)
    return n * (HALF + 0.02) / (SHARE - 1) * (width + 2 * step) + step


def _turned(p: Pair) -> Pair:
    swap = lambda t: t.transpose(-1, -2)  # noqa: E731
    return _each(p, lambda f: f.map(swap, swap, 1.0))


def _each(p: Pair, op: Callable[[Form], Form]) -> Pair:
    return Pair(op(p.x), op(p.d))
