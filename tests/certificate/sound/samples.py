"""Points of forms: what every rule must enclose, by symbols and by ends."""

from collections.abc import Callable

import torch
from torch import Tensor

from t3c.certificate.sound.form import Form, Mode, Space, constant
from t3c.certificate.sound.pair import Pair

Point = Callable[[Pair], tuple[Tensor, Tensor]]


def space_of(mode: Mode, ball: bool) -> Space:
    """Eight symbols of the original, four of the difference."""
    made = Space(mode, values=8, errors=4)
    if ball:
        made.ball = 5
    return made


def pair_in(space: Space, *shape: int, size: float = 0.3, apart: float = 0.1) -> Pair:
    """A random pair over the first symbols of a space."""
    center = torch.randn(shape, dtype=torch.float64)
    plain = space.mode != "symbols"
    values, errors = (0, 0) if plain else (space.values, space.errors)

    def form(c: Tensor, scale: float, own: int) -> Form:
        g = scale * torch.randn(values, *shape, dtype=torch.float64)
        h = scale * torch.randn(own, *shape, dtype=torch.float64)
        e = scale * torch.rand(shape, dtype=torch.float64)
        made = Form(space, c, g, h, torch.zeros_like(c), 0.0)
        return made.remainder(made.e + e, float(e.norm()))

    x = form(center, size, 0)
    d = form(apart * torch.randn(shape, dtype=torch.float64), apart, errors)
    return Pair(x, d)


def symbols(space: Space) -> tuple[Tensor, Tensor]:
    """Values of the symbols, often at their ends."""
    values = 2 * torch.rand(space.values, dtype=torch.float64) - 1
    errors = 2 * torch.rand(space.errors, dtype=torch.float64) - 1
    if torch.rand(1) < 0.7:
        values, errors = values.sign(), errors.sign()
    if space.ball:
        values[: space.ball] /= max(1.0, float(values[: space.ball].norm()))
    return values, errors


def at(form: Form, values: Tensor, errors: Tensor) -> Tensor:
    """A member of a form at given symbols; the remainder is random."""
    g, h = form.g, form.h
    y = form.c + torch.tensordot(values[: len(g)], g, 1) + torch.tensordot(errors[: len(h)], h, 1)
    turn = (
        (2 * torch.rand_like(y) - 1).sign() if torch.rand(1) < 0.5 else 2 * torch.rand_like(y) - 1
    )
    rest = turn * form.e
    made: Tensor = y + rest * min(1.0, form.r / max(1e-300, float(rest.norm())))
    return made


def encloses(form: Form, value: Tensor, values: Tensor, errors: Tensor) -> bool:
    """Whether a value lies within the ends, and near enough the form at the symbols it has."""
    slack = 1e-9 * (1 + value.abs())
    ends = bool(((form.low - slack <= value) & (value <= form.high + slack)).all())
    old, new = form.g[: len(values)], form.g[len(values) :]
    y = form.c + torch.tensordot(values[: len(old)], old, 1)
    fresh = form.h[len(errors) :]
    y = y + torch.tensordot(errors[: len(form.h)], form.h[: len(errors)], 1)
    room = form.e + new.abs().sum(0) + fresh.abs().sum(0)
    return ends and bool(((value - y).abs() <= room + slack).all())


def point(space: Space, value: Tensor) -> Pair:
    """One value, not changed."""
    return Pair(constant(space, value), constant(space, torch.zeros_like(value).double()))
