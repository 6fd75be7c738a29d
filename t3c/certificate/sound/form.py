"""Affine forms: sets of tensors that know which of their errors they share.

A form is center + sum of symbols times their tensors + a remainder. Symbols are shared between the
original's value x and the difference delta at every node: that is how W' delta + dW x keeps what
both terms have in common. The remainder is known twice, by element and in the L2 norm, and each
operator takes whichever is smaller. Source: Stolfi, Figueiredo, Self-validated numerical methods
(1997), chapter 4; the differences as in Paulsen et al., ReluDiff (arXiv 2001.03662).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["interval", "norm", "both", "symbols"]
MODES: tuple[Mode, ...] = ("interval", "norm", "both", "symbols")
Linear = Callable[[Tensor], Tensor]
BUDGET = 24_000_000
"""Numbers that the symbols of one form may take: 192 MB."""


CUT = 2.0
"""How many times wider than its known ends an element's symbols may be; a choice, not a measured
one."""


class NoRule(Exception):
    """No rule bounds an operator, or its bound is not finite; the message says what."""


@dataclass(slots=True)
class Space:
    """The symbols of one cell, and what each may be.

    Attributes:
        mode: Which of the representations are kept: ``interval``, ``norm``, ``both`` (of a
            remainder, no symbols) or ``symbols``, which keeps everything.
        cap: Most symbols of the original and of the difference, each.
        ball: How many of the first symbols lie in a common unit ball.
        values: Symbols of the original's values so far.
        errors: Symbols of the difference alone so far.
    """

    mode: Mode = "symbols"
    cap: int = 6000
    ball: int = 0
    values: int = 0
    errors: int = 0

    def support(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest sum of the symbols of the original for each element.

        Args:
            g: [symbols, ...].
        """
        reach = g[: self.ball].square().sum(0).sqrt() + g[self.ball :].abs().sum(0)
        return -reach, reach


