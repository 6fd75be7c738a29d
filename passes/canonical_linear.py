"""One spelling for linear layers: aten.linear with a weight [n, k]."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, fx

from t3c.passes.base import AbstractPass, Log
from t3c.passes.nodes import (
    add_constant,
    argument,
    at_top,
    aten,
    constant,
    emit,
    is_call,
    replace,
    shape_of,
)

_TURNS = (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default)
_PRODUCTS = (aten.mm.default, aten.matmul.default)


@final
@dataclass(frozen=True, slots=True)
class CanonicalLinear(AbstractPass):
    """Spell products with a constant matrix as aten.linear.

    Before: y = addmm(b, x, t(w));  y = mm(x, v);  y = matmul(x, v) + b
    After:  y = linear(x, w, b);    y = linear(x, v^T);  y = linear(x, v^T, b)

    A weight stored as [k, n] is stored again, transposed, under the name ``<name>_turned``.
    """

    name: ClassVar[str] = "canonical-linear"

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Respell every product with a constant matrix."""
        for node in list(gm.graph.nodes):
            if is_call(node, aten.addmm.default):
                bias, x, matrix = node.args[:3]
                plain = all(node.kwargs.get(k, 1) == 1 for k in ("alpha", "beta"))
                if plain and constant(gm, bias) is not None and len(shape_of(bias)) == 1:
                    self._respell(gm, node, x, matrix, bias)
            elif is_call(node, *_PRODUCTS) and len(shape_of(node.args[1])) == 2:
                x, matrix = node.args[:2]
                if len(shape_of(x)) >= 1:
                    self._respell(gm, node, x, matrix, None)
        for node in list(gm.graph.nodes):
            _absorb_bias(gm, node)

    def _respell(
        self,
        gm: fx.GraphModule,
        node: fx.Node,
        x: fx.Node,
        matrix: fx.Node,
        bias: fx.Node | None,
    ) -> None:
        weight = _weight(gm, matrix)
        if weight is None:
            return
        with gm.graph.inserting_before(node):
            new = emit(gm.graph, aten.linear.default, x, weight, *([] if bias is None else [bias]))
        new.meta = {**node.meta, **new.meta}
        replace(node, new)


def _weight(gm: fx.GraphModule, matrix: fx.Node) -> fx.Node | None:
    """The constant [n, k] whose transpose is `matrix`, stored anew if need be."""
    if is_call(matrix, *_TURNS):
        source = matrix.args[0]
        if constant(gm, source) is not None and shape_of(matrix) == shape_of(source)[::-1]:
            order = argument(matrix, 1, "dims", [1, 0])
            same = is_call(matrix, aten.permute.default) and list(order) == [0, 1]
            if not same and isinstance(source, fx.Node):
                return source
    value = constant(gm, matrix)
    if value is None:
        return None
    return _turned(gm, matrix, value)


def _turned(gm: fx.GraphModule, matrix: fx.Node, value: Tensor) -> fx.Node:
    """The transposed matrix, stored once and still known by the name of its origin."""
    origin = str(matrix.target)
    known: list[fx.Node] = [n for n in gm.graph.nodes if n.meta.get("owner") == origin]
    if known:
        return known[0]
    with at_top(gm):
        new = add_constant(gm, f"{origin}_turned", value.t().contiguous(), parameter=True)
    new.meta["owner"] = origin
    return new


def _absorb_bias(gm: fx.GraphModule, node: fx.Node) -> None:
    """linear(x, w) + b -> linear(x, w, b) for a constant vector b of n elements."""
    if not is_call(node, aten.add.Tensor) or node.kwargs.get("alpha", 1) != 1:
        return
    for product, bias in (node.args[:2], node.args[1::-1]):
        if (
            is_call(product, aten.linear.default)
            and isinstance(product, fx.Node)
            and argument(product, 2, "bias") is None
            and len(product.users) == 1
            and constant(gm, bias) is not None
            and shape_of(bias) == shape_of(product)[-1:]
        ):
            with gm.graph.inserting_before(node):
                new = emit(gm.graph, aten.linear.default, product.args[0], product.args[1], bias)
            new.meta = {**product.meta, **new.meta}
            replace(node, new)
            gm.graph.erase_node(product)
            return
