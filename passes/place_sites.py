"""Elastic modules become placeholders of kernels."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import fx

from t3c.core.grid import Grid
from t3c.core.sites import ConvSite, LinearSite
from t3c.passes.base import AbstractPass, Log
from t3c.passes.nodes import as_node, emit, replace, shape_of
from t3c.passes.torch_ops import SITE_CONV, SITE_LINEAR, SNAP


@final
@dataclass(frozen=True, slots=True)
class PlaceSites(AbstractPass):
    """Replace calls of elastic modules by placeholder operators that name the site.

    Before: y = sites.conv(grids.relu(x))
    After:  y = t3c.site_conv(t3c.snap(x, "relu", 0.02, False), None, "conv", "", shape)

    A place without a grid disappears.
    """

    name: ClassVar[str] = "place-sites"

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Replace all of them."""
        for node in list(gm.graph.nodes):
            if node.op != "call_module":
                continue
            module = gm.get_submodule(str(node.target))
            site, grid = getattr(module, "site", None), getattr(module, "grid", None)
            x = as_node(node.args[0])
            with gm.graph.inserting_before(node):
                if isinstance(site, LinearSite):
                    new = emit(gm.graph, SITE_LINEAR, x, None, site.name, "", site.n)
                elif isinstance(site, ConvSite):
                    new = emit(gm.graph, SITE_CONV, x, None, site.name, "", list(shape_of(node)))
                elif isinstance(grid, Grid):
                    new = emit(gm.graph, SNAP, x, str(module.name), grid.scale, grid.signed)
                elif hasattr(module, "readers"):
                    replace(node, x)
                    continue
                else:
                    raise TypeError(f"module {node.target!r} is no elastic site")
            new.meta = {**node.meta, **new.meta}
            replace(node, new)