@dataclass(frozen=True, eq=False)
class Form:
    """A set of float64 tensors of one shape.

    Attributes:
        space: Its symbols.
        c: Center.
        g: [symbols of the original, ...]; later symbols do not occur.
        h: [symbols of the difference, ...].
        e: Bound of the remainder, element by element.
        r: Bound of the remainder's L2 norm, over all elements.
        box: Tighter ends by element, where an operator knows them.
    """

    space: Space
    c: Tensor
    g: Tensor
    h: Tensor
    e: Tensor
    r: float
    box: tuple[Tensor, Tensor] | None = None

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Least and largest value of each element."""
        down, up = self.space.support(self.g)
        extra = self.e + (self.h.abs().sum(0) if len(self.h) else 0)
        low, high = self.c + down - extra, self.c + up + extra
        if self.box is not None and self.space.mode != "norm":
            low, high = torch.maximum(low, self.box[0]), torch.minimum(high, self.box[1])
            low, high = torch.minimum(low, high), torch.maximum(low, high)
        return low, high

    @property
    def low(self) -> Tensor:
        """Least values."""
        return self.ends[0]

    @property
    def high(self) -> Tensor:
        """Largest values."""
        return self.ends[1]

    @cached_property
    def peak(self) -> Tensor:
        """Largest magnitude of each element."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @cached_property
    def norm(self) -> float:
        """A bound of the L2 norm."""
        whole = float(self.c.norm()) + self.r
        ball, rest = self.g[: self.space.ball], self.g[self.space.ball :]
        whole += float(ball.norm())  # Frobenius, above the operator norm
        for gens in (rest, self.h):
            whole += float(gens.flatten(1).norm(dim=1).sum())
        return min(whole, float(self.peak.norm()))

    @property
    def finite(self) -> bool:
        """Whether all ends are finite."""
        return bool(self.peak.isfinite().all())

    def remainder(self, e: Tensor, r: float) -> "Form":
        """The same with another remainder, kept as the mode says."""
        mode = self.space.mode
        r = float(e.norm()) if mode == "interval" else min(r, float(e.norm()))
        e = torch.full_like(e, r) if mode == "norm" else e.clamp_max(r)
        return replace(self, e=e, r=r)

    def within(self, low: Tensor, high: Tensor) -> "Form":
        """The same set, whose ends are known beside it."""
        return replace(self, box=(low, high))

    def tightened(self, low: Tensor, high: Tensor) -> "Form":
        """The same, known to lie between two tensors as well."""
        if self.box is not None:
            low, high = torch.maximum(low, self.box[0]), torch.minimum(high, self.box[1])
        found = replace(self, box=(low, high))
        if self.space.mode in ("interval", "both"):
            half = (found.high - found.low) / 2
            if float(half.norm()) <= self.r or self.space.mode == "interval":
                middle = replace(found, c=(found.high + found.low) / 2)
                return middle.remainder(half, float(half.norm()))
        return found

    def cut(self, symbol: str) -> "Form":
        """Elements whose known ends are far within the symbols' become symbols of their own.

        They forget what they share with others; what follows reads symbols, not ends.
        """
        if self.box is None or self.space.mode != "symbols":
            return self
        down, up = self.space.support(self.g)
        reach = (up - down) / 2 + self.e + (self.h.abs().sum(0) if len(self.h) else 0)
        half = (self.high - self.low) / 2
        lost = reach > CUT * half
        if not bool(lost.any()):
            return self
        keep = (~lost).double()
        bare = replace(
            self,
            c=torch.where(lost, (self.high + self.low) / 2, self.c),
            g=self.g * keep,
            h=self.h * keep,
            e=self.e * keep,
            box=None,
        )
        wider = half * (1 + 1e-12) + 1e-15 * self.peak
        return bare.widened(wider * lost, symbol=symbol).within(*self.box)

    def map(
        self, op: Linear, magnitude: Linear, norm: float | None = None, shift: Tensor | None = None
    ) -> "Form":
        """The image under a linear operator.

        Args:
            op: The operator, over a leading axis of tensors.
            magnitude: The same with the absolute values of its coefficients.
            norm: A proven bound of its L2 operator norm; None: unknown.
            shift: Added to the center.
        """
        c = op(self.c[None])[0]
        e = magnitude(self.e[None])[0]
        found = replace(
            self,
            c=c if shift is None else c + shift,
            g=over(op, self.g, c),
            h=over(op, self.h, c),
            box=None,
        )
        reach = float("inf") if norm is None else norm * self.r
        return found.remainder(e, reach)

    def __add__(self, other: "Form") -> "Form":
        """Sums of elements of both."""
        c = self.c + other.c
        shape = c.shape
        found = replace(
            self,
            c=c,
            g=sums(self.g, other.g, shape),
            h=sums(self.h, other.h, shape),
            box=None,
        )
        e = (self.e + other.e).expand(shape).clone()
        same = self.c.shape == shape == other.c.shape
        return found.remainder(e, self.r + other.r if same else float("inf"))

    def __neg__(self) -> "Form":
        """All signs turned."""
        box = None if self.box is None else (-self.box[1], -self.box[0])
        return replace(self, c=-self.c, g=-self.g, h=-self.h, box=box)

    def scaled(self, by: Tensor) -> "Form":
        """Times a constant tensor that broadcasts to this shape."""
        by = by.to(self.c)
        most = float(by.abs().max()) if by.numel() else 0.0
        return self.map(lambda t: t * by, lambda t: t * by.abs(), most)

    def widened(self, error: Tensor, norm: float = float("inf"), *, symbol: str = "") -> "Form":
        """Plus anything up to `error` by element and `norm` in L2.

        Args:
            error: Bound by element, not negative.
            norm: Bound of the L2 norm, if another one is known.
            symbol: ``value`` or ``error``: the largest elements become symbols of that kind.
        """
        error = error.expand(self.c.shape)
        if self.box is not None:
            low, high = self.box[0] - error, self.box[1] + error
            return replace(self, box=None).widened(error, norm, symbol=symbol).within(low, high)
        if symbol and self.space.mode == "symbols":
            return self._with_symbols(error, norm, symbol)
        return self.remainder(self.e + error, self.r + min(norm, float(error.norm())))

    def _with_symbols(self, error: Tensor, norm: float, symbol: str) -> "Form":
        space, flat = self.space, error.flatten()
        known = space.values if symbol == "value" else space.errors
        room = min(space.cap, BUDGET // max(1, flat.numel())) - known
        wanted = int((flat > 1e-12 * flat.max().clamp_min(1e-30)).sum())
        count = max(0, min(wanted, room if wanted <= room // 2 else room // 2))
        at = flat.topk(count).indices if 0 < count else flat.new_zeros(0, dtype=torch.long)
        new = flat.new_zeros(count, flat.numel())
        new[torch.arange(count), at] = flat[at]
        rest = flat.clone()
        rest[at] = 0
        new = new.reshape(count, *self.c.shape)
        if symbol == "value":
            space.values += count
            found = replace(self, g=torch.cat([_padded(self.g, known, self.c.shape), new]))
        else:
            space.errors += count
            found = replace(self, h=torch.cat([_padded(self.h, known, self.c.shape), new]))
        extra = rest.reshape(self.c.shape)
        return found.remainder(self.e + extra, self.r + min(norm, float(extra.norm())))


def constant(space: Space, value: Tensor) -> Form:
    """One tensor."""
    c = value.double()
    none = c.new_zeros(0, *c.shape)
    return Form(space, c, none, none, torch.zeros_like(c), 0.0)


def over(op: Linear, g: Tensor, like: Tensor) -> Tensor:
    """An operator over a stack of symbols, which may be empty."""
    if not len(g):
        return like.new_zeros(0, *like.shape)
    rows = max(1, BUDGET // 4 // max(1, like.numel(), g[0].numel()))
    if len(g) <= rows:
        return op(g)
    return torch.cat([op(part) for part in torch.split(g, rows)])


def _padded(g: Tensor, count: int, shape: torch.Size) -> Tensor:
    if len(g) == count:
        return g.expand(count, *shape)
    return torch.cat([g.expand(len(g), *shape), g.new_zeros(count - len(g), *shape)])


def sums(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """Two stacks of symbols added, the shorter one filled up; elements broadcast to a shape."""
    count = max(len(a), len(b))

    def whole(g: Tensor) -> Tensor:
        lifted = g.reshape(len(g), *[1] * (len(shape) - g.dim() + 1), *g.shape[1:])
        return _padded(lifted, count, shape)

    return whole(a) + whole(b)
