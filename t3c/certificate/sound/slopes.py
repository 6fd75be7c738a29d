"""Ranges of activations and of their derivatives over intervals."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EDGE = 1e-7
"""Added to every range: the points where a function or a slope turns are known to 1e-9."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A scalar function whose derivative turns at known points only.

    Attributes:
        f: The function.
        slope: Its derivative.
        turns: Where the function turns.
        bends: Where the derivative turns.
        bend: Largest magnitude of the second derivative.
    """

    f: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    turns: tuple[float, ...]
    bends: tuple[float, ...]
    bend: float

    def values(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Range of the function between two ends."""
        return _range(self.f, self.turns, low, high)

    def secants(self, x: tuple[Tensor, Tensor], d: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Range of the mean slope between x and x + d, for x and d between ends.

        It is the integral of the slope at x + t d over t in [0, 1], which moves by at most the
        largest second derivative times |change of x| + |change of d| / 2.
        """
        at, step = (x[0] + x[1]) / 2, (d[0] + d[1]) / 2
        small = step.abs() < 1e-3
        far = torch.where(small, 1.0, step)
        # a short secant has the slope of its middle but for step^2 / 24 third derivatives < EDGE
        slope = torch.where(small, self.slope(at + step / 2), (self.f(at + far) - self.f(at)) / far)
        reach = self.bend * ((x[1] - x[0]) / 2 + (d[1] - d[0]) / 4) + EDGE
        return slope - reach, slope + reach

    def slopes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Range of the derivative between two ends."""
        return _range(self.slope, self.bends, low, high)


def _range(
    f: Callable[[Tensor], Tensor], points: tuple[float, ...], low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    a, b = f(low), f(high)
    least, most = torch.minimum(a, b), torch.maximum(a, b)
    for point in points:
        value = f(torch.tensor(point, dtype=torch.float64))
        inside = (low <= point) & (point <= high)
        least = torch.where(inside, torch.minimum(least, value), least)
        most = torch.where(inside, torch.maximum(most, value), most)
    return least - EDGE, most + EDGE


def _gelu_slope(x: Tensor) -> Tensor:
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    found: Tensor = torch.special.ndtr(x) + x * density
    return found


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s + x * s * (1 - s)


_INNER, _CUBE = math.sqrt(2 / math.pi), 0.044715


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(_INNER * (x + _CUBE * x**3)))


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    t = torch.tanh(_INNER * (x + _CUBE * x**3))
    inner = _INNER * (1 + 3 * _CUBE * x * x)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner


CURVES = {
    "gelu": Curve(
        lambda x: x * torch.special.ndtr(x),
        _gelu_slope,
        (-0.7517915246935645,),
        (-math.sqrt(2), math.sqrt(2)),
        0.7979,
    ),
    "silu": Curve(
        lambda x: x * torch.sigmoid(x),
        _silu_slope,
        (-1.2784645427610738,),
        (-2.399357280520016, 2.399357280520016),
        0.5001,
    ),
    "gelu-tanh": Curve(
        _gelu_tanh,
        _gelu_tanh_slope,
        (-0.7524614220710162,),
        (-1.4185040087908284, 1.4185040087908284),
        0.7979,
    ),
    "erf": Curve(
        torch.erf, lambda x: 2 / math.sqrt(math.pi) * torch.exp(-x * x), (), (0.0,), 0.968
    ),
    "tanh": Curve(torch.tanh, lambda x: 1 - torch.tanh(x) ** 2, (), (0.0,), 0.77),
    "sigmoid": Curve(
        torch.sigmoid, lambda x: torch.sigmoid(x) * (1 - torch.sigmoid(x)), (), (0.0,), 0.0963
    ),
}
