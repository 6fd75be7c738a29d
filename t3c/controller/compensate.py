"""Front to back: what a site sees behind compressed sites, beside what it saw in the original.

The original network and copies of it in reference formats walk the graph side by side, a node at a
time. Before a site runs, its caller may renew the site's factors from both inputs; the copies then
run with the new ones, so that every site answers for all errors before it.
Source: the sequential passes of GPTQ (arXiv 2210.17323) and SVD-LLM (arXiv 2403.07378), here with
the original inputs kept beside the compressed ones.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from t3c.controller.progress import Progress, silent
from t3c.controller.suffix import rows_of, site_calls
from t3c.core.formats import Format
from t3c.core.sites import Site
from t3c.elastic.model import ElasticModel

Batch = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """Inputs of one site in the original, x, and behind compressed sites, x'.

    Attributes:
        total: Sum of x' x'^T over rows of all references, [in, in].
        cross: Sum of x x'^T over the same rows; `total`, bit for bit, where x' = x.
        rows: How many rows.
    """

    total: Tensor
    cross: Tensor
    rows: int


def walk(
    elastic: ElasticModel,
    batches: Sequence[Batch],
    references: Sequence[Mapping[str, Format]],
    sites: Sequence[str],
    renew: Callable[[str, Pair], None],
    progress: Progress = silent,
    *,
    kept: Sequence[Mapping[str, Tensor]] | None = None,
    exact: bool = False,
) -> None:
    """Call `renew` at every one of `sites`, in the order of the graph.

    Args:
        elastic: The model; `renew` may replace factors of the site that it is told.
        batches: Flat inputs, as the graph takes them; all are run side by side.
        references: Site name -> format of the copies; sites left out are original.
        sites: Names of sites that are called once.
        renew: Told the site and its inputs.
        progress: Told before every site.
        kept: For each batch, site -> which rows of its inputs count, bool [rows]; None: all.
        exact: Whether the copies run on integers, as kernels do; else their ranks in float.
    """
    names = {nodes[0]: name for name, nodes in site_calls(elastic).items() if name in sites}
    layers = {
        node: elastic.layers[name] for name, nodes in site_calls(elastic).items() for node in nodes
    }
    copies = [None, *references]
    lanes = [[_Lane(elastic.graph, batch) for batch in batches] for _ in copies]
    done = 0
    with torch.no_grad(), elastic.using(None):
        for node in elastic.graph.graph.nodes:
            if node.op == "output":
                break
            if node in names:
                progress("compensating", done, len(sites))
                done += 1
                renew(names[node], _pair(lanes, node, elastic.sites[names[node]], kept))
            for formats, copy in zip(copies, lanes, strict=True):
                if node in layers:
                    layer = layers[node]
                    layer.state = ((formats or {}).get(layer.site.name), exact)
                for lane in copy:
                    lane.step(node)
    progress("compensating", len(sites), len(sites))


class _Lane(fx.Interpreter):
    """One batch in one copy, a node at a time."""

    def __init__(self, graph: fx.GraphModule, batch: Batch) -> None:
        super().__init__(graph)
        self.args_iter = iter(batch)

    def step(self, node: fx.Node) -> None:
        """Run a node and drop what nothing reads any more."""
        self.env[node] = self.run_node(node)
        for dead in self.user_to_last_uses.get(node, []):
            del self.env[dead]


def _pair(
    lanes: Sequence[Sequence[_Lane]],
    node: fx.Node,
    site: Site,
    kept: Sequence[Mapping[str, Tensor]] | None,
) -> Pair:
    """Second moments of the inputs of a site that is about to run."""

    def inputs(copy: Sequence[_Lane]) -> list[Tensor]:
        found = [rows_of(site, lane.env[node.all_input_nodes[0]]) for lane in copy]
        if kept is None:
            return found
        return [rows[of[site.name]] for rows, of in zip(found, kept, strict=True)]

    originals = inputs(lanes[0])
    width = originals[0].shape[1]
    total, cross = torch.zeros(width, width), torch.zeros(width, width)
    for copy in lanes[1:]:
        for x, y in zip(originals, inputs(copy), strict=True):
            own = y.T @ y
            total += own
            cross += own if torch.equal(x, y) else x.T @ y
    return Pair(total, cross, sum(len(x) for x in originals) * (len(lanes) - 1))
