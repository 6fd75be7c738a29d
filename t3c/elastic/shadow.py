"""Compare a compiled profile with its torch reference, rounding by rounding.

A quantized network is chaotic: two correct implementations that differ by one unit in the last
place round a few activations differently, and a dozen layers later their outputs differ by as much
as rounding itself does (MiniLM: 6 %, from a relative perturbation of 1e-7 of its norms' gains). A
free comparison therefore measures the chaos, not the library.

Here the reference follows the library. The library's probe function also returns the input of every
site; the reference compares its own value there with the library's, and goes on with the library's.
Every stretch between two roundings, and every site with exact integers, is checked on the same
input; any wrong kernel, scale, constant or edge shows at the next tap.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from t3c.elastic.layer import ElasticLayer
from t3c.elastic.model import ElasticModel


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far library and reference are apart.

    Attributes:
        worst: Largest relative L2 error of any stretch.
        where: The site at whose input it was seen, or the name of the output.
        stretches: How many were compared.
    """

    worst: float
    where: str
    stretches: int


@dataclass(slots=True)
class _Run:
    taps: dict[str, list[Tensor]]
    errors: list[tuple[float, str]] = field(default_factory=list)


class _Shadow(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, run: _Run) -> None:
        super().__init__(graph)
        self.run_state = run

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(str(target))
        if isinstance(layer, ElasticLayer):
            name = layer.site.name
            tap = self.run_state.taps[name].pop(0).reshape(args[0].shape)
            self.run_state.errors.append((relative(tap, args[0]), name))
            args = (tap, *args[1:])
        return super().call_module(target, args, kwargs)


def shadow(
    elastic: ElasticModel,
    batch: Sequence[Tensor],
    sites: Sequence[str],
    taps: Sequence[Tensor],
    outputs: Mapping[str, Tensor],
) -> Agreement:
    """Follow the library through the graph, in the formats that `elastic` runs now.

    Args:
        elastic: The reference, inside `using(formats)`.
        batch: Flat inputs.
        sites: Site of each tap.
        taps: Input of each site call, as the library computed it.
        outputs: Name -> output of the library, in order.
    """
    queue: dict[str, list[Tensor]] = {site: [] for site in elastic.sites}
    for site, tap in zip(sites, taps, strict=True):
        queue[site].append(tap)
    run = _Run(queue)
    with torch.inference_mode():
        reference = _Shadow(elastic.graph, run).run(*batch)
    for (name, got), want in zip(outputs.items(), reference, strict=True):
        run.errors.append((relative(got, want), name))
    worst, where = max(run.errors, key=lambda e: math.inf if math.isnan(e[0]) else e[0])
    return Agreement(worst, where, len(run.errors))


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; ||got|| where `want` is zero; inf if shapes differ."""
    if got.shape != want.shape:
        return math.inf
    difference = float((got.double() - want.double()).norm())
    return difference / (float(want.double().norm()) or 1.0)
