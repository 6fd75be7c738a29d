"""What part a site has in its network, told by the graph around it and never by its name."""

import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import fx

from t3c.core.sites import ConvSite, LinearSite
from t3c.elastic.layer import ElasticLayer
from t3c.elastic.model import ElasticModel

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_PARTS = ("query", "key", "value")
ROLES = (
    *_PARTS, "qkv", "attention-output", "up", "down", "hidden", "stem", "head", "pointwise", "conv",
    "other",
)  # fmt: skip
"""Of linear layers: those that attention reads (`qkv`: one layer for several), the one that reads
attention, those before and after the nonlinearity of a block, and both at once. Of any: the first
from the inputs, the last before the outputs. Of convolutions: 1x1, and wider ones."""


def roles(elastic: ElasticModel) -> dict[str, str]:
    """Site name -> one of `ROLES`, in graph order; a site that is called twice has its first's."""
    calls: dict[str, fx.Node] = {}
    for node in elastic.graph.graph.nodes:
        if (layer := _layer(elastic, node)) is not None:
            calls.setdefault(layer.site.name, node)
    return {name: _role(elastic, node) for name, node in calls.items()}


def matching(elastic: ElasticModel, wanted: Sequence[str]) -> frozenset[str]:
    """Sites of some roles, or whose paths match some globs.

    Raises:
        ValueError: One that no site has or matches; the message lists the roles that there are.
    """
    known = roles(elastic)
    found: set[str] = set()
    for text in wanted:
        some = {name for name, role in known.items() if role == text or fnmatchcase(name, text)}
        if not some:
            there = ", ".join(f"{role} ({n})" for role, n in Counter(known.values()).items())
            raise ValueError(
                f"keep names {text!r}, which is no layer's role or path; roles here are {there}"
            )
        found |= some
    return frozenset(found)


def alike(elastic: ElasticModel) -> list[tuple[str, ...]]:
    """Groups of sites of one role and one shape; every site is in one of them."""
    known, found = roles(elastic), dict[tuple[str, object], list[str]]()
    for name, site in elastic.sites.items():
        found.setdefault((known[name], _shape(site)), []).append(name)
    return [tuple(names) for names in found.values()]


def _shape(site: LinearSite | ConvSite) -> object:
    if isinstance(site, LinearSite):
        return site.n, site.k, site.rows
    return site.out_channels, site.in_channels, site.kernel, site.stride, site.in_size


def _role(elastic: ElasticModel, call: fx.Node) -> str:
    layer = _layer(elastic, call)
    assert layer is not None
    parts = {
        _PARTS[place]
        for before, node in _after(elastic, call)
        if node.target is _ATTENTION
        for place in range(3)
        if node.args[place] is before
    }
    if parts:
        return parts.pop() if len(parts) == 1 else "qkv"
    reads, read = list(_before(elastic, call)), [node for _, node in _after(elastic, call)]
    if any(node.target is _ATTENTION for node in reads):
        return "attention-output"
    if any(node.op == "output" for node in read):
        return "head"
    if any(node.op == "placeholder" for node in reads):
        return "stem"
    if isinstance(layer.site, ConvSite):
        return "pointwise" if layer.site.pointwise else "conv"
    after = any(_layer(elastic, node) is not None for node in read)
    before = any(_layer(elastic, node) is not None for node in reads)
    return {(True, False): "up", (False, True): "down", (True, True): "hidden"}.get(
        (after, before), "other"
    )


def _after(elastic: ElasticModel, call: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(node, reader) of everything that sees the call, up to sites, attention and sums."""
    queue, seen = [call], {call}
    while queue:
        node = queue.pop()
        for user in node.users:
            yield node, user
            if user not in seen and not _ends(elastic, user):
                seen.add(user)
                queue.append(user)


def _before(elastic: ElasticModel, call: fx.Node) -> Iterator[fx.Node]:
    """Everything that the call's input is made of, up to sites, attention and sums."""
    queue, seen = list(call.all_input_nodes), set[fx.Node]()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if not _ends(elastic, node):
            queue += node.all_input_nodes


def _ends(elastic: ElasticModel, node: fx.Node) -> bool:
    """Whether another part of the network begins: a site, attention, or a residual's sum."""
    if node.target is _ATTENTION or _layer(elastic, node) is not None:
        return True
    return node.target in _SUMS and len(_data(node.all_input_nodes)) > 1


_SUMS = {torch.ops.aten.add.Tensor, operator.add}


def _data(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Those that are no constants."""
    return [node for node in nodes if node.op != "get_attr"]


def _layer(elastic: ElasticModel, node: fx.Node) -> ElasticLayer | None:
    if node.op != "call_module":
        return None
    found = elastic.graph.get_submodule(str(node.target))
    return found if isinstance(found, ElasticLayer) else None
