"""Elastic layers: d_y = dW x + W' (d_x + rounding), stage by stage as they compute."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from t3c.certificate.sound.form import Form, Linear, NoRule
from t3c.certificate.sound.norms import conv_norm, matrix_norm
from t3c.certificate.sound.pair import Pair, dynamic_error, gamma, grid_error
from t3c.core.formats import Dense, LowRank, Tucker2
from t3c.core.grid import Grid
from t3c.elastic import fake_quant
from t3c.elastic.conv import ElasticConv
from t3c.elastic.layer import INPUT, ElasticLayer

Rounding = Grid | Literal["dynamic"] | None


@dataclass(frozen=True, slots=True)
class Operator:
    """A linear map with the means to bound it.

    Attributes:
        apply: (kernel, values) -> outputs.
        kernel: Its coefficients.
        norm: Proven bound of its L2 norm on these inputs.
        terms: Products in one output.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    kernel: Tensor
    norm: float
    terms: int

    def plain(self, values: Tensor) -> Tensor:
        """On a stack of values."""
        return self.apply(self.kernel, values)

    def magnitude(self, values: Tensor) -> Tensor:
        """With absolute coefficients."""
        return self.apply(self.kernel.abs(), values)

    def __call__(self, form: Form, shift: Tensor | None = None) -> Form:
        """On a form."""
        return form.map(self.plain, self.magnitude, self.norm, shift)


def site(layer: ElasticLayer, p: Pair) -> Pair:
    """An elastic layer in its format, beside the original."""
    conv = isinstance(layer, ElasticConv)
    shape = p.x.c.shape
    make = _convs(layer, shape) if isinstance(layer, ElasticConv) else _linear
    weight = layer.weight.detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    lift = bias if bias is None or not conv else bias[:, None, None]
    whole = make(weight, "window")
    x = whole(p.x, lift)
    margin = gamma(whole.terms + 8)
    extra = 0.0 if lift is None else lift.abs()
    slack = margin * (whole.magnitude(p.x.peak[None])[0] + extra)
    stages, effective = _stages(layer)
    axes = (1, 2, 3) if conv else (-1,)
    value, error = p.changed, None
    slacks = slack.clone()
    for number, (kernel, kind, rounding) in enumerate(stages):
        operator = make(kernel, kind)
        if rounding is not None and not (number == 0 and rounding == p.grid):
            inner = value if error is None else value + error
            wrong = (
                dynamic_error(inner, axes) if rounding == "dynamic" else grid_error(inner, rounding)
            )
            base = error if error is not None else _nothing(value)
            error = base.widened(wrong, symbol="error")
        here = value if error is None else value + error
        made = margin_of(operator, here)
        error = None if error is None else operator(error)
        value = operator(value)
        if number < len(stages) - 1:
            error = (error if error is not None else _nothing(value)).widened(made)
        else:
            slacks = slacks + made + margin * extra
    change = make(effective - weight, "window")
    d = change(p.x) + make(effective, "window")(p.d)
    if error is not None:
        d = d + error
    return Pair(x.widened(slack), d.widened(slacks))


def margin_of(operator: Operator, value: Form) -> Tensor:
    """Float32 rounding of one product."""
    return gamma(operator.terms + 8) * operator.magnitude(value.peak[None])[0]


def _nothing(like: Form) -> Form:
    zero = torch.zeros_like(like.c)
    none = zero.new_zeros(0, *zero.shape)
    return Form(like.space, zero, none, none, zero, 0.0)


Make = Callable[[Tensor, str], Operator]


def _linear(kernel: Tensor, kind: str) -> Operator:
    apply: Callable[[Tensor, Tensor], Tensor] = lambda w, x: functional.linear(x, w)  # noqa: E731
    return Operator(apply, kernel, matrix_norm(kernel), kernel.shape[1])


def _convs(layer: ElasticConv, shape: torch.Size) -> Make:
    s = layer.site

    def make(kernel: Tensor, kind: str) -> Operator:
        window = kind == "window"
        stride, padding, dilation = (
            (s.stride, s.padding, s.dilation) if window else ((1, 1), (0, 0), (1, 1))
        )

        def apply(w: Tensor, x: Tensor) -> Tensor:
            y = functional.conv2d(x.flatten(0, 1), w, None, stride, padding, dilation)
            return y.reshape(*x.shape[:2], *y.shape[1:])

        size = (int(shape[2]), int(shape[3]))
        norm = (
            conv_norm(kernel, size, padding, dilation)
            if window
            else matrix_norm(kernel[:, :, 0, 0])
        )
        return Operator(apply, kernel, norm, kernel[0].numel())

    return make


def _stages(layer: ElasticLayer) -> tuple[list[tuple[Tensor, str, Rounding]], Tensor]:
    """(kernel, kind, rounding of its input) of each stage, and the product of all kernels."""
    fmt, conv = layer.format, isinstance(layer, ElasticConv)
    integer = fmt is not None and layer.exact and fmt.bits < 32
    bits = 32 if fmt is None else fmt.bits

    def kernel(name: str, rows: int | None, cols: int | None) -> Tensor:
        value = layer.weight if name == "weight" else layer.factor(name)
        if not integer:
            return value.detach().double()[:rows, :cols]
        q, scale = layer.codes_of(name, bits)
        if scale.dim() == 2:
            return fake_quant.spread((q, scale)).double()[:rows, :cols]
        spread = scale.double().reshape(-1, *[1] * (q.dim() - 1))
        return (q.double() * spread)[:rows, :cols]

    def rounding(name: str) -> Rounding:
        if not integer:
            return None
        return layer.grids.get(name, "dynamic") if conv else "dynamic"

    match fmt:
        case None | Dense():
            w = kernel("weight", None, None)
            return [(w, "window", rounding(INPUT))], w
        case LowRank():
            low, high = kernel("low", fmt.rank, None), kernel("high", None, fmt.rank)
            product = high @ low
            if not conv:
                stages: list[tuple[Tensor, str, Rounding]] = [
                    (low, "window", rounding(INPUT)),
                    (high, "window", rounding("low")),
                ]
                return stages, product
            return [
                (_point(low), "window", rounding(INPUT)),
                (_point(high), "point", rounding("low")),
            ], _point(product)
        case Tucker2():
            a, b = int(fmt.ranks[0]), int(fmt.ranks[1])
            first, core = kernel("reduce", a, None), kernel("core", b, a)
            last = kernel("expand", None, b)
            product = torch.einsum("ob,bahw,ai->oihw", last, core, first)
            return [
                (_point(first), "point", rounding(INPUT)),
                (core, "window", rounding("reduce")),
                (_point(last), "point", rounding("core")),
            ], product
        case _:
            raise NoRule(f"{type(fmt).__name__} factors have no rule")


def _point(w: Tensor) -> Tensor:
    return w[:, :, None, None]


__all__ = ["Linear", "Operator", "site"]
