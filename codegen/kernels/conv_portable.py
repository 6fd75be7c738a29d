"""Convolution for any CPU that LLVM knows: plain loops that its vectorizer turns into dot products.

Codes lie channels last in the zero-padded image, so that the innermost loop runs over contiguous
bytes of both operands: `sdot` where the processor has it, `pmaddwd` or `smlal` elsewhere. Weights
are [out, kernel height, kernel width, channels].
"""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.kernels.conv_flow import check_shape
from t3c.codegen.kernels.emit import (
    LANES,
    ROUND,
    ROUND_BITS,
    Emitter,
    activate,
    buffer,
    ceil_div,
    epilogue_steps,
    kernel_name,
    lanes,
    load,
    splat,
    store,
)
from t3c.codegen.kernels.family import AbstractConvKernels, ConvShape, Kernel, Packed
from t3c.core.codes import F32, Matrix

RANK_STEP = 16
OUT_BLOCK = 4
PIXEL_BLOCK = 2
"""Products that one inner loop accumulates: 4 channels by 2 pixels share its loads."""
PARALLEL_MACS = 1 << 21
PARALLEL_ELEMENTS = 1 << 17
"""Work worth several threads: about 50 us of one."""


def padded_channels(channels: int) -> int:
    """Channels of a pixel in memory: a multiple of sixteen, of four where there are few."""
    step = 16 if channels >= 16 else 4
    return ceil_div(channels, step) * step


def padded_size(shape: ConvShape) -> tuple[int, int]:
    """Height and width of the zero-padded image, as far as some output reads it."""
    h, w = (
        (shape.out_size[i] - 1) * shape.stride[i] + (shape.kernel[i] - 1) * shape.dilation[i] + 1
        for i in (0, 1)
    )
    return h, w


def tag(shape: ConvShape, *, outputs: bool = True) -> str:
    """The sizes as part of a function name."""
    s = shape
    parts = [
        f"{s.batch}x{s.in_channels}x{s.in_size[0]}x{s.in_size[1]}",
        f"k{s.kernel[0]}x{s.kernel[1]}",
        f"s{s.stride[0]}x{s.stride[1]}",
        f"p{s.padding[0]}x{s.padding[1]}",
        f"d{s.dilation[0]}x{s.dilation[1]}",
    ]
    return "_".join([f"o{s.out_channels}", *parts] if outputs else parts)


