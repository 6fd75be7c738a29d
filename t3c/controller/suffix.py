"""Run a graph once and keep every value; then re-run only what depends on one site."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from t3c.elastic.layer import ElasticLayer
from t3c.elastic.model import ElasticModel


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
            site: sorted(_dependents(nodes), key=order.__getitem__)
            for site, nodes in self.calls.items()
        }
        self._values: dict[fx.Node, Any] = {}
        self._original: list[Tensor] = []

    def load(self, batch: Sequence[Tensor]) -> None:
        """Run the original float model on one batch and keep every value."""
        runner = fx.Interpreter(self.graph, garbage_collect_values=False)
        with torch.no_grad(), self.elastic.using(None):
            result = runner.run(*batch)
        self._values = runner.env
        self._original = list(floats(result))

    def energy(self) -> float:
        """Squared norm of the original outputs of the loaded batch."""
        return sum(float(y.double().square().sum()) for y in self._original)

    def local(self, site: str) -> float:
        """Relative squared error of the site's own outputs under the formats in force."""
        runner = self._runner()
        error = energy = 0.0
        with torch.no_grad():
            for node in self.calls[site]:
                error += _squared(runner.run_node(node), self._values[node])
                energy += float(self._values[node].double().square().sum())
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


def _squared(new: Tensor, old: Tensor) -> float:
    """||new - old||^2; infinite where the new value is not finite."""
    value = float((new.float() - old.float()).square().sum(dtype=torch.float64))
    return value if value == value else float("inf")


def _dependents(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes and everything that uses them, directly or not."""
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.users)
    return seen
