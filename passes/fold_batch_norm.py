"""Fold batch normalization in eval mode into the layer before it."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
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
    result_of,
    shape_of,
)

NORMALIZED = "normalized"
"""Mark, in a node's meta, of a layer that a batch norm was folded into."""
_CONVS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
)


@final
@dataclass(frozen=True, slots=True)
class FoldBatchNorm(AbstractPass):
    """Fold eval-mode batch norm into the convolution or linear layer that feeds it.

    Before: y = batch_norm(conv(x, w, b))
    After:  y = conv(x, w * s, b * s + t)       s = gamma / sqrt(var + eps),  t = beta - mean * s

    Without such a layer: y = x * s + t. New weights are stored under the old names.
    """

    name: ClassVar[str] = "fold-batch-norm"

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Fold every batch norm whose statistics are constants."""
        for node in list(gm.graph.nodes):
            found = _batch_norm(gm, node)
            if found is None:
                continue
            x, out, scale, shift = found
            layer = _foldable(gm, x)
            with gm.graph.inserting_before(out):
                if layer is not None:
                    new = _fold(gm, layer, scale, shift)
                else:
                    new = _affine(gm, x, scale, shift, _owner(node))
            replace(out, new)
            if out is not node:
                gm.graph.erase_node(node)
            if layer is not None and not layer.users:
                gm.graph.erase_node(layer)


def _batch_norm(
    gm: fx.GraphModule, node: fx.Node
) -> tuple[fx.Node, fx.Node, Tensor, Tensor] | None:
    """(input, node with the result, s, t) of a batch norm in eval mode."""
    if is_call(node, aten._native_batch_norm_legit_no_training.default):
        x, gamma, beta, mean, var, _, eps = node.args
        out = result_of(node)
    elif is_call(node, aten.batch_norm.default) and node.args[5] is False:
        x, gamma, beta, mean, var, _, _, eps = node.args[:8]
        out = node
    else:
        return None
    m, v = constant(gm, mean), constant(gm, var)
    g = torch.ones_like(v) if gamma is None and v is not None else constant(gm, gamma)
    b = torch.zeros_like(v) if beta is None and v is not None else constant(gm, beta)
    if out is None or m is None or v is None or g is None or b is None:
        return None
    if not isinstance(x, fx.Node) or not isinstance(eps, int | float):
        return None
    scale = g.double() / torch.sqrt(v.double() + eps)
    return x, out, scale, b.double() - m.double() * scale


def _foldable(gm: fx.GraphModule, x: fx.Node) -> fx.Node | None:
    """The layer that gives `x` to nobody else, with constant weight and bias."""
    linear = is_call(x, aten.linear.default) and len(shape_of(x)) == 2
    if len(x.users) != 1 or not (linear or is_call(x, *_CONVS)):
        return None
    if is_call(x, aten.convolution.default) and x.args[6]:
        return None  # transposed: output channels are not the first axis
    bias = argument(x, 2, "bias")
    if constant(gm, x.args[1]) is None or (bias is not None and constant(gm, bias) is None):
        return None
    return x


def _fold(gm: fx.GraphModule, layer: fx.Node, scale: Tensor, shift: Tensor) -> fx.Node:
    w_node, b_node = layer.args[1], argument(layer, 2, "bias")
    w, b = constant(gm, w_node), constant(gm, b_node)
    if w is None or not isinstance(w_node, fx.Node):
        raise TypeError(f"{layer} has no constant weight")
    new_w = (w.double() * scale.reshape(-1, *[1] * (w.dim() - 1))).to(w.dtype)
    new_b = (shift if b is None else b.double() * scale + shift).to(w.dtype)
    base = str(w_node.target)
    plain = base == "weight" or base.endswith(".weight")
    stem = base.removesuffix("weight") if plain else f"{base}_"
    weight = _store(gm, w_node, base, new_w)
    bias = _store(gm, b_node, f"{stem}bias", new_b)
    args: list[Any] = list(layer.args)
    args[1:3] = [weight, bias]
    new = emit(gm.graph, layer.target, *args, **layer.kwargs)  # type: ignore[arg-type]
    new.meta = {**layer.meta, **new.meta, NORMALIZED: True}
    return new


def _store(gm: fx.GraphModule, old: fx.Node | None, name: str, value: Tensor) -> fx.Node:
    """Store a folded constant; the old name is reused if nobody else reads it."""
    if old is not None:
        readers = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == old.target]
        if sum(len(n.users) for n in readers) == 1:
            name = str(old.target)
            path, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(path), leaf)
    with at_top(gm):
        return add_constant(gm, name, value, parameter=True)


def _affine(gm: fx.GraphModule, x: fx.Node, scale: Tensor, shift: Tensor, owner: str) -> fx.Node:
    """X * s + t with s and t shaped for the channel axis."""
    shape = (-1, *[1] * (len(shape_of(x)) - 2))
    with at_top(gm):
        s = add_constant(gm, f"{owner}scale", scale.float().reshape(shape), parameter=True)
        t = add_constant(gm, f"{owner}shift", shift.float().reshape(shape), parameter=True)
    return emit(gm.graph, aten.add.Tensor, emit(gm.graph, aten.mul.Tensor, x, s), t)


def _owner(node: fx.Node) -> str:
    path = str(node.meta.get("path", ""))
    return f"{path}." if path else ""