def pad_bytes(a: NDArray[np.generic]) -> NDArray[np.generic]:
    """The array flattened and zero padded to a multiple of 64 bytes."""
    flat = np.ascontiguousarray(a).reshape(-1)
    return np.pad(flat, (0, -flat.nbytes % 64 // flat.itemsize))


@final
class PortableConv(AbstractConvKernels):
    """The family ``portable``."""

    name: ClassVar[str] = "portable"
    rank_step: ClassVar[int] = RANK_STEP

    def quantize(self, shape: ConvShape) -> Kernel:
        """(x) -> (codes int8 [batch, height, width, channels] flat, scales)."""
        check_shape(shape)
        s = shape
        height, width = padded_size(s)
        channels = padded_channels(s.in_channels)
        words = s.batch * height * width * channels
        e = Emitter()
        size = s.in_channels * s.in_size[0] * s.in_size[1]
        threads = s.batch * size >= PARALLEL_ELEMENTS
        inverse = e.alloc("inverse", (s.batch,), "float32")
        with e.loop("b", s.batch) as b:
            self._peak(e, b, size, inverse)
        with e.parallel("t", s.batch * height, threads) as t:
            b = e.let("b", f"{t} // {height}")
            row = e.let("row", f"{t} % {height} - {s.padding[0]}")
            to = e.let("to", f"{t} * {width * channels}")
            with e.loop("i", width * channels) as i:
                e(f"codes[{to} + {i}] = T.int8(0)")
            first = min(s.padding[1], width)
            count = min(s.in_size[1], width - first)
            with (
                e.block(f"if {row} >= 0 and {row} < {s.in_size[0]}:"),
                e.loop("c", s.in_channels) as c,
                e.loop("w", count) as w,
            ):
                value = f"x[{b}, {c}, {row}, {w}] * {inverse}[{b}] + T.float32({ROUND!r})"
                code = f'T.reinterpret({value}, dtype="int32") - {ROUND_BITS}'
                at = f"{to} + ({w} + {first}) * {channels} + {c}"
                e(f'codes[{at}] = T.cast({code}, "int8")')
        params = (
            buffer("x", (s.batch, s.in_channels, *s.in_size), "float32"),
            buffer("codes", (words,), "int8"),
            buffer("scales", (s.batch,), "float32"),
        )
        name = kernel_name("portable_conv_quantize", tag(shape, outputs=False))
        return Kernel(name, e.function(name, params), (((words,), "int8"), ((s.batch,), "float32")))

    def _peak(self, e: Emitter, b: str, size: int, inverse: str) -> None:
        """The scale of one image and its inverse."""
        top = e.alloc("top", (LANES,), "float32")
        e(f"{top}[{lanes(0)}] = T.broadcast(T.float32(1e-12), {LANES})")
        if size >= LANES:
            with e.loop("i", ceil_div(size, LANES)) as i:
                at = f"T.min({i} * {LANES}, {size - LANES})"
                value = f"T.abs(x[{b}, 0, 0, {lanes(at)}])"
                e(f"{top}[{lanes(0)}] = T.max({top}[{lanes(0)}], {value})")
        else:
            with e.loop("i", size) as i:
                e(f"{top}[{i}] = T.max({top}[{i}], T.abs(x[{b}, 0, 0, {i}]))")
        with e.loop("i", LANES) as i:
            e(f"{top}[0] = T.max({top}[0], {top}[{i}])")
        e(f"scales[{b}] = {top}[0] * T.float32({1 / 127!r})")
        e(f"{inverse}[{b}] = T.float32(127) / {top}[0]")

    def pack(self, w: Matrix, bias: F32 | None, shape: ConvShape) -> Packed:
        """Codes [out, kh, kw, channels]; scale and bias of each channel."""
        out, inner = w.q.shape[:2]
        rows = np.moveaxis(w.q, 1, 3)
        rows = np.pad(rows, ((0, 0), (0, 0), (0, 0), (0, padded_channels(inner) - inner)))
        return {
            "weight": pad_bytes(rows),
            "scale": pad_bytes(w.scale),
            "bias": pad_bytes(np.zeros(out, np.float32) if bias is None else bias),
        }

    def conv(
        self,
        shape: ConvShape,
        channels_max: tuple[int, int] | None = None,
        epilogue: str = "",
        *,
        raw: bool = False,
    ) -> Kernel:
        """(codes, scales, weight, scale, bias, [residual]) -> y."""
        steps = epilogue_steps(epilogue)
        most = channels_max or (shape.out_channels, shape.in_channels)
        check_shape(shape)
        return _Product(Emitter(), shape, most, steps, raw).kernel()


@dataclass(frozen=True, slots=True)
class _Product:
    """Writer of one convolution kernel."""

    e: Emitter
    shape: ConvShape
    channels_max: tuple[int, int]
    steps: tuple[str, ...]
    raw: bool

    def kernel(self) -> Kernel:
        """The whole function."""
        e, s = self.e, self.shape
        out_max, in_max = self.channels_max
        (oh, ow), (height, width) = s.out_size, padded_size(s)
        channels = padded_channels(s.in_channels)
        weights = out_max * s.kernel[0] * s.kernel[1] * padded_channels(in_max)
        shape = (s.batch, s.out_channels, oh, ow)
        dtype = "int32" if self.raw else "float32"
        params = [
            buffer("codes", (s.batch * height * width * channels,), "int8"),
            buffer("scales", (s.batch,), "float32"),
            buffer("weight", (ceil_div(weights, 64) * 64,), "int8"),
            buffer("wscale", (ceil_div(out_max, 16) * 16,), "float32"),
            buffer("bias", (ceil_div(out_max, 16) * 16,), "float32"),
        ]
        if "add" in self.steps:
            params.append(buffer("residual", shape, "float32"))
        params.append(buffer("y", shape, dtype))
        most = "" if self.channels_max == (s.out_channels, s.in_channels) else f"{out_max}x{in_max}"
        ending = "raw" if self.raw else "_".join(self.steps)
        name = kernel_name("portable_conv", tag(self.shape), most and f"of{most}", ending)
        whole, rest = divmod(oh * ow, LANES)
        macs = s.batch * s.out_channels * oh * ow * channels * s.kernel[0] * s.kernel[1]
        if whole:
            with e.parallel("t", s.batch * whole, macs >= PARALLEL_MACS) as t:
                b = e.let("b", f"{t} // {whole}")
                self._pixels(b, e.let("p", f"{t} % {whole} * {LANES}"), LANES)
        if rest:
            with e.loop("b", s.batch) as b:
                self._pixels(b, str(whole * LANES), rest)
        return Kernel(name, e.function(name, params), ((shape, dtype),))

    def _pixels(self, b: str, p: str, valid: int) -> None:
        """All channels of sixteen neighbouring output pixels, of which `valid` exist."""
        e, s = self.e, self.shape
        whole, rest = divmod(s.out_channels, OUT_BLOCK)
        sums = e.alloc("sums", (OUT_BLOCK * LANES,), "int32")
        kind = "int32" if self.raw else "float32"
        spare = e.alloc("rest", (LANES,), kind) if valid < LANES else ""
        if whole:
            with e.loop("n", whole) as n:
                self._block(b, f"{n} * {OUT_BLOCK}", OUT_BLOCK, p, valid, sums, spare)
        if rest:
            self._block(b, str(whole * OUT_BLOCK), rest, p, valid, sums, spare)

    def _block(
        self, b: str, first: str, rows: int, p: str, valid: int, sums: str, spare: str
    ) -> None:
        """`rows` channels of the pixels: products into `sums`, then the epilogue."""
        e, s = self.e, self.shape
        ow, (height, width) = s.out_size[1], padded_size(s)
        channels = padded_channels(s.in_channels)
        with e.loop("g", ceil_div(valid, PIXEL_BLOCK)) as g:
            bases = []
            for v in range(PIXEL_BLOCK):
                pixel = e.let("q", f"{p} + T.min({g} * {PIXEL_BLOCK} + {v}, {valid - 1})")
                row = f"({b} * {height} + {pixel} // {ow} * {s.stride[0]})"
                column = f"{pixel} % {ow} * {s.stride[1]}"
                bases.append(e.let("base", f"({row} * {width} + {column}) * {channels}"))
            acc = [[e.alloc("acc", (1,), "int32") for _ in range(PIXEL_BLOCK)] for _ in range(rows)]
            for line in acc:
                for one in line:
                    e(f"{one}[0] = 0")
            self._products(first, bases, acc)
            for u, line in enumerate(acc):
                for v, one in enumerate(line):
                    e(f"{sums}[{u * LANES + v} + {g} * {PIXEL_BLOCK}] = {one}[0]")
        for u in range(rows):
            channel = f"{first} + {u}"
            value = f"{sums}[{lanes(u * LANES)}]"
            if not self.raw:
                scale = splat(f"(scales[{b}] * wscale[{channel}])")
                bias = splat(f"bias[{channel}]")
                value = e.let("v", f'T.cast({value}, "float32x{LANES}") * {scale} + {bias}')
                residual = None
                if "add" in self.steps:
                    residual = load(e, spare, "residual", f"{b}, {channel}, 0", p, valid)
                value = activate(e, self.steps, value, residual)
            store(e, spare, "y", f"{b}, {channel}, 0", p, value, valid)

    def _products(self, first: str, bases: list[str], acc: list[list[str]]) -> None:
        """The taps and channels, as contiguous runs as long as both operands allow."""
        e, s = self.e, self.shape
        kh, kw = s.kernel
        width = padded_size(s)[1]
        channels, packed = padded_channels(s.in_channels), padded_channels(self.channels_max[1])
        merged = channels == packed and s.dilation[1] == 1
        with e.loop("i", kh) as i, e.loop("j", 1 if merged else kw) as j:
            source = f"({i} * {s.dilation[0] * width} + {j} * {s.dilation[1]}) * {channels}"
            at = e.let("at", source)
            rows = [
                e.let("w", f"((({first} + {u}) * {kh} + {i}) * {kw} + {j}) * {packed}")
                for u in range(len(acc))
            ]
            with e.loop("k", kw * channels if merged else channels) as k:
                for u, row in enumerate(acc):
                    for v, one in enumerate(row):
                        x = f'T.cast(codes[{bases[v]} + {at} + {k}], "int32")'
                        w = f'T.cast(weight[{rows[u]} + {k}], "int32")'
                        e(f"{one}[0] = {one}[0] + {x} * {w}")
