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
    """

    name: ClassVar[str] = "place-grids"
    make: MakeSnap

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Place one module after each source."""
        calls: dict[str, list[fx.Node]] = {}
        sites: dict[fx.Node, str] = {}
        for node in gm.graph.nodes:
            if node.op == "call_module":
                site = getattr(gm.get_submodule(str(node.target)), "site", None)
                if isinstance(site, ConvSite):
                    calls.setdefault(site.name, []).append(node)
                    sites[node] = site.name
        readers: dict[fx.Node, list[str]] = {}
        for node, name in sites.items():
            if len(calls[name]) == 1:  # a shared layer has an input for every call
                readers.setdefault(_source(node.args[0]), []).append(name)
        if readers:
            gm.add_module("grids", nn.Module())
        for source, names in readers.items():
            place = str(source.name)
            gm.add_submodule(f"grids.{place}", self.make(place, tuple(names), _signed(source)))
            with gm.graph.inserting_after(source):
                new = gm.graph.call_module(f"grids.{place}", (source,))
            new.meta = dict(source.meta)
            source.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)


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
