"""The operators that stand for kernels in a lowering graph.

    t3c::site_linear(x [..., k], residual, site, epilogue, out_features) -> [..., n]
    t3c::site_conv(x [b, c, h, w], residual, site, epilogue, out_shape) -> out_shape
    t3c::snap(x, place, scale, signed, bits) -> as x
    t3c::attention(q [B, S, heads*D], k [B, T, kv_heads*D], v [B, T, kv_heads*Dv], mask, heads,
                   kv_heads, scale, causal) -> [B, S, heads*Dv]
    t3c::rms_norm(x [..., n], gain [n], eps) -> [..., n]

The two site operators name a site of an elastic model; only a compiled library can run them (or
`t3c.passes.reference`). Snap rounds to a fixed grid (t3c.core.grid); it, attention and the
norm run anywhere. Importing this module registers them with torch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from t3c.core.grid import Grid

LIBRARY: Any = torch.library.Library("t3c", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(
    "site_linear(Tensor x, Tensor? residual, str site, str epilogue, int out_features) -> Tensor"
)
LIBRARY.define(
    "site_conv(Tensor x, Tensor? residual, str site, str epilogue, int[] out_shape) -> Tensor"
)
LIBRARY.define("snap(Tensor x, str place, float scale, bool signed, int bits) -> Tensor")
LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, int heads, int kv_heads, float scale, "
    "bool causal) -> Tensor"
)
LIBRARY.define("rms_norm(Tensor x, Tensor gain, float eps) -> Tensor")


def _linear_shape(
    x: Tensor, residual: Tensor | None, site: str, epilogue: str, out_features: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _conv_shape(
    x: Tensor, residual: Tensor | None, site: str, epilogue: str, out_shape: list[int]
) -> Tensor:
    return x.new_empty(out_shape)


def _refuse(x: Tensor, residual: Tensor | None, site: str, epilogue: str, shape: Any) -> Tensor:
    raise RuntimeError(
        f"site {site!r} has no weights in a lowering graph; call the ElasticModel, or lower the "
        "graph and run the library"
    )


def snap(x: Tensor, place: str, scale: float, signed: bool, bits: int) -> Tensor:
    """The values of a grid nearest to x.

    Args:
        x: Any shape, float32.
        place: Name of the place in the graph.
        scale: Of the grid.
        signed: Of the grid.
        bits: Of the grid.
    """
    grid = Grid(scale, signed, bits)
    return torch.round(x * grid.inverse).clamp(*grid.ends) * scale


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """softmax(q k^T * scale + mask) v; head h uses key-value head h // (heads // kv_heads).

    Args:
        q: [B, S, heads*D].
        k: [B, T, kv_heads*D].
        v: [B, T, kv_heads*Dv].
        mask: Float, added, broadcastable to [B, heads, S, T]; None: nothing is added.
        heads: Query heads.
        kv_heads: Key-value heads; divides `heads`.
        scale: Factor of the scores.
        causal: Whether position s sees positions 0..s only (S = T).

    Returns:
        [B, S, heads*Dv].
    """
    batch, length, _ = q.shape
    split_q = q.view(batch, length, heads, -1).transpose(1, 2)
    groups = heads // kv_heads
    split_k = k.view(batch, k.shape[1], kv_heads, -1).transpose(1, 2).repeat_interleave(groups, 1)
    split_v = v.view(batch, v.shape[1], kv_heads, -1).transpose(1, 2).repeat_interleave(groups, 1)
    scores = split_q @ split_k.transpose(2, 3) * scale
    if mask is not None:
        scores = scores + mask
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ split_v).transpose(1, 2).reshape(batch, length, -1)


def _attention_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
) -> Tensor:
    return q.new_empty((*q.shape[:2], v.shape[2] // kv_heads * heads))


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """X over the root of its mean square plus eps, times the gain; along the last axis."""
    return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


_SHAPES: dict[str, Callable[..., Tensor]] = {
    "site_linear": _linear_shape,
    "site_conv": _conv_shape,
    "attention": _attention_shape,
    "snap": lambda x, place, scale, signed, bits: torch.empty_like(x),
    "rms_norm": lambda x, gain, eps: x.new_empty(x.shape),
}
_ANYWHERE: dict[str, Callable[..., Tensor]] = {
    "attention": attention,
    "snap": snap,
    "rms_norm": rms_norm,
}
for _name, _shape in _SHAPES.items():
    LIBRARY.impl(_name, _shape, "Meta")
    LIBRARY.impl(_name, _ANYWHERE.get(_name, _refuse), "CompositeExplicitAutograd")

SITE_LINEAR = torch.ops.t3c.site_linear.default
SITE_CONV = torch.ops.t3c.site_conv.default
SNAP = torch.ops.t3c.snap.default
ATTENTION = torch.ops.t3c.attention.default
RMS_NORM = torch.ops.t3c.rms_norm.default
