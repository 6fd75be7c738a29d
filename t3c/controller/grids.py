"""Fixed grids of activations, fitted to calibration data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from t3c.core.errors import T3CError
from t3c.core.grid import Grid
from t3c.elastic import fake_quant
from t3c.elastic.conv import ElasticConv
from t3c.elastic.model import ElasticModel
from t3c.elastic.snap import Snap

SAMPLE = 1 << 15
"""Values kept of one tensor of one batch, evenly spread."""
SHARES = tuple(1 - 0.05 * i for i in range(13))
"""Ends of the grid that are tried, as shares of the largest magnitude seen."""


@dataclass(slots=True)
class _Seen:
    """Values at one place."""

    signed: bool
    bits: int
    peak: float = 0.0
    sample: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        self.peak = max(self.peak, float(x.abs().max()))
        flat = x.flatten()
        self.sample.append(flat[:: max(1, len(flat) // SAMPLE)].clone())

    def grid(self) -> Grid:
        """The grid with the least squared error on the sample."""
        x = torch.cat(self.sample)
        grids = [
            Grid.up_to(self.peak * share, signed=self.signed, bits=self.bits) for share in SHARES
        ]
        errors = [float((fake_quant.snap(x, g) - x).square().sum()) for g in grids]
        return grids[errors.index(min(errors))]


class _Watch(fx.Interpreter):
    """Looks at the values at all places while the float model runs."""

    def __init__(self, elastic: ElasticModel, bits: int) -> None:
        super().__init__(elastic.graph)
        self.bits = bits
        self.seen: dict[str, _Seen] = {}
        self.reading = {site for snap in elastic.snaps.values() for site in snap.readers}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if isinstance(module, Snap):
            self.seen.setdefault(module.name, _Seen(module.signed, self.bits)).add(args[0])
        elif isinstance(module, ElasticConv) and module.site.name in self.reading:
            for factor, value in module.inner(args[0]).items():
                place = f"{module.site.name}:{factor}"
                self.seen.setdefault(place, _Seen(True, self.bits)).add(value)
        return super().call_module(target, args, kwargs)


def fit_grids(
    elastic: ElasticModel, batches: Sequence[tuple[Tensor, ...]], bits: int = 8
) -> dict[str, Grid]:
    """Grids for `ElasticModel.set_grids`, from the float model's own activations.

    Args:
        elastic: The model, with the factors that profiles will use.
        batches: Flat inputs, as the graph takes them.
        bits: Of the codes: what the target's convolutions ask for.

    Raises:
        T3CError: An activation is not finite.
    """
    watch = _Watch(elastic, bits)
    with torch.no_grad(), elastic.using(None):
        for batch in batches:
            watch.run(*batch)
    for name, seen in watch.seen.items():
        if not seen.peak < float("inf"):
            raise T3CError(
                f"activations at {name!r} are not finite on the calibration data; check the "
                "batches, then the model"
            )
    return {name: seen.grid() for name, seen in watch.seen.items()}
