"""Places where activations of convolutions are rounded to a fixed grid."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import fx, nn

from t3c.core.sites import ConvSite
from t3c.passes.base import AbstractPass, Log
from t3c.passes.nodes import argument, as_node, aten, is_call, result_of
from t3c.passes.sites import MakeSnap

_POOLS = (aten.max_pool2d.default, aten.max_pool2d_with_indices.default)
_NOT_NEGATIVE = (aten.relu.default, aten.relu_.default, aten.sigmoid.default)
_CLAMPS = (aten.hardtanh.default, aten.clamp.default)


@final
@dataclass(frozen=True, slots=True)
class PlaceGrids(AbstractPass):
    """Round each input of an elastic convolution where it is made, for all its readers at once.

    A maximum over values of a grid lies on the grid, so the place moves up through max pooling.

    Before: y = sites.conv2(max_pool2d(relu(x)));                z = y + relu(x)
    After:  r = grids.relu(relu(x)); y = sites.conv2(max_pool2d(r)); z = y + r

    Of two convolutions that are added, the later one is rounded too: the earlier one's kernel reads
    it as its residual.
    """

    name: ClassVar[str] = "place-grids"
    make: MakeSnap

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Place one module after each source."""
        sites = _single_calls(gm)
        readers: dict[fx.Node, list[str]] = {}
        for node, name in sites.items():
            readers.setdefault(_source(node.args[0]), []).append(name)
        around = {source: tuple(names) for source, names in readers.items()}
        for node in gm.graph.nodes:
            pair = [sites.get(as_node(a)) for a in node.args[:2]] if _adds(node) else []
            if len(pair) == 2 and None not in pair:
                order = list(sites)
                last = max(node.all_input_nodes, key=order.index)
                around.setdefault(last, tuple(str(name) for name in pair))
        if around:
            gm.add_module("grids", nn.Module())
        for source, needed in around.items():
            place, reading = str(source.name), tuple(readers.get(source, ()))
            gm.add_submodule(f"grids.{place}", self.make(place, _signed(source), reading, needed))
            with gm.graph.inserting_after(source):
                new = gm.graph.call_module(f"grids.{place}", (source,))
            new.meta = dict(source.meta)
            for user in [u for u in source.users if u is not new]:
                user.replace_input_with(source, new)


def _single_calls(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """Calls of convolution sites that are called once: a shared one has an input for every call."""
    calls: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            site = getattr(gm.get_submodule(str(node.target)), "site", None)
            if isinstance(site, ConvSite):
                calls.setdefault(site.name, []).append(node)
    return {nodes[0]: name for name, nodes in calls.items() if len(nodes) == 1}


def _adds(node: fx.Node) -> bool:
    """Whether a node adds two values that nobody else reads."""
    return (
        is_call(node, aten.add.Tensor)
        and len(node.all_input_nodes) == 2
        and all(len(source.users) == 1 for source in node.all_input_nodes)
    )


def _source(node: object) -> fx.Node:
    """Where a value is made, max pooling left out."""
    node = as_node(node)
    if is_call(node, _POOLS[0]):
        return _source(node.args[0])
    origin = node.args[0] if node.args else None
    if is_call(origin, _POOLS[1]) and isinstance(origin, fx.Node) and result_of(origin) is node:
        return _source(origin.args[0])
    return node


def _signed(source: fx.Node) -> bool:
    """Whether negative values can occur."""
    if is_call(source, *_CLAMPS):
        low = argument(source, 1, "min", -1.0)
        return not (isinstance(low, int | float) and low >= 0)
    return not is_call(source, *_NOT_NEGATIVE)
