"""Run a graph once and keep every value; then re-run only what depends on one site."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from t3c.core.sites import LinearSite, Site
from t3c.elastic.layer import ElasticLayer
from t3c.elastic.model import ElasticModel
from t3c.passes.nodes import dependents

EFFECTIVE_ROWS = 16
"""So many rows with gradients are trusted half in the directions that they show."""


class Suffix:
    """Interprets the graph of an elastic model with the values of the original model at hand.

    Attributes:
        calls: Site name -> the nodes that call it, in graph order.
    """

    def __init__(self, elastic: ElasticModel) -> None:
        """Find the calls of every site and what depends on them.

        Args:
            elastic: The model; formats are chosen outside, by `elastic.using`.
        """
        self.elastic = elastic
        self.graph = elastic.graph
        self.calls = site_calls(elastic)
        order = {node: i for i, node in enumerate(self.graph.graph.nodes)}
        self._after = {
            site: sorted(dependents(nodes), key=order.__getitem__)
            for site, nodes in self.calls.items()
        }
        self._values: dict[fx.Node, Any] = {}
        self._original: list[Tensor] = []
        self._slopes: dict[fx.Node, Tensor] = {}

    def load(self, batch: Sequence[Tensor]) -> None:
        """Run the original float model on one batch and keep every value."""
        runner = fx.Interpreter(self.graph, garbage_collect_values=False)
        with torch.no_grad(), self.elastic.using(None):
            result = runner.run(*batch)
        self._values = runner.env
        self._slopes = {}
        self._original = list(floats(result))

    def twin(self) -> "Suffix":
        """One with formats and nodes of its own, for another thread; give it values by `follow`."""
        return Suffix(self.elastic.twin())

    def follow(self, other: "Suffix") -> None:
        """Take over the values and gradients that a twin has loaded."""
        pairs = list(zip(self.graph.graph.nodes, other.graph.graph.nodes, strict=True))
        self._values = {mine: other._values[its] for mine, its in pairs if its in other._values}
        self._slopes = {mine: other._slopes[its] for mine, its in pairs if its in other._slopes}
        self._original = other._original

    def energy(self) -> float:
        """Squared norm of the original outputs of the loaded batch."""
        return sum(float(y.double().square().sum()) for y in self._original)

    def weigh(self, slopes: Mapping[fx.Node, Sequence[Tensor]]) -> None:
        """Let `local` weigh errors by gradients at the outputs of sites, for the loaded batch.

        Args:
            slopes: Call of a site -> gradients of random projections of the model's outputs.
        """
        self._slopes = {node: torch.stack(list(found)) for node, found in slopes.items() if found}

    def local(self, site: str) -> float:
        """Damage of the formats in force as the site's own output errors tell it.

        To first order, rows taken as independent: sum (g . error)^2 over the rows, relative to the
        energy of the model's outputs. Without gradients, the relative squared error of the site.
        """
        runner = self._runner()
        error = energy = damage = 0.0
        with torch.no_grad():
            for node in self.calls[site]:
                result = runner.run_node(node)
                error += _squared(result, self._values[node])
                energy += float(self._values[node].double().square().sum())
                if node in self._slopes:
                    off = rows_of(self.elastic.sites[site], result - self._values[node])
                    back = [rows_of(self.elastic.sites[site], g) for g in self._slopes[node]]
                    damage += _first_order(off, torch.stack(back))
        if damage > 0 and math.isfinite(damage):
            return damage / self.energy()
        return error / energy if energy > 0 else 0.0

    def drift(self, site: str) -> float:
        """Squared error of the model's outputs when only `site` is in another format."""
        runner = self._runner()
        result = None
        with torch.no_grad():
            for node in self._after[site]:
                result = runner.run_node(node)
                runner.env[node] = result
        if not self._after[site] or self._after[site][-1].op != "output":
            return 0.0
        return sum(
            _squared(new, old) for new, old in zip(floats(result), self._original, strict=True)
        )

    def values(self) -> Mapping[fx.Node, Any]:
        """Every value of the loaded batch."""
        return self._values

    def _runner(self) -> fx.Interpreter:
        runner = fx.Interpreter(self.graph, garbage_collect_values=False)
        runner.env = dict(self._values)
        return runner


def site_calls(elastic: ElasticModel) -> dict[str, list[fx.Node]]:
    """Site name -> nodes that call its elastic module, in graph order."""
    calls: dict[str, list[fx.Node]] = {name: [] for name in elastic.sites}
    for node in elastic.graph.graph.nodes:
        if node.op == "call_module":
            layer = elastic.graph.get_submodule(str(node.target))
            if isinstance(layer, ElasticLayer):
                calls[layer.site.name].append(node)
    return calls


def floats(result: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a result, in order."""
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf


def rows_of(site: Site, value: Tensor) -> Tensor:
    """Inputs or outputs of a site as rows: [positions or pixels, features or channels]."""
    value = value if isinstance(site, LinearSite) else value.movedim(1, -1)
    return value.reshape(-1, value.shape[-1])


def _first_order(off: Tensor, slopes: Tensor) -> float:
    """Expected squared change of the outputs: errors [rows, n], gradients [probes, rows, n].

    Few effective rows tell too little about directions: there, all directions count alike.
    """
    size = slopes.square().sum(2)
    along = float((slopes * off).sum(2).square().sum())
    alike = float((size * off.square().sum(1)).sum()) / off.shape[1]
    spread = float(size.sum() ** 2 / size.square().sum().clamp_min(1e-30))
    trust = spread / (spread + EFFECTIVE_ROWS)
    return (trust * along + (1 - trust) * alike) / len(slopes)


def _squared(new: Tensor, old: Tensor) -> float:
    """||new - old||^2; infinite where the new value is not finite."""
    value = float((new.float() - old.float()).square().sum(dtype=torch.float64))
    return value if value == value else float("inf")
