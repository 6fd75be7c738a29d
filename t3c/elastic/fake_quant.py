"""The integer operators of t3c/core/ops.py in torch: equal codes, equal accumulators.

Accumulators are exact: `torch._int_mm` where this machine's is, else float64 products.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from t3c.core import codes as core_codes
from t3c.core.codes import GROUP
from t3c.core.grid import Grid
from t3c.core.ops import TINY

SUM_MAX = 1 << 24
"""Integers up to here, and all smaller ones, are float32 numbers."""
Codes = tuple[Tensor, Tensor]
"""Int8 codes [rows, ...] and float32 scales [rows]; of 4-bit codes [rows, groups of 64]."""


@torch.no_grad()
def quantize(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes and scale of x, one scale for each slice over `axes` (kept as size 1)."""
    peak = x.abs().amax(axes, keepdim=True).clamp_min(float(TINY))
    scale = peak * torch.tensor(1 / 127, dtype=torch.float32, device=x.device)
    q = torch.round(x * (torch.tensor(127.0, device=x.device) / peak)).to(torch.int8)
    return q, scale


@torch.no_grad()
def quantize_to(x: Tensor, grid: Grid) -> Tensor:
    """Codes of x on a fixed grid: int8 where it is signed, else uint8."""
    q = torch.round(x * torch.tensor(grid.inverse, device=x.device)).clamp(*grid.ends)
    return q.to(torch.int8 if grid.signed else torch.uint8)


@torch.no_grad()
def snap(x: Tensor, grid: Grid) -> Tensor:
    """The values of a fixed grid nearest to x."""
    return quantize_to(x, grid).float() * torch.tensor(grid.scale, device=x.device)


@torch.no_grad()
def quantize_weight(w: Tensor) -> Codes:
    """Symmetric int8 per output row, as t3c.core.codes.quantize_weight."""
    flat = w.detach().float().reshape(len(w), -1)
    peak = flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(len(w))
    scale = torch.where(peak > 0, peak / 127, torch.ones_like(peak))
    q = torch.round(flat / scale[:, None]).clamp(-127, 127).to(torch.int8)
    return q.reshape(w.shape), scale


@torch.no_grad()
def quantize_groups(w: Tensor) -> Codes:
    """4-bit codes [rows, cols] and scales [rows, groups] of t3c.core.codes.quantize_groups."""
    made = core_codes.quantize_groups(w.detach().float().cpu().numpy())
    return torch.from_numpy(made.q).to(w.device), torch.from_numpy(made.scale).to(w.device)


def spread(w: Codes) -> Tensor:
    """The float32 weights of codes, with scales for rows or for groups."""
    q, scale = w
    if scale.dim() == 1:
        return q.float() * scale.reshape(-1, *[1] * (q.dim() - 1))
    return q.float() * scale.repeat_interleave(GROUP, 1)[:, : q.shape[1]]


_int_mm: Callable[[Tensor, Tensor], Tensor] = vars(torch)["_int_mm"]


@cache
def _int_mm_is_exact(device: str) -> bool:
    """Whether `torch._int_mm` neither fails nor saturates on extreme codes."""
    a = torch.full((32, 64), 127, dtype=torch.int8, device=device)
    b = torch.full((64, 32), -127, dtype=torch.int8, device=device)
    try:
        mixed = _int_mm(a, -b)  # all positive: saturates where products are added in int16
        return bool((_int_mm(a, b) == -64 * 127**2).all() and (mixed == 64 * 127**2).all())
    except RuntimeError:  # no such kernel on this device: `accumulators` goes another exact way
        return False


@torch.no_grad()
def product(a: Tensor, b: Tensor) -> Tensor:
    """Exact int32 a [m, k] times b [n, k] transposed: [m, n]."""
    on_gpu = a.device.type != "cpu"
    small = on_gpu and (a.shape[0] <= 16 or a.shape[1] % 8 or b.shape[0] % 8)
    if not small and a.shape[1] > 1 and a.numel() and _int_mm_is_exact(str(a.device)):
        return _int_mm(_canonical(a), _canonical(b).t())
    return (a.double() @ b.double().t()).to(torch.int32)


