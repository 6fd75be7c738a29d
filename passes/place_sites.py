"""Elastic modules become placeholders of kernels."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import fx

from t3c.core.sites import ConvSite, LinearSite
from t3c.passes.base import AbstractPass, Log
from t3c.passes.nodes import emit, replace, shape_of
from t3c.passes.torch_ops import SITE_CONV, SITE_LINEAR


@final
@dataclass(frozen=True, slots=True)
class PlaceSites(AbstractPass):
    """Replace calls of elastic modules by placeholder operators that name the site.

    Before: y = sites.fc1(x)
    After:  y = t3c.site_linear(x, None, "fc1", "", n)
    """

    name: ClassVar[str] = "place-sites"

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Replace all of them."""
        for node in list(gm.graph.nodes):
            if node.op != "call_module":
                continue
            site = getattr(gm.get_submodule(str(node.target)), "site", None)
            with gm.graph.inserting_before(node):
                if isinstance(site, LinearSite):
                    new = emit(gm.graph, SITE_LINEAR, node.args[0], None, site.name, "", site.n)
                elif isinstance(site, ConvSite):
                    shape = list(shape_of(node))
                    new = emit(gm.graph, SITE_CONV, node.args[0], None, site.name, "", shape)
                else:
                    raise TypeError(f"module {node.target!r} is no elastic site")
            new.meta = {**node.meta, **new.meta}
            replace(node, new)
