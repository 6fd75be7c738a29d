"""Elastic modules become placeholders of kernels."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from t3c.core.grid import Grid
from t3c.core.sites import ConvSite, LinearSite
from t3c.passes.base import AbstractPass, Log
from t3c.passes.nodes import add_constant, as_node, aten, emit, replace, shape_of
from t3c.passes.torch_ops import SITE_CONV, SITE_LINEAR, SNAP


@final
@dataclass(frozen=True, slots=True)
class PlaceSites(AbstractPass):
    """Replace calls of elastic modules by placeholder operators that name the site.

    Before: y = sites.conv(grids.relu(x))
    After:  y = t3c.site_conv(t3c.snap(x, "relu", 0.02, False, 8), None, "conv", "", shape)

    A place without a grid disappears. Rows of a table are its codes times the scales of the rows.
    """

    name: ClassVar[str] = "place-sites"

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Replace all of them."""
        for node in list(gm.graph.nodes):
            if node.op != "call_module":
                continue
            module: Any = gm.get_submodule(str(node.target))
            site, grid = getattr(module, "site", None), getattr(module, "grid", None)
            x = as_node(node.args[0])
            with gm.graph.inserting_before(node):
                if isinstance(site, LinearSite):
                    new = emit(gm.graph, SITE_LINEAR, x, None, site.name, "", site.n)
                elif isinstance(site, ConvSite):
                    new = emit(gm.graph, SITE_CONV, x, None, site.name, "", list(shape_of(node)))
                elif isinstance(grid, Grid):
                    fields = (grid.scale, grid.signed, grid.bits)
                    new = emit(gm.graph, SNAP, x, str(module.name), *fields)
                elif hasattr(module, "table_codes"):
                    new = _look_up(gm, str(node.target), module.table_codes(), x)
                elif hasattr(module, "readers"):
                    replace(node, x)
                    continue
                else:
                    raise TypeError(f"module {node.target!r} is no elastic site")
            new.meta = {**node.meta, **new.meta}
            replace(node, new)


def _look_up(
    gm: fx.GraphModule, name: str, codes: tuple[Tensor, Tensor], indices: fx.Node
) -> fx.Node:
    """Rows of int8 codes times their scales, at the insertion point."""
    rows, scales = (
        emit(
            gm.graph,
            aten.embedding.default,
            add_constant(gm, f"{name}_{part}", value, parameter=False),
            indices,
        )
        for part, value in zip(("codes", "scales"), codes, strict=True)
    )
    floats = emit(gm.graph, aten._to_copy.default, rows, dtype=torch.float32)
    return emit(gm.graph, aten.mul.Tensor, floats, scales)
