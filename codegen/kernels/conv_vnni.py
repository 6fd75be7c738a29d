"""Convolution with AVX-512 VNNI: blocks of output channels by pixel vectors in registers.

A word of four activations is the unsigned operand (code + 128), a broadcast word of four weights
the signed one; the accumulators start at -128 times the sum of the weights.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from t3c.codegen.kernels.conv_layout import Layout, pad_bytes
from t3c.codegen.kernels.conv_x86 import Panel, panel_at, quantize_kernel
from t3c.codegen.kernels.emit import (
    LANES,
    Emitter,
    buffer,
    ceil_div,
    epilogue_steps,
    kernel_name,
    lanes,
    splat,
)
from t3c.codegen.kernels.family import AbstractConvKernels, ConvShape, Kernel, Packed
from t3c.core.codes import F32, Matrix

RANK_STEP = 16
SLACK = 5 * LANES
"""Words that the last panel may read past the last plane."""
PARALLEL_MACS = 1 << 23
"""Multiply-adds worth several threads: about 50 us of one."""
L2_BYTES = 1 << 20
"""Half of a second-level cache: weights above it are read once instead of once per panel."""


@final
class VnniConv(AbstractConvKernels):
    """The family ``x86-vnni``."""

    name: ClassVar[str] = "x86-vnni"
    rank_step: ClassVar[int] = RANK_STEP

    def quantize(self, shape: ConvShape) -> Kernel:
        """(x) -> (unsigned codes as words, scales)."""
        layout = Layout(shape)
        name = f"vnni_conv_quantize_{layout.tag(outputs=False)}"
        return quantize_kernel(layout, name, offset=128, slack=SLACK)

    def pack(self, w: Matrix, bias: F32 | None, shape: ConvShape) -> Packed:
        """Words [out / rows, quads, taps, rows]; starts, scale and bias of each channel."""
        layout = Layout(shape)
        rows = block_of(layout).rows
        out, inner = w.q.shape[:2]
        blocks = ceil_div(out, rows)
        words = np.pad(layout.order(w.q), ((0, blocks * rows - out), (0, 0), (0, 0), (0, 0)))
        words = words.reshape(blocks, rows, *words.shape[1:])
        words = np.ascontiguousarray(words.transpose(0, 2, 3, 1, 4)).view(np.int32)
        starts = [
            -128 * w.q[:, : RANK_STEP * (i + 1)].reshape(out, -1).sum(1, dtype=np.int32)
            for i in range(ceil_div(inner, RANK_STEP))
        ]
        return {
            "weight": pad_bytes(words),
            "start": pad_bytes(np.stack(starts).astype(np.int32)),
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
        """(codes, scales, weight, start, scale, bias, [residual]) -> y."""
        steps = epilogue_steps(epilogue)
        layout = Layout(shape)
        most = channels_max or (shape.out_channels, shape.in_channels)
        return _Product(Emitter(), layout, block_of(layout), most, steps, raw).kernel()


@dataclass(frozen=True, slots=True)
class Block:
    """A register block: `rows` output channels by `vectors` pixel vectors."""

    rows: int
    vectors: int


def block_of(layout: Layout) -> Block:
    """The register block for this geometry: 24 accumulators, as few idle vectors as possible."""
    n = layout.vectors
    return Block(6, 4) if n % 4 == 0 and n <= 8 else Block(8, 3)


@dataclass(frozen=True, slots=True)
class _Product:
    """Writer of one convolution kernel."""

    e: Emitter
    layout: Layout
    block: Block
    channels_max: tuple[int, int]
    steps: tuple[str, ...]
    raw: bool

    def kernel(self) -> Kernel:
        """The whole function."""
        layout, s = self.layout, self.layout.shape
        out_max, in_max = self.channels_max
        blocks = ceil_div(out_max, self.block.rows)
        words = blocks * self.block.rows * layout.quads_of(in_max) * layout.taps
        starts = ceil_div(in_max, RANK_STEP) * out_max
        shape = (s.batch, s.out_channels, *s.out_size)
        dtype = "int32" if self.raw else "float32"
        params = [
            buffer("codes", (layout.words(SLACK),), "int32"),
            buffer("scales", (s.batch,), "float32"),
            buffer("weight", (ceil_div(words, 16) * 16,), "int32"),
            buffer("start", (ceil_div(starts, 16) * 16,), "int32"),
            buffer("wscale", (ceil_div(out_max, 16) * 16,), "float32"),
            buffer("bias", (ceil_div(out_max, 16) * 16,), "float32"),
        ]
        if "add" in self.steps:
            params.append(buffer("residual", shape, "float32"))
        params.append(buffer("y", shape, dtype))
        most = "" if self.channels_max == (s.out_channels, s.in_channels) else f"{out_max}x{in_max}"
        ending = "raw" if self.raw else "_".join(self.steps)
        name = kernel_name("vnni_conv", layout.tag(), most and f"of{most}", ending)
        if self._channels_outer():
            self._by_channels()
        else:
            self._by_pixels()
        return Kernel(name, self.e.function(name, params), ((shape, dtype),))

    def _threads(self) -> bool:
        layout, s = self.layout, self.layout.shape
        macs = s.batch * s.out_channels * layout.pixels * layout.quads * 4 * layout.taps
        return macs >= PARALLEL_MACS

    def _channels_outer(self) -> bool:
        """Whether weights stay in cache and activations stream, instead of the reverse."""
        layout = self.layout
        weights = layout.shape.out_channels * layout.quads * layout.taps * 4
        return weights > L2_BYTES or layout.vectors <= 2 * self.block.vectors

    @property
    def _table(self) -> bool:
        """Whether words of the taps come from a table: several phases would be as many loops."""
        return len(self.layout.classes) > 1

    def _tabulate(self) -> None:
        """Fill the table of the words from an output pixel to each tap."""
        if not self._table:
            return
        e = self.e
        e(f'offset = T.alloc_buffer(({self.layout.taps},), "int32")')
        for taps in self.layout.classes:
            with e.loop("i", taps.count[0]) as i, e.loop("j", taps.count[1]) as j:
                line = f"{taps.start} + {i} * {taps.step[0]} + {j} * {taps.step[1]}"
                e(f"offset[{taps.first} + {i} * {taps.count[1]} + {j}] = {line}")

    def _by_pixels(self) -> None:
        e, layout, block = self.e, self.layout, self.block
        whole = layout.pixels // LANES // block.vectors
        rest = layout.vectors - whole * block.vectors
        panels = whole + (rest > 0)
        with e.parallel("t", layout.shape.batch * panels, self._threads()) as t:
            self._tabulate()
            b = e.let("b", f"{t} // {panels}")
            g = e.let("g", f"{t} % {panels}")
            p = e.let("p", f"{g} * {block.vectors * LANES}")
            with ExitStack() as stack:
                if whole and rest:
                    stack.enter_context(e.block(f"if {g} < {whole}:"))
                if whole:
                    self._rows(b, panel_at(e, layout, p, block.vectors, last=False), p)
            with ExitStack() as stack:
                if whole and rest:
                    stack.enter_context(e.block("else:"))
                if rest:
                    self._rows(b, panel_at(e, layout, p, rest, last=True), p)

    def _rows(self, b: str, panel: Panel, p: str) -> None:
        """All channel blocks for one panel."""
        whole, rest = divmod(self.layout.shape.out_channels, self.block.rows)
        if whole:
            with self.e.loop("n", whole) as n:
                self._body(b, n, self.block.rows, panel, p)
        if rest:
            self._body(b, str(whole), rest, panel, p)

    def _by_channels(self) -> None:
        e, s = self.e, self.layout.shape
        whole, rest = divmod(s.out_channels, self.block.rows)
        blocks = whole + (rest > 0)
        with e.parallel("t", s.batch * blocks, self._threads()) as t:
            self._tabulate()
            b = e.let("b", f"{t} // {blocks}")
            n = e.let("n", f"{t} % {blocks}")
            with ExitStack() as stack:
                if whole and rest:
                    stack.enter_context(e.block(f"if {n} < {whole}:"))
                if whole:
                    self._panels(b, n, self.block.rows)
            with ExitStack() as stack:
                if whole and rest:
                    stack.enter_context(e.block("else:"))
                if rest:
                    self._panels(b, n, rest)

    def _panels(self, b: str, n: str, rows: int) -> None:
        """All panels for one channel block."""
        e, layout, vectors = self.e, self.layout, self.block.vectors
        whole = layout.pixels // LANES // vectors
        rest = layout.vectors - whole * vectors
        if whole:
            with e.loop("g", whole) as g:
                p = e.let("p", f"{g} * {vectors * LANES}")
                self._body(b, n, rows, panel_at(e, layout, p, vectors, last=False), p)
        if rest:
            p = str(whole * vectors * LANES)
            self._body(b, n, rows, panel_at(e, layout, p, rest, last=True), p)

    def _body(self, b: str, n: str, rows: int, panel: Panel, p: str) -> None:
        """One register block: products, then store."""
        e, layout, s = self.e, self.layout, self.layout.shape
        out_max, in_max = self.channels_max
        count = len(panel.start)
        first = (ceil_div(s.in_channels, RANK_STEP) - 1) * out_max
        acc = [[e.alloc("acc", (LANES,), "int32") for _ in range(count)] for _ in range(rows)]
        for i in range(rows):
            start = e.let("start", splat(f"start[{first} + {n} * {self.block.rows} + {i}]"))
            for j in range(count):
                e(f"{acc[i][j]}[{lanes(0)}] = {start}")
        with e.loop("q", layout.quads) as q:
            word = f"{b} * {layout.image_words} + {q} * {layout.quad_words} + {p}"
            tap = f"({n} * {layout.quads_of(in_max)} + {q}) * {layout.taps}"
            if self._table:
                with e.loop("t", layout.taps) as t:
                    self._multiply(f"{word} + offset[{t}]", f"{tap} + {t}", acc)
            else:
                (taps,) = layout.classes
                with e.loop("i", taps.count[0]) as ki, e.loop("j", taps.count[1]) as kj:
                    at = f"{word} + {taps.start} + {ki} * {taps.step[0]} + {kj} * {taps.step[1]}"
                    self._multiply(at, f"{tap} + {ki} * {taps.count[1]} + {kj}", acc)
        if set(self.steps) <= {"relu", "add"}:
            for i, row in enumerate(acc):
                values = [f"{name}[{lanes(0)}]" for name in row]
                self._finish(b, f"{n} * {self.block.rows} + {i}", panel, values)
            return
        # long epilogues are written once, not for every accumulator
        staged = e.alloc("staged", (rows * count * LANES,), "int32")
        for i, row in enumerate(acc):
            for j, name in enumerate(row):
                e(f"{staged}[{lanes((i * count + j) * LANES)}] = {name}[{lanes(0)}]")
        with e.loop("i", rows) as r:
            indices = [lanes(f"({r} * {count} + {j}) * {LANES}") for j in range(count)]
            values = [f"{staged}[{index}]" for index in indices]
            self._finish(b, f"{n} * {self.block.rows} + {r}", panel, values)

    def _finish(self, b: str, channel: str, panel: Panel, values: list[str]) -> None:
        """Dequantize and store the accumulators of one channel."""
        e = self.e
        if self.raw:
            for j, value in enumerate(values):
                panel.store(f"y[{b}, {channel}, 0, ", j, value, "int32")
            return
        scale = e.let("s", splat(f"(scales[{b}] * wscale[{channel}])"))
        bias = e.let("h", splat(f"bias[{channel}]"))
        for j, value in enumerate(values):
            panel.finish(j, f"{b}, {channel}", value, scale, bias, self.steps)

    def _multiply(self, word: str, tap: str, acc: list[list[str]]) -> None:
        """Add the products of one quad of one tap."""
        e = self.e
        at = e.let("at", word)
        weight = e.let("w", f"({tap}) * {self.block.rows}")
        pixels = [
            e.let("a", f'T.reinterpret(codes[{lanes(f"{at} + {LANES * v}")}], dtype="int8x64")')
            for v in range(len(acc[0]))
        ]
        for u, row in enumerate(acc):
            line = splat(f"weight[{weight} + {u}]")
            weights = e.let("k", f'T.reinterpret({line}, dtype="int8x64")')
            for pixel, name in zip(pixels, row, strict=True):
                e(
                    f'{name}[{lanes(0)}] = T.call_llvm_pure_intrin("int32x16", '
                    f'"llvm.x86.avx512.vpdpbusd.512", {name}[{lanes(0)}], {pixel}, {weights})'
                )
