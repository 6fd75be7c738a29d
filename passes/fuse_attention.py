"""Scaled dot product attention becomes one operator on [batch, positions, heads * size]."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from t3c.passes.base import AbstractPass, Log
from t3c.passes.nodes import (
    add_constant,
    argument,
    as_node,
    at_top,
    aten,
    constant,
    emit,
    is_call,
    shape_of,
    value_of,
)
from t3c.passes.torch_ops import ATTENTION

HIDDEN = -1e30  # stands for minus infinity in masks: a row that hides everything stays finite
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@final
@dataclass(frozen=True, slots=True)
class FuseAttention(AbstractPass):
    """Replace scaled_dot_product_attention together with the moving of heads around it.

    Before: q4 = transpose(reshape(q, [B, S, H, D]), 1, 2), the same for k and v
            y = reshape(transpose(sdpa(q4, k4, v4), 1, 2), [B, S, H*D])
    After:  y = t3c.attention(q, k, v, mask, H, H, scale, causal)

    Where q, k or v comes another way (rotary embeddings), transposes are written out. Repeated
    key-value heads are read once. What does not fit (not 4-D float32, dropout) stays.
    """

    name: ClassVar[str] = "fuse-attention"

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Fuse every attention that fits."""
        masks = _Masks(gm)
        for node in list(gm.graph.nodes):
            if is_call(node, aten.scaled_dot_product_attention.default):
                _fuse(gm, node, masks)


def _fuse(gm: fx.GraphModule, node: fx.Node, masks: "_Masks") -> None:
    q, k, v = (as_node(a) for a in node.args[:3])
    mask, dropout = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    scale = argument(node, 6, "scale")
    fits = all(len(shape_of(t)) == 4 and value_of(t).dtype == torch.float32 for t in (q, k, v))
    if not fits or dropout:
        return
    batch, heads, length, size = shape_of(q)
    if any(shape_of(t)[0] != batch for t in (k, v)):
        return
    if shape_of(k)[1] == shape_of(v)[1] == heads:
        k_once, v_once = _once(k), _once(v)
        if shape_of(k_once)[1] == shape_of(v_once)[1]:
            k, v = k_once, v_once
    kv_heads = shape_of(k)[1]
    if shape_of(v)[1] != kv_heads or heads % kv_heads:
        return
    square = length == shape_of(k)[2]
    causal = bool(argument(node, 5, "is_causal", False))
    with gm.graph.inserting_before(node):
        if causal and not square:
            hidden = torch.ones(length, shape_of(k)[2], dtype=torch.bool).triu(1)
            added: fx.Node | None = masks.store(hidden.float() * HIDDEN, "folded_causal")
            causal = False
        elif mask is None:
            added = None
        else:
            added, causal = masks.added(mask, square)
        flat = [_flat(gm.graph, t) for t in (q, k, v)]
        factor = 1 / math.sqrt(size) if scale is None else float(scale)
        out = emit(gm.graph, ATTENTION, *flat, added, heads, kv_heads, factor, causal)
        out.meta["path"] = node.meta.get("path", "")
        width = shape_of(v)[3]
        apart = emit(gm.graph, aten.reshape.default, out, [batch, length, heads, width])
        moved = emit(gm.graph, aten.transpose.int, apart, 1, 2)
    for user in list(node.users):
        if _swaps_heads(user):
            user.replace_all_uses_with(apart)
            gm.graph.erase_node(user)
    node.replace_all_uses_with(moved)
    gm.graph.erase_node(node)
    if not moved.users:
        gm.graph.erase_node(moved)
    for user in list(apart.users):
        if is_call(user, *_VIEWS) and shape_of(user) == shape_of(out):
            user.replace_all_uses_with(out)
            gm.graph.erase_node(user)
    if not apart.users:
        gm.graph.erase_node(apart)


def _swaps_heads(node: Any) -> bool:
    """Whether a node exchanges axes 1 and 2 of a 4-D tensor."""
    if is_call(node, aten.transpose.int):
        return len(shape_of(node)) == 4 and sorted(a % 4 for a in node.args[1:3]) == [1, 2]
    return is_call(node, aten.permute.default) and [a % 4 for a in node.args[1]] == [0, 2, 1, 3]


