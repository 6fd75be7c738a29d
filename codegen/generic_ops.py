"""The elastic operators in TVM's own terms, for targets that have no kernels of T3C yet.

Tensor expressions and Relax operators only: whatever schedules the target's float operators
schedules these too. Results equal those of the kernels (t3c/core/ops.py).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from t3c.codegen.kernels.family import ConvShape
from t3c.codegen.tvm_api import relax, tvm
from t3c.core.ops import TINY

te, tirx = tvm.te, tvm.tirx


def peaks(x: Any) -> Any:
    """max|x| of each slice of the first axis."""
    rest = [te.reduce_axis((0, n), f"r{i}") for i, n in enumerate(x.shape[1:])]
    return te.compute(x.shape[:1], lambda i: te.max(tirx.abs(x[i, *rest]), axis=rest), name="peak")


def scales(peak: Any) -> Any:
    """Quantization steps."""
    step = _f32(np.float32(1 / 127))
    return te.compute(peak.shape, lambda i: tirx.max(peak[i], _f32(TINY)) * step, name="scale")


def codes(x: Any, peak: Any) -> Any:
    """Int8 codes."""

    def code(i: Any, *rest: Any) -> Any:
        inverse = _f32(127) / tirx.max(peak[i], _f32(TINY))
        return tirx.nearbyint(x[i, *rest] * inverse).astype("int8")

    return te.compute(x.shape, code, name="codes")


def product(
    x: Any, scale: Any, w: Any, w_scale: Any, *rest: Any, n: int, bias: bool, steps: Sequence[str]
) -> Any:
    """Linear layer on codes x [m, k] and w [n or more, k or more]; a profile reads a prefix.

    Args:
        x: Codes.
        scale: Quantization step of each row.
        w: Codes of the weights.
        w_scale: Quantization step of each output.
        rest: Bias, if there is one; residual, if a step adds it.
        n: Outputs.
        bias: Whether the first of `rest` is the bias.
        steps: Epilogue.
    """
    m, k = x.shape
    r = te.reduce_axis((0, k), "k")
    acc = te.compute(
        (m, n),
        lambda i, j: te.sum(x[i, r].astype("int32") * w[j, r].astype("int32"), axis=r),
        name="acc",
    )

    def finish(i: Any, j: Any) -> Any:
        y = acc[i, j].astype("float32") * (scale[i] * w_scale[j])
        y = y + rest[0][j] if bias else y
        return activate(y, steps, lambda: rest[-1][i, j])

    return te.compute((m, n), finish, name="y")


def convolution(
    x: Any,
    scale: Any,
    w: Any,
    w_scale: Any,
    *rest: Any,
    shape: ConvShape,
    bias: bool,
    steps: Sequence[str],
) -> Any:
    """2-D convolution on codes x [b, c, h, w] and w [out or more, c or more, kh, kw]."""
    s = shape
    oh, ow = s.out_size
    padded = _padded(x, s, "int8")
    c = te.reduce_axis((0, s.in_channels), "c")
    u = te.reduce_axis((0, s.kernel[0]), "u")
    v = te.reduce_axis((0, s.kernel[1]), "v")

    def term(b: Any, o: Any, i: Any, j: Any) -> Any:
        row, column = i * s.stride[0] + u * s.dilation[0], j * s.stride[1] + v * s.dilation[1]
        pixel = padded[b, c, row, column].astype("int32")
        return te.sum(pixel * w[o, c, u, v].astype("int32"), axis=[c, u, v])

    acc = te.compute((s.batch, s.out_channels, oh, ow), term, name="acc")

    def finish(b: Any, o: Any, i: Any, j: Any) -> Any:
        y = acc[b, o, i, j].astype("float32") * (scale[b] * w_scale[o])
        y = y + rest[0][o] if bias else y
        return activate(y, steps, lambda: rest[-1][b, o, i, j])

    return te.compute(acc.shape, finish, name="y")


def depthwise(x: Any, w: Any, *, shape: ConvShape) -> Any:
    """Float32 convolution of each channel of x [b, c, h, w] by its own window."""
    s = shape
    padded = _padded(x, s, "float32")
    u = te.reduce_axis((0, s.kernel[0]), "u")
    v = te.reduce_axis((0, s.kernel[1]), "v")

    def term(b: Any, c: Any, i: Any, j: Any) -> Any:
        row, column = i * s.stride[0] + u * s.dilation[0], j * s.stride[1] + v * s.dilation[1]
        return te.sum(padded[b, c, row, column] * w[c, 0, u, v], axis=[u, v])

    return te.compute((s.batch, s.out_channels, *s.out_size), term, name="depthwise")


def _padded(x: Any, s: ConvShape, dtype: str) -> Any:
    """X between zeros; x itself where there is no padding."""
    (height, width), (pad_h, pad_w) = s.in_size, s.padding
    if not (pad_h or pad_w):
        return x
    return te.compute(
        (s.batch, s.in_channels, height + 2 * pad_h, width + 2 * pad_w),
        lambda b, c, i, j: tirx.if_then_else(
            tirx.all(i >= pad_h, i < height + pad_h, j >= pad_w, j < width + pad_w),
            x[b, c, i - pad_h, j - pad_w],
            tirx.const(0, dtype),
        ),
        name="padded",
    )


def activate(y: Any, steps: Sequence[str], residual: Any) -> Any:
    """The epilogue steps on one float32 value; `residual` gives the value that "add" adds."""
    one, half = _f32(1), _f32(0.5)
    for step in steps:
        match step:
            case "relu":
                y = tirx.max(y, _f32(0))
            case "gelu":
                y = y * half * (one + tirx.erf(y * _f32(math.sqrt(0.5))))
            case "gelu-tanh":
                inner = _f32(math.sqrt(2 / math.pi)) * (y + _f32(0.044715) * y * y * y)
                y = half * y * (one + tirx.tanh(inner))
            case "silu":
                y = y / (one + tirx.exp(-y))
            case "tanh":
                y = tirx.tanh(y)
            case "sigmoid":
                y = one / (one + tirx.exp(-y))
            case _:
                y = y + residual()
    return y


def attention(
    builder: Any,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    heads: int,
    kv_heads: int,
    scale: float,
    causal: bool,
) -> Any:
    """Emit t3c::attention (passes/torch_ops.py) as Relax operators."""
    emit, op = builder.emit, relax.op

    def split(x: Any, parts: int) -> Any:
        """[B, T, parts*D] to [B, heads, T, D]."""
        batch, length, width = (int(n) for n in x.ty.shape.values)
        x = emit(op.reshape(x, (batch, length, parts, width // parts)))
        x = emit(op.permute_dims(x, [0, 2, 1, 3]))
        return x if parts == heads else emit(op.repeat(x, heads // parts, 1))

    batch, length, _ = (int(n) for n in q.ty.shape.values)
    split_k = emit(op.permute_dims(split(k, kv_heads), [0, 1, 3, 2]))
    scores = emit(op.matmul(split(q, heads), split_k))
    scores = emit(op.multiply(scores, relax.const(scale, "float32")))
    if mask is not None:
        scores = emit(op.add(scores, mask))
    if causal:
        hidden = np.triu(np.full((length, length), -np.inf, np.float32), 1)
        scores = emit(op.add(scores, relax.const(hidden)))
    mixed = emit(op.matmul(emit(op.nn.softmax(scores, -1)), split(v, kv_heads)))
    mixed = emit(op.permute_dims(mixed, [0, 2, 1, 3]))
    return emit(op.reshape(mixed, (batch, length, -1)))


def _f32(value: Any) -> Any:
    return tirx.const(float(value), "float32")
