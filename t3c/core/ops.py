"""The elastic operators in numpy: what graph rewrite, fake quantization and kernels agree on.

Every kernel's integer accumulators equal these exactly; its float output agrees to rounding.

Activation quantization is dynamic and symmetric: per row for a linear layer (one scale for each
token), per image for a convolution. With a = max(max|x|, 1e-12), all in float32:
    scale = a * (1/127),   q = rint(x * (127 / a)),   rint to the nearest even integer.
Output: y = acc * (scale_x * scale_w) + bias, then the epilogue steps in order.
With 4-bit weights there is an accumulator for each group of 64 inputs:
y = (sum over groups of acc_g * scale_w_g) * scale_x + bias, the sum in any order.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t3c.core.codes import F32, GROUP, I8, Grouped, Matrix

EPILOGUE_STEPS = ("relu", "gelu", "gelu-tanh", "silu", "tanh", "sigmoid", "add")
"""Steps after bias, spelled in order and joined by commas: "gelu", "add", "add,relu".

"add" adds the residual input of the operator; at most one. "gelu" is the exact (erf) form.
"""
TINY = np.float32(1e-12)


_ERF = np.vectorize(math.erf, otypes=[np.float32])
_ACTIVATIONS: Mapping[str, Callable[[Any], Any]] = {
    "relu": lambda y: np.maximum(y, np.float32(0)),
    "gelu": lambda y: y * np.float32(0.5) * (1 + _ERF(y / np.float32(math.sqrt(2)))),
    "gelu-tanh": lambda y: (
        np.float32(0.5)
        * y
        * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (y + np.float32(0.044715) * y**3)))
    ),
    "silu": lambda y: y / (1 + np.exp(-y)),
    "tanh": np.tanh,
    "sigmoid": lambda y: 1 / (1 + np.exp(-y)),
}


def quantize(x: F32, axes: tuple[int, ...]) -> tuple[I8, F32]:
    """Codes and scale of x, one scale for each slice over `axes` (kept as size 1)."""
    peak = np.maximum(np.abs(x).max(axis=axes, keepdims=True), TINY)
    scale = peak * np.float32(1 / 127)
    q = np.rint(x * (np.float32(127) / peak)).astype(np.int8)
    return q, scale


def activate(y: F32, epilogue: str, residual: F32 | None = None) -> F32:
    """Apply the epilogue steps of `epilogue` (comma separated, "" is none) in order."""
    for step in filter(None, epilogue.split(",")):
        if step == "add":
            if residual is None:
                raise ValueError("epilogue 'add' needs the residual input")
            y = y + residual
        elif step in _ACTIVATIONS:
            y = _ACTIVATIONS[step](y).astype(np.float32)
        else:
            raise ValueError(f"epilogue step {step!r}; allowed are {', '.join(EPILOGUE_STEPS)}")
    return y


def linear_accumulators(x: F32, w: Matrix) -> NDArray[np.int32]:
    """Exact int32 products of quantized x [rows, k] and w.q [n, k]: [rows, n]."""
    q, _ = quantize(x, (1,))
    return (q.astype(np.int64) @ w.q.astype(np.int64).T).astype(np.int32)


def group_accumulators(x: F32, w: Grouped) -> NDArray[np.int32]:
    """Exact int32 products of quantized x [rows, k] and w.q [n, k]: [ceil(k / 64), rows, n]."""
    q, _ = quantize(x, (1,))
    starts = range(0, w.q.shape[1], GROUP)
    parts = [(q[:, at : at + GROUP], w.q[:, at : at + GROUP]) for at in starts]
    return np.stack([a.astype(np.int32) @ b.astype(np.int32).T for a, b in parts])


def linear(x: F32, w: Matrix | Grouped, bias: F32 | None = None) -> F32:
    """One product of int8 activations: x [rows, k] -> [rows, n]."""
    _, scale = quantize(x, (1,))
    if isinstance(w, Grouped):
        groups = group_accumulators(x, w).astype(np.float32)
        total: F32 = np.einsum("grn,ng->rn", groups, w.scale)
        total = np.multiply(total, scale)
        return total if bias is None else total + bias
    sums = linear_accumulators(x, w).astype(np.float32)
    y: F32 = np.multiply(sums, np.multiply(scale, w.scale[None, :]))
    return y if bias is None else y + bias


def low_rank(x: F32, low: Matrix | Grouped, high: Matrix | Grouped, bias: F32 | None = None) -> F32:
    """Two thin products of x [rows, k]; the middle is quantized per row again."""
    return linear(linear(x, low), high, bias)


def conv2d(
    x: F32,
    w: Matrix,
    bias: F32 | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> F32:
    """One int8 convolution of x [batch, in, height, width], one activation scale per image."""
    q, scale = quantize(x, (1, 2, 3))
    kh, kw = w.q.shape[2:]
    p = np.pad(q.astype(np.int64), ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    oh = (p.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    ow = (p.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    acc = np.zeros((x.shape[0], w.q.shape[0], oh, ow), np.int64)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dilation[0], i * dilation[0] + stride[0] * (oh - 1) + 1, stride[0])
            cols = slice(j * dilation[1], j * dilation[1] + stride[1] * (ow - 1) + 1, stride[1])
            acc += np.einsum("bchw,oc->bohw", p[:, :, rows, cols], w.q[:, :, i, j].astype(np.int64))
    sums = acc.astype(np.int32).astype(np.float32)
    y: F32 = np.multiply(sums, np.multiply(scale, w.scale[None, :, None, None]))
    return y if bias is None else y + bias[None, :, None, None]
