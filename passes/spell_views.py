"""Reshapes become views, with a copy before them where strides need one."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, fx

from t3c.passes.base import AbstractPass, Log
from t3c.passes.nodes import aten, emit, is_call, on_meta, recompute, value_of


@final
@dataclass(frozen=True, slots=True)
class SpellViews(AbstractPass):
    """Say where data moves: exporters and importers know view and clone, not every reshape.

    Before: y = reshape(transpose(x, 1, 2), [2, 8])
    After:  y = view(clone(transpose(x, 1, 2)), [2, 8])
    """

    name: ClassVar[str] = "spell-views"

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Work out strides again from the inputs on, then respell."""
        for node in list(gm.graph.nodes):
            if node.op == "placeholder":
                node.meta["val"] = torch.empty_like(value_of(node))
            elif node.op == "call_function":
                if is_call(node, aten.reshape.default):
                    _respell(gm, node)
                recompute(node)


def _respell(gm: fx.GraphModule, node: fx.Node) -> None:
    source, shape = node.args[:2]
    if _viewable(value_of(source), shape):  # type: ignore[arg-type]
        node.target = aten.view.default
        return
    with gm.graph.inserting_before(node):
        copy = emit(gm.graph, aten.clone.default, source, memory_format=torch.contiguous_format)
    node.target = aten.view.default
    node.args = (copy, shape)


def _viewable(value: Tensor, shape: list[int]) -> bool:
    try:
        on_meta(value).view(shape)
    except RuntimeError:
        return False
    return True
