"""Compute once what depends on no input."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from t3c.passes.base import AbstractPass, Log
from t3c.passes.nodes import add_constant, at_top, aten, constant, is_call, value_of

_WEIGHT_READERS = (
    aten.linear.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.convolution.default,
)


@final
@dataclass(frozen=True, slots=True)
class FoldConstants(AbstractPass):
    """Replace every subgraph that reads no input by its value.

    Before: m = ge(unsqueeze(arange(8), 1), unsqueeze(arange(8), 0))
    After:  m = get_attr "folded_ge"

    A value larger than `max_bytes` stays a computation unless it is smaller than what it is
    computed from, and broadcasts stay broadcasts. What is folded away is not trained any more.
    """

    name: ClassVar[str] = "fold-constants"
    max_bytes: int = 16 << 20

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Evaluate, then store what the rest of the graph reads."""
        values: dict[fx.Node, Any] = {}
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                found = constant(gm, node)
                if found is not None:
                    values[node] = found
            elif _pure(node) and all(n in values for n in node.all_input_nodes):
                if self._fits(node):
                    args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
                    with torch.no_grad():
                        values[node] = node.target(*args, **kwargs)
        for node in reversed(list(gm.graph.nodes)):
            if node.op != "call_function" or node not in values:
                continue
            value = values[node]
            read = any(user not in values for user in node.users)
            grown = is_call(node, aten.expand.default)
            if not isinstance(value, Tensor) or (read and grown):
                del values[node]
            elif read:
                _store(gm, node, value)
        gm.graph.eliminate_dead_code()

    def _fits(self, node: fx.Node) -> bool:
        val = node.meta.get("val")
        if not isinstance(val, Tensor):
            return True
        if is_call(node, aten.expand.default):
            return True  # a view; never stored
        size = val.numel() * val.element_size()
        given = sum(_size(n) for n in node.all_input_nodes)
        return size <= max(self.max_bytes, given)


def _size(node: fx.Node) -> int:
    val = node.meta.get("val")
    return val.numel() * val.element_size() if isinstance(val, Tensor) else 0


def _pure(node: fx.Node) -> bool:
    """Whether a call gives the same value each time and can be evaluated here."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, OpOverload):
        return node.target.__module__ in ("_operator", "operator", "math")
    schema = node.target._schema  # pyright: ignore[reportPrivateUsage]
    tags = node.target.tags
    return (
        not schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in tags
        and node.target.namespace == "aten"
        and "empty" not in str(node.target)
    )


def _store(gm: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """Put the value where the rest of the graph can read it, named after its place."""
    where = str(node.meta.get("path", ""))
    name = f"{where}.folded_{node.name}" if where else f"folded_{node.name}"
    trained = False
    for user in node.users:
        if is_call(user, *_WEIGHT_READERS) and len(user.args) > 1 and user.args[1] is node:
            owner = str(user.meta.get("path", ""))
            name, trained = (f"{owner}.weight" if owner else "weight"), True
    with at_top(gm):
        new = add_constant(gm, name, value.clone().contiguous(), parameter=trained)
    new.meta["val"] = value_of(new)
    node.replace_all_uses_with(new)
