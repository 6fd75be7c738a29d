"""Which linear sites read the same tensor."""

import torch
from torch import fx

from t3c.core.sites import LinearSite
from t3c.elastic.layer import ElasticLayer
from t3c.elastic.model import ElasticModel

_aten = torch.ops.aten
_VIEWS = frozenset(
    {_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.detach.default,
     _aten.alias.default, _aten.clone.default, _aten.contiguous.default}
)  # fmt: skip
"""What leaves rows as they are, if it leaves their length."""


def same_input(elastic: ElasticModel) -> list[tuple[str, ...]]:
    """Groups of two and more linear sites whose input is one tensor, in graph order.

    Sites that the graph calls more than once are in no group: their calls read different tensors.

    Before: q = sites.q(h); k = sites.k(h.view(-1, 64)); v = sites.v(h)
    After:  [("q", "k", "v")]
    """
    found: dict[fx.Node, list[str]] = {}
    calls: dict[str, int] = {}
    for node in elastic.graph.graph.nodes:
        if node.op != "call_module":
            continue
        layer = elastic.graph.get_submodule(str(node.target))
        if isinstance(layer, ElasticLayer) and isinstance(layer.site, LinearSite):
            calls[layer.site.name] = calls.get(layer.site.name, 0) + 1
            found.setdefault(_source(node.all_input_nodes[0]), []).append(layer.site.name)
    groups = [tuple(n for n in names if calls[n] == 1) for names in found.values()]
    return [names for names in groups if len(names) > 1]


def _source(node: fx.Node) -> fx.Node:
    """The node whose rows a view passes on."""
    while node.op == "call_function" and node.target in _VIEWS:
        before = node.all_input_nodes[0]
        if _width(before) != _width(node):
            break
        node = before
    return node


def _width(node: fx.Node) -> int | None:
    """Length of the rows that a node gives; None where it is not known."""
    value = node.meta.get("val")
    return int(value.shape[-1]) if isinstance(value, torch.Tensor) and value.dim() else None