@cache
def _float_conv_is_exact(device: str) -> bool:
    """Whether float32 convolutions of codes are exact: direct sums, not Winograd's, not TF32."""
    if device != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    draw = torch.Generator().manual_seed(0)
    for batch, channels, side in ((1, 100, 3), (2, 64, 3), (1, 1000, 1)):
        x = torch.randint(-127, 128, (batch, channels, 20, 20), generator=draw).double()
        w = torch.randint(-127, 128, (32, channels, side, side), generator=draw).double()
        got = functional.conv2d(x.float(), w.float(), padding=side // 2)
        if not torch.equal(got.double(), functional.conv2d(x, w, padding=side // 2)):
            return False
    return True


@torch.no_grad()
def accumulators(
    q: Tensor,
    codes: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """Exact convolution of codes q [batch, in, h, w] with int8 [out, in, kh, kw], as float32.

    Float32 sums below 2^24 are exact in any order. Where that bound does not hold for the whole
    window, integer products of unfolded windows are used, or sums over few channels at a time.
    """
    device, channels, taps = str(q.device), q.shape[1], codes.shape[2] * codes.shape[3]
    unsigned = q.dtype == torch.uint8
    most = SUM_MAX // ((255 if unsigned else 127) * 127 * taps)
    few = channels <= most * max(1, taps // 3)  # sums that take less time than unfolding
    if _float_conv_is_exact(device) and most and (few or not _int_mm_is_exact(device)):
        total: Tensor | None = None
        for at in range(0, channels, most):
            part = functional.conv2d(
                q[:, at : at + most].float(),
                codes[:, at : at + most].float(),
                None,
                stride,
                padding,
                dilation,
            )
            if channels <= most:
                return part
            total = part.int() if total is None else total + part.int()
        if total is not None:
            return total.float()
    patches, (oh, ow) = unfold(q, tuple(codes.shape[2:]), stride, padding, dilation)
    rows = codes.reshape(len(codes), -1)
    if unsigned:  # products take int8: 128 less in every factor is 128 times the weights less
        sums = product((patches.short() - 128).char(), rows) + 128 * rows.int().sum(1)
    else:
        sums = product(patches, rows)
    return sums.reshape(len(q), oh, ow, len(codes)).permute(0, 3, 1, 2).float()


def _canonical(a: Tensor) -> Tensor:
    """The same matrix with row-major strides: `_int_mm` reads those of axes of size 1, too."""
    return a.reshape(-1).view(a.shape)


@torch.no_grad()
def linear(x: Tensor, w: Codes, bias: Tensor | None = None) -> Tensor:
    """X [..., k] through one product, one activation scale per row: [..., n].

    In groups every product of a code by a code and its scale is a float32 number (7 + 7 + 8 bits,
    nested codes are below 73), and so is nearly every sum: as good as the kernels' additions.
    """
    codes, w_scale = w
    rows = x.reshape(-1, x.shape[-1])
    q, scale = quantize(rows, (1,))
    if w_scale.dim() == 2:
        y = functional.linear(q.float(), spread(w)) * scale
    else:
        y = product(q, codes).float() * (scale * w_scale[None, :])
    y = y if bias is None else y + bias
    return y.reshape(*x.shape[:-1], len(codes))


@torch.no_grad()
def conv2d(
    x: Tensor,
    w: Codes,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    grid: Grid | None = None,
) -> Tensor:
    """X [batch, in, height, width] through one int8 convolution.

    Activations lie on `grid`; without one, each image gets its own scale.
    """
    codes, w_scale = w
    if grid is None:
        q, scale = quantize(x, (1, 2, 3))
    else:
        q, scale = quantize_to(x, grid), torch.tensor(grid.scale, device=x.device)
    acc = accumulators(q, codes, stride, padding, dilation)
    y = acc * (scale * w_scale[None, :, None, None])
    return y if bias is None else y + bias[None, :, None, None]


def unfold(
    q: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, tuple[int, int]]:
    """Windows of any dtype: [batch * oh * ow, in * kh * kw] and (oh, ow)."""
    p = functional.pad(q, (padding[1], padding[1], padding[0], padding[0])).contiguous()
    batch, channels, height, width = p.shape
    kh, kw = kernel
    oh = (height - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    ow = (width - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    sb, sc, sh, sw = p.stride()
    windows = p.as_strided(
        (batch, oh, ow, channels, kh, kw),
        (sb, sh * stride[0], sw * stride[1], sc, sh * dilation[0], sw * dilation[1]),
    )
    return windows.reshape(batch * oh * ow, channels * kh * kw), (oh, ow)


def straight_through(exact: Tensor, smooth: Tensor) -> Tensor:
    """The value of `exact` with the gradient of `smooth`."""
    return smooth + (exact - smooth).detach() if smooth.requires_grad else exact
