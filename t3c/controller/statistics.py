"""Mean and variance of normalized channels, brought back to the original's in every profile.

A batch norm that is folded into a convolution has the statistics of the original network; cut
ranks change what comes in. Each profile gets a gain and a shift of its own for every channel.
Source: Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques", 2019
(statistics for each width after training), here as an affine map of the folded convolution.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from t3c.controller.suffix import site_calls
from t3c.controller.work import peak_bytes
from t3c.core.codes import Correction
from t3c.core.errors import T3CError
from t3c.core.formats import Dense, Format
from t3c.elastic.conv import ElasticConv
from t3c.elastic.model import ElasticModel

GAINS = (0.5, 2.0)
"""Least and largest gain: beyond them a channel is lost, not scaled."""
LEAST_VALUES = 256
"""Values of a channel that its mean and variance need; sites with fewer stay as they are."""
MOST_BYTES = 1 << 30
"""Of activations held at once; fewer batches are taken where they are larger."""
FLAT = 1e-6
"""A standard deviation below this share of the mean magnitude counts as none."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of one site's outputs.

    Attributes:
        mean: [out] float64.
        deviation: [out] float64, standard deviation.
        count: Values of one channel.
    """

    mean: Tensor
    deviation: Tensor
    count: int

    @classmethod
    def of(cls, outputs: Sequence[Tensor]) -> "Statistics":
        """Of outputs [batch, out, height, width]."""
        rows = torch.cat([y.transpose(0, 1).flatten(1) for y in outputs], 1).double()
        return cls(rows.mean(1), rows.std(1, correction=0), rows.shape[1])


def normalized_sites(elastic: ElasticModel) -> dict[fx.Node, ElasticConv]:
    """Call -> layer of the convolutions to correct: a batch norm folded in, and called once."""
    calls = site_calls(elastic)
    return {
        calls[name][0]: layer
        for name, layer in elastic.layers.items()
        if isinstance(layer, ElasticConv) and layer.site.normalized and len(calls[name]) == 1
    }


def correct(
    elastic: ElasticModel,
    choices: Iterable[Mapping[str, Format]],
    batches: Sequence[tuple[Tensor, ...]],
    seconds: float = math.inf,
) -> int:
    """Estimate and set the corrections of each choice of formats that cuts any rank.

    Args:
        elastic: The model, with its final factors and grids.
        choices: Site name -> format, each.
        batches: Flat inputs, as the graph takes them; clean calibration data.
        seconds: About as long as this may take; fewer batches are used where all take longer.

    Returns:
        How many batches were used; 0: there was nothing to correct.

    Raises:
        T3CError: Outputs are not finite.
    """
    choices = [dict(c) for c in choices if any(not isinstance(f, Dense) for f in c.values())]
    if not choices or not normalized_sites(elastic):
        return 0
    used = batches[: _affordable(elastic, choices, batches, seconds)]
    with torch.no_grad():
        want = _original(elastic, used)
        for formats in choices:
            elastic.set_corrections(formats, estimate(elastic, formats, used, want))
    return len(used)


def _affordable(
    elastic: ElasticModel,
    choices: Sequence[Mapping[str, Format]],
    batches: Sequence[tuple[Tensor, ...]],
    seconds: float,
) -> int:
    """As many batches as memory and time allow, at least one."""
    runner = fx.Interpreter(elastic.graph, garbage_collect_values=False)
    begun = time.monotonic()
    with torch.no_grad(), elastic.using(choices[-1]):
        runner.run(*batches[0])
    each = (time.monotonic() - begun) * (len(choices) + 1)
    most = MOST_BYTES / max(1, peak_bytes(elastic.graph, runner.env))
    return max(1, int(min(len(batches), most, seconds / each)))


class _Watch(fx.Interpreter):
    """Keeps the statistics of normalized sites while the original runs, batch after batch."""

    def __init__(self, elastic: ElasticModel) -> None:
        super().__init__(elastic.graph)
        self.sites = normalized_sites(elastic)
        self.seen: dict[str, list[Statistics]] = {}

    def run_node(self, n: fx.Node) -> Any:
        y = super().run_node(n)
        if n in self.sites:
            self.seen.setdefault(self.sites[n].site.name, []).append(Statistics.of([y]))
        return y


def _original(
    elastic: ElasticModel, batches: Sequence[tuple[Tensor, ...]]
) -> dict[str, Statistics]:
    """Site name -> statistics in the original float network."""
    watch = _Watch(elastic)
    with elastic.using(None):
        for batch in batches:
            watch.run(*batch)
    return {name: _pooled(parts) for name, parts in watch.seen.items()}


def _pooled(parts: Sequence[Statistics]) -> Statistics:
    """Of all batches together."""
    counts = torch.tensor([float(p.count) for p in parts], dtype=torch.float64)
    share = (counts / counts.sum())[:, None]
    means = torch.stack([p.mean for p in parts])
    mean = (share * means).sum(0)
    spread = torch.stack([p.deviation for p in parts]).square() + (means - mean).square()
    return Statistics(mean, (share * spread).sum(0).sqrt(), int(counts.sum()))


def estimate(
    elastic: ElasticModel,
    formats: Mapping[str, Format],
    batches: Sequence[tuple[Tensor, ...]],
    want: Mapping[str, Statistics],
) -> dict[str, Correction]:
    """Corrections front to back: each site is measured behind the corrected ones before it.

    Args:
        elastic: The model.
        formats: Site name -> format.
        batches: Flat inputs, as the graph takes them; all are run side by side.
        want: Site name -> statistics that its outputs shall have.

    Returns:
        Site name -> gain and bias; without sites that see fewer than LEAST_VALUES values.

    Raises:
        T3CError: Outputs are not finite.
    """
    runners = [fx.Interpreter(elastic.graph) for _ in batches]
    for runner, batch in zip(runners, batches, strict=True):
        runner.args_iter = iter(batch)
    sites = normalized_sites(elastic)
    found: dict[str, Correction] = {}
    with torch.no_grad(), elastic.using(formats):
        for layer in sites.values():
            layer.correction = None  # `using` brings back what was there
        for node in elastic.graph.graph.nodes:
            if node.op == "output":
                break
            values = [runner.run_node(node) for runner in runners]
            if node in sites and want[sites[node].site.name].count >= LEAST_VALUES:
                layer = sites[node]
                name = layer.site.name
                gain, shift = _affine(name, Statistics.of(values), want[name])
                bias = torch.zeros_like(shift) if layer.bias is None else layer.bias.detach()
                found[name] = Correction(gain.numpy(), (gain * bias + shift).numpy())
                values = [y * gain[:, None, None] + shift[:, None, None] for y in values]
            for runner, value in zip(runners, values, strict=True):
                runner.env[node] = value
                for dead in runner.user_to_last_uses.get(node, []):
                    del runner.env[dead]
    return found


def _affine(name: str, seen: Statistics, want: Statistics) -> tuple[Tensor, Tensor]:
    """Gain and shift, float32 [out], that map the one's mean and variance to the other's."""
    if not (seen.deviation.isfinite().all() and want.deviation.isfinite().all()):
        raise T3CError(
            f"outputs of {name!r} are not finite on the calibration data; check the batches, then "
            "the model"
        )
    least = FLAT * (seen.mean.abs() + want.mean.abs() + 1e-30)
    flat = (seen.deviation <= least) | (want.deviation <= least)
    ratio = want.deviation / seen.deviation.clamp_min(1e-30)
    gain = torch.where(flat, torch.ones_like(ratio), ratio.clamp(*GAINS)).float()
    return gain, (want.mean - gain.double() * seen.mean).float()