def _once(t: fx.Node) -> fx.Node:
    """The tensor before its heads were repeated; the tensor itself if they were not.

    Matches reshape(clone(expand(unsqueeze(t, 2)))), which gives head h the source h // groups.
    """
    expanded = t.args[0] if is_call(t, *_VIEWS) else None
    if is_call(expanded, aten.clone.default):
        expanded = expanded.args[0]  # type: ignore[union-attr]
    if not is_call(expanded, aten.expand.default) or not isinstance(expanded, fx.Node):
        return t
    lifted = expanded.args[0]
    if not is_call(lifted, aten.unsqueeze.default) or not isinstance(lifted, fx.Node):
        return t
    source = lifted.args[0]
    b, h, s, d = shape_of(source) if len(shape_of(source)) == 4 else (0, 0, 0, 0)
    repeated = shape_of(expanded)
    fits = lifted.args[1] in (2, -3) and len(repeated) == 5 and repeated[:2] == (b, h)
    if fits and repeated[3:] == (s, d) and isinstance(source, fx.Node):
        return source
    return t


def _flat(graph: fx.Graph, t: fx.Node) -> fx.Node:
    """[B, H, S, D] -> [B, S, H*D], undoing the model's own moving of heads where it is visible."""
    batch, heads, length, size = shape_of(t)
    apart = t.args[0] if _swaps_heads(t) else emit(graph, aten.transpose.int, t, 1, 2)
    want = (batch, length, heads * size)
    source = apart
    while is_call(source, *_VIEWS) and isinstance(source, fx.Node):
        source = source.args[0]
        if shape_of(source) == want:
            break
    if isinstance(source, fx.Node) and shape_of(source) == want:
        return source
    return emit(graph, aten.reshape.default, source, list(want))


@dataclass(slots=True)
class _Masks:
    """Masks as the operator takes them, each made once."""

    gm: fx.GraphModule
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def added(self, mask: fx.Node, square: bool) -> tuple[fx.Node | None, bool]:
        """(float mask to add or None, whether it is the causal one)."""
        value = _broadcast(self.gm, mask)
        if value is not None:
            return self._constant(mask, value, square)
        if mask not in self.made:
            graph = self.gm.graph
            new = mask
            if value_of(mask).dtype == torch.bool:
                with graph.inserting_after(mask):
                    ones = emit(graph, aten._to_copy.default, mask, dtype=torch.float32)
                with graph.inserting_after(ones):
                    less = emit(graph, aten.sub.Tensor, ones, 1.0)
                with graph.inserting_after(less):
                    new = emit(graph, aten.mul.Tensor, less, -HIDDEN)
            shape = shape_of(mask)
            if len(shape) < 4:
                full = [*[1] * (4 - len(shape)), *shape]
                with graph.inserting_after(new):
                    new = emit(graph, aten.reshape.default, new, full)
            self.made[mask] = new
        return self.made[mask], False

    def _constant(self, mask: fx.Node, value: Tensor, square: bool) -> tuple[fx.Node | None, bool]:
        seen = value if value.dtype == torch.bool else value == 0
        if bool(seen.all()):
            return None, False
        if square:
            length = shape_of(mask)[-1]
            lower = torch.ones(length, length, dtype=torch.bool).tril()
            hides = value.dtype == torch.bool or bool((value[~seen] <= HIDDEN).all())
            if hides and value.shape[-2:] == lower.shape and bool((seen == lower).all()):
                return None, True
        if mask not in self.made:
            added = value if value.dtype != torch.bool else (~value).float() * HIDDEN
            added = added.reshape(*[1] * (4 - added.dim()), *added.shape)
            self.made[mask] = self.store(added.float(), "folded_mask")
        return self.made[mask], False

    def store(self, value: Tensor, name: str) -> fx.Node:
        """Keep a mask as a constant of the graph."""
        full = value.reshape(*[1] * (4 - value.dim()), *value.shape).contiguous()
        with at_top(self.gm):
            return add_constant(self.gm, name, full, parameter=False)


def _broadcast(gm: fx.GraphModule, mask: fx.Node) -> Tensor | None:
    """The value of a constant mask: last two axes in full, the others as small as they are stored.

    None: the mask depends on the inputs.
    """
    source = mask
    if is_call(mask, aten.expand.default) and isinstance(mask.args[0], fx.Node):
        source = mask.args[0]
    value = constant(gm, source)
    if value is None:
        return None
    return value.expand(*value.shape[:-2], *shape_of(mask)[-2:])
