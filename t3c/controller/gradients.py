"""What reaches the outputs: gradients of random projections of them, at every site."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from t3c.controller.suffix import floats, site_calls
from t3c.elastic.model import ElasticModel


@dataclass(frozen=True, slots=True)
class Seen:
    """One call of a site.

    Attributes:
        site: Its name.
        node: The call in the graph.
        x: Its input.
        y: Its output, bias and all.
        slopes: For each probe, the gradient at its output; none where no gradient arrives.
    """

    site: str
    node: fx.Node
    x: Tensor
    y: Tensor
    slopes: tuple[Tensor, ...]


def look(
    elastic: ElasticModel,
    batch: Sequence[Tensor],
    sites: Collection[str],
    seeds: Sequence[int],
) -> list[Seen]:
    """Run the original model on one batch; go back once for each random projection.

    Args:
        elastic: The model.
        batch: Flat inputs, as the graph takes them.
        sites: Sites of interest.
        seeds: One for each projection of all float outputs onto standard normal noise.
    """
    runner = _Recorder(elastic, sites)
    with torch.enable_grad(), elastic.using(None):
        outputs = [y for y in floats(runner.run(*batch)) if y.requires_grad]
        results = [y for _, _, y in runner.calls]
        found: list[Sequence[Tensor | None]] = []
        for i, seed in enumerate(seeds):
            random = torch.Generator().manual_seed(seed)
            probes = [torch.randn(y.shape, generator=random).to(y.dtype) for y in outputs]
            if outputs and results:
                found.append(
                    torch.autograd.grad(
                        outputs,
                        results,
                        probes,
                        allow_unused=True,
                        retain_graph=i + 1 < len(seeds),
                    )
                )
    names = {node: name for name, nodes in site_calls(elastic).items() for node in nodes}
    return [
        Seen(
            names[node],
            node,
            x,
            y.detach(),
            tuple(g for row in found if (g := row[at]) is not None),
        )
        for at, (node, x, y) in enumerate(runner.calls)
    ]


class _Recorder(fx.Interpreter):
    """Keeps input and output of sites, outputs as places where gradients arrive."""

    def __init__(self, elastic: ElasticModel, sites: Collection[str]) -> None:
        super().__init__(elastic.graph)
        calls: Mapping[str, list[fx.Node]] = site_calls(elastic)
        self.wanted = {node for name in sites for node in calls[name]}
        self.calls: list[tuple[fx.Node, Tensor, Tensor]] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run the node; keep it if it is a site."""
        result = super().run_node(n)
        if n in self.wanted:
            if not result.requires_grad:  # frozen parameters: gradients start here
                result.requires_grad_()
            self.calls.append((n, self.env[n.all_input_nodes[0]].detach(), result))
        return result
