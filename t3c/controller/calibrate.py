"""One look at calibration data: second moments at every site, then factors that fit the data."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from t3c.controller.progress import Progress, silent
from t3c.controller.suffix import site_calls
from t3c.core.errors import T3CError
from t3c.core.formats import CP, Format, LowRank, Tucker2
from t3c.core.registry import resolve
from t3c.core.sites import ConvSite, LinearSite, Site
from t3c.elastic.conv import ElasticConv
from t3c.elastic.factorize import FACTORIZATIONS
from t3c.elastic.factorize.base import AbstractFactorizer, Factors
from t3c.elastic.layer import ElasticLayer
from t3c.elastic.model import ElasticModel

Batch = tuple[Tensor, ...]
SIDE_MAX = 4096
"""Inputs of the widest site whose second moment is kept; wider ones keep the plain factors."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Second moment of the inputs of one site.

    Attributes:
        total: Sum of x x^T over rows (pixels for a convolution), [in, in] float32.
        rows: How many rows.
    """

    total: Tensor
    rows: int

    def __add__(self, other: "Moment") -> "Moment":
        """The moment of both sets of rows."""
        return Moment(self.total + other.total, self.rows + other.rows)

    def mean(self) -> Tensor:
        """E[x x^T], shrunk towards its mean diagonal where there are few rows for its width.

        The weight of the diagonal is width / (rows + width) / 20: 4 % of it after one image of 197
        patches in 768 dimensions, nothing after many.
        """
        width = len(self.total)
        mean = self.total / max(self.rows, 1)
        lift = 0.05 * width / (self.rows + width) * mean.diagonal().mean()
        return mean + lift * torch.eye(width)


def calibrate(
    elastic: ElasticModel,
    batches: Sequence[Batch],
    *,
    seconds: float | None = None,
    progress: Progress = silent,
) -> tuple[str, ...]:
    """Replace the plain factors of every site by factors that lose least on the data.

    Args:
        elastic: The model; its factors change, its dense weights do not.
        batches: Flat inputs, as the graph takes them; one batch is enough, more is better.
        seconds: Stop taking batches after this long (at least one is taken); None: all.
        progress: Told after every batch and every site.

    Returns:
        Sites that keep the plain factors, because their inputs are wider than `SIDE_MAX`.

    Raises:
        T3CError: No batches, or values that are not finite.
    """
    return factorize(
        elastic, collect(elastic, batches, seconds=seconds, progress=progress), progress
    )


def factorize(
    elastic: ElasticModel, moments: Mapping[str, Moment], progress: Progress = silent
) -> tuple[str, ...]:
    """Replace the plain factors of every site that has a moment; names of the other sites."""
    for done, (name, moment) in enumerate(moments.items()):
        progress("factorizing", done, len(moments))
        layer = elastic.layers[name]
        if kind_of(layer) is CP:  # its fit depends on the rank, which the layer chooses
            elastic.set_factors(name, moment=moment.mean())
        else:
            elastic.set_factors(name, _split(layer, moment))
    progress("factorizing", len(moments), len(moments))
    return tuple(name for name in elastic.sites if name not in moments)


def collect(
    elastic: ElasticModel,
    batches: Sequence[Batch],
    *,
    seconds: float | None = None,
    progress: Progress = silent,
) -> dict[str, Moment]:
    """Second moment of every site of the original model; sites wider than `SIDE_MAX` are left out.

    Raises:
        T3CError: No batches, or values that are not finite.
    """
    if not batches:
        raise T3CError("calibration needs at least one batch of inputs; got none")
    deadline = None if seconds is None else time.monotonic() + seconds
    runner = _Collector(elastic)
    for done, batch in enumerate(batches):
        progress("collecting statistics", done, len(batches))
        if done and deadline is not None and time.monotonic() > deadline:
            break
        with torch.no_grad(), elastic.using(None):
            runner.run(*batch)
    progress("collecting statistics", len(batches), len(batches))
    for name, moment in runner.moments.items():
        if not bool(moment.total.isfinite().all()):
            raise T3CError(
                f"site {name!r} sees inputs that are not finite on the calibration data; "
                "check the batches, then the model"
            )
    return runner.moments


def kind_of(layer: ElasticLayer) -> type[Format]:
    """The factorized format of a layer's profiles."""
    if isinstance(layer, ElasticConv) and not layer.site.pointwise:
        return CP if layer.kxk == "cp" else Tucker2
    return LowRank


def _split(layer: ElasticLayer, moment: Moment) -> Factors:
    """Factors in the metric of the inputs; the layer need not keep the moment."""
    found = resolve(FACTORIZATIONS, layer.factorizer(kind_of(layer)), "factorization", T3CError)
    return cast(AbstractFactorizer, found).split(layer.weight, moment.mean())


def width(site: Site) -> int:
    """Inputs of a site: features or channels."""
    match site:
        case LinearSite():
            return site.k
        case ConvSite():
            return site.in_channels


class _Collector(fx.Interpreter):
    """Runs the graph and adds up moments where sites are called."""

    def __init__(self, elastic: ElasticModel) -> None:
        super().__init__(elastic.graph)
        self.site_of = {
            node: elastic.sites[name]
            for name, nodes in site_calls(elastic).items()
            for node in nodes
            if width(elastic.sites[name]) <= SIDE_MAX
        }
        self.moments: dict[str, Moment] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run the node; look at its input if it is a site."""
        site = self.site_of.get(n)
        if site is not None:
            x = self.env[n.all_input_nodes[0]]
            rows = x if isinstance(site, LinearSite) else x.movedim(1, -1)
            rows = rows.reshape(-1, rows.shape[-1])
            moment = Moment(rows.T @ rows, len(rows))
            seen = self.moments.get(site.name)
            self.moments[site.name] = moment if seen is None else seen + moment
        return super().run_node(n)
