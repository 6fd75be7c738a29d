"""Convolution with AMX int8 tiles: output channels are rows, pixels are columns.

A tile of sixteen quads by sixteen pixels is the second operand as it lies in the codes, rows one
plane apart. Where quads are many and whole (1x1, few output channels) tiles are read in place;
else a chunk of pixels is first copied to scratch as dense tiles, once for all output channels.

Rows of the product run over (block of sixteen quads, tap, quad); the quads that do not fill a
block form dense tiles of their own, so that a three-channel stem wastes little.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.kernels.conv_layout import Layout, pad_bytes
from t3c.codegen.kernels.conv_x86 import Panel, panel_at, quantize_kernel
from t3c.codegen.kernels.emit import (
    LANES,
    Emitter,
    buffer,
    ceil_div,
    epilogue_steps,
    i32,
    kernel_name,
    lanes,
    splat,
)
from t3c.codegen.kernels.family import AbstractConvKernels, ConvShape, Kernel, Packed
from t3c.core.codes import F32, Matrix

RANK_STEP = 16
ROWS = 16
"""Rows of a tile."""
TILE_WORDS = 256
SLACK = 3 * LANES
"""Words that the last panel may read past the last plane."""
PARALLEL_MACS = 1 << 26
"""Multiply-adds worth several threads: about 50 us of one."""
CHUNK_TILES = 512
"""Tiles of scratch (1 KiB each): a quarter of a second-level cache."""
IN_PLACE_CHANNELS = 64
"""Output channels up to which unaligned tiles are read in place: each is read once for every 32."""


@final
class AmxConv(AbstractConvKernels):
    """The family ``x86-amx``."""

    name: ClassVar[str] = "x86-amx"
    rank_step: ClassVar[int] = RANK_STEP

    def quantize(self, shape: ConvShape) -> Kernel:
        """(x) -> (signed codes as words, scales)."""
        layout = Layout(shape)
        name = f"amx_conv_quantize_{layout.tag(outputs=False)}"
        return quantize_kernel(layout, name, offset=0, slack=SLACK)

    def pack(self, w: Matrix, bias: F32 | None, shape: ConvShape) -> Packed:
        """Tiles [out / 16, tiles, 16, 64]; scale and bias of each channel."""
        out = w.q.shape[0]
        return {
            "weight": pad_bytes(_tiles(Layout(shape).order(w.q))),
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
        return _Product(Emitter(), Layout(shape), most, steps, raw).kernel()


def _tiles(words: NDArray[np.int8]) -> NDArray[np.int8]:
    """[out, quads, taps, 4] as [out / 16, tiles, 16, 16, 4], zero padded."""
    out, quads, taps = words.shape[:3]
    whole = quads // ROWS
    head = words[:, : whole * ROWS].reshape(out, whole, ROWS, taps, 4).swapaxes(2, 3)
    tail = words[:, whole * ROWS :].swapaxes(1, 2)
    rows = np.concatenate([head.reshape(out, -1, 4), tail.reshape(out, -1, 4)], axis=1)
    rows = np.pad(rows, ((0, -out % ROWS), (0, -rows.shape[1] % ROWS), (0, 0)))
    tiles = rows.reshape(rows.shape[0] // ROWS, ROWS, -1, ROWS, 4)
    return np.ascontiguousarray(tiles.swapaxes(1, 2))


@dataclass(frozen=True, slots=True)
class _Product:
    """Writer of one convolution kernel."""

    e: Emitter
    layout: Layout
    channels_max: tuple[int, int]
    steps: tuple[str, ...]
    raw: bool

    @property
    def whole(self) -> int:
        """Blocks of sixteen quads that the packed weights have."""
        return self.layout.quads_of(self.channels_max[1]) // ROWS

    @property
    def rest(self) -> int:
        """Quads of the packed weights that do not fill a block."""
        return self.layout.quads_of(self.channels_max[1]) % ROWS

    @property
    def tiles_max(self) -> int:
        """Tiles along the product of the packed weights, for sixteen output channels."""
        return (self.whole * ROWS + self.rest) * self.layout.taps // ROWS + (
            self.rest * self.layout.taps % ROWS > 0
        )

    @property
    def tiles(self) -> int:
        """Tiles along the product that this kernel reads."""
        blocks = ceil_div(self.layout.quads, ROWS)
        return blocks * self.layout.taps if blocks <= self.whole else self.tiles_max

    @property
    def in_place(self) -> bool:
        """Whether activations are read as tiles from the codes themselves."""
        layout = self.layout
        aligned = layout.taps == 1 or layout.shape.out_channels <= IN_PLACE_CHANNELS
        return layout.quads % ROWS == 0 and layout.quads <= self.whole * ROWS and aligned

    def kernel(self) -> Kernel:
        """The whole function."""
        layout, s = self.layout, self.layout.shape
        out_max, in_max = self.channels_max
        shape = (s.batch, s.out_channels, *s.out_size)
        dtype = "int32" if self.raw else "float32"
        weights = ceil_div(out_max, ROWS) * self.tiles_max * TILE_WORDS * 4
        params = [
            buffer("codes", (layout.words(SLACK),), "int32"),
            buffer("scales", (s.batch,), "float32"),
            buffer("weight", (weights,), "int8"),
            buffer("wscale", (ceil_div(out_max, 16) * 16,), "float32"),
            buffer("bias", (ceil_div(out_max, 16) * 16,), "float32"),
        ]
        if "add" in self.steps:
            params.append(buffer("residual", shape, "float32"))
        params.append(buffer("y", shape, dtype))
        most = "" if self.channels_max == (s.out_channels, s.in_channels) else f"{out_max}x{in_max}"
        ending = "raw" if self.raw else "_".join(self.steps)
        name = kernel_name("amx_conv", layout.tag(), most and f"of{most}", ending)
        self._tasks()
        return Kernel(name, self.e.function(name, params), ((shape, dtype),))

    def _tasks(self) -> None:
        """Chunks of pixels by groups of output channels, each with its own tile configuration."""
        e, layout, s = self.e, self.layout, self.layout.shape
        whole = layout.pixels // LANES // 2
        panels = whole + (layout.vectors > 2 * whole)
        chunk = min(panels, 8 if self.in_place else max(1, CHUNK_TILES // self.tiles // 2))
        chunks = ceil_div(panels, chunk)
        macs = s.batch * s.out_channels * layout.pixels * self.tiles * 64
        threads = macs >= PARALLEL_MACS
        blocks = ceil_div(s.out_channels, 2 * ROWS)
        groups = min(blocks, ceil_div(4, s.batch * chunks)) if threads else 1
        each = ceil_div(blocks, groups)
        groups = ceil_div(blocks, each)
        e('T.evaluate(T.call_extern("int64", "syscall", 158, 0x1023, 18))')
        with e.parallel("t", s.batch * chunks * groups, threads) as t:
            config = e.alloc("config", (64,), "uint8")
            with e.loop("i", 64) as i:
                e(f"{config}[{i}] = T.uint8(0)")
            e(f"{config}[0] = T.uint8(1)")
            with e.loop("i", 8) as i:
                e(f"{config}[16 + 2 * {i}] = T.uint8(64)")
                e(f"{config}[48 + {i}] = T.uint8({ROWS})")
            e.intrinsic("llvm.x86.ldtilecfg", f"T.address_of({config}[0])")
            b = e.let("b", f"{t} // {chunks * groups}")
            c = e.let("c", f"{t} // {groups} % {chunks} * {chunk}")
            here = str(chunk) if panels % chunk == 0 else f"T.min({chunk}, {panels} - {c})"
            out = e.alloc("out", (4 * TILE_WORDS,), "int32")
            with e.loop("i", 4 * TILE_WORDS // LANES) as i:
                # TVM shrinks a buffer to what it sees accessed, and it does not see tile stores
                e(f"{out}[{lanes(f'{i} * 16')}] = {i32(0)}")
            scratch = ""
            if not self.in_place:
                scratch = e.alloc("scratch", (2 * chunk * self.tiles * TILE_WORDS,), "int32")
                self._copy(b, c, f"{here} * 2", scratch)
            n0 = f"{t} % {groups} * {each}"
            count = str(each) if blocks % each == 0 else f"T.min({each}, {blocks} - {n0})"
            with e.block(f"for n in range({count}):"):
                n = e.let("n", f"{n0} + n")
                with e.block(f"for g in range({here}):"):
                    source = (b, n, f"{c} + g", "g" if scratch else "", scratch, out)
                    self._panel(*source, whole)
            e.intrinsic("llvm.x86.tilerelease")

    def _copy(self, b: str, c: str, vectors: str, scratch: str) -> None:
        """Dense tiles of the chunk: scratch[vector, row of the product, 16 pixels]."""
        e, layout = self.e, self.layout
        blocks, rest = divmod(layout.quads, ROWS)
        base = f"{b} * {layout.image_words} + {c} * {2 * LANES}"
        with e.block(f"for v in range({vectors}):"):
            to = e.let("to", f"v * {self.tiles * TILE_WORDS}")
            source = e.let("from", f"{base} + v * {LANES}")
            if blocks:
                with e.loop("k", blocks) as k:
                    self._copy_rows(
                        source,
                        f"{k} * {ROWS}",
                        ROWS,
                        ROWS,
                        scratch,
                        (f"{to} + {k} * {layout.taps * TILE_WORDS}"),
                    )
            if rest:
                first = blocks * layout.taps * TILE_WORDS
                pitch = ROWS if blocks < self.whole else self.rest
                if rest < pitch or (layout.taps * pitch) % ROWS:
                    with e.loop("z", (self.tiles * TILE_WORDS - first) // LANES) as z:
                        e(f"{scratch}[{lanes(f'{to} + {first} + {z} * 16')}] = {i32(0)}")
                at = f"{to} + {first}"
                self._copy_rows(source, str(blocks * ROWS), rest, pitch, scratch, at)

    def _copy_rows(
        self, source: str, quad: str, count: int, pitch: int, scratch: str, to: str
    ) -> None:
        """Rows of `count` quads for every tap; rows of neighbouring taps are `pitch` apart."""
        e, layout = self.e, self.layout
        for taps in layout.classes:
            with e.loop("i", taps.count[0]) as i, e.loop("j", taps.count[1]) as j:
                shift = f"{taps.start} + {i} * {taps.step[0]} + {j} * {taps.step[1]}"
                at = e.let("at", f"{source} + {quad} * {layout.quad_words} + {shift}")
                tap = f"({taps.first} + {i} * {taps.count[1]} + {j})"
                row = e.let("row", f"{to} + {tap} * {pitch * LANES}")
                with e.loop("r", count) as r:
                    value = f"codes[{lanes(f'{at} + {r} * {layout.quad_words}')}]"
                    e(f"{scratch}[{lanes(f'{row} + {r} * 16')}] = {value}")

    def _panel(
        self, b: str, n: str, g: str, local: str, scratch: str, out: str, whole: int
    ) -> None:
        """One panel of one or two pixel vectors by one or two tiles of channels."""
        e, layout = self.e, self.layout
        rest = layout.vectors - 2 * whole
        p = e.let("p", f"({g}) * {2 * LANES}")
        for count, last in ((2 if whole else 0, False), (rest, True)):
            if not count:
                continue
            with ExitStack() as stack:
                if whole and rest:
                    stack.enter_context(e.block("else:" if last else f"if {g} < {whole}:"))
                self._tall(b, n, p, count, last, local, scratch, out)

    def _tall(
        self, b: str, n: str, p: str, count: int, last: bool, local: str, scratch: str, out: str
    ) -> None:
        """Split by whether the channel block has one or two tiles."""
        e, s = self.e, self.layout.shape
        full, odd = s.out_channels // 32, 0 < s.out_channels % 32 <= ROWS
        if not odd:
            self._body(b, n, p, 2, count, last, local, scratch, out)
            return
        if full:
            with e.block(f"if {n} < {full}:"):
                self._body(b, n, p, 2, count, last, local, scratch, out)
            with e.block("else:"):
                self._body(b, n, p, 1, count, last, local, scratch, out)
        else:
            self._body(b, n, p, 1, count, last, local, scratch, out)

    def _body(
        self,
        b: str,
        n: str,
        p: str,
        height: int,
        count: int,
        last: bool,
        local: str,
        scratch: str,
        out: str,
    ) -> None:
        """`height` tiles of channels by `count` pixel vectors: products, then store."""
        e, layout = self.e, self.layout
        for i in range(height):
            for j in range(count):
                e.intrinsic("llvm.x86.tilezero", f"T.int8({2 * i + j})")

        def products(tile: str, pixels: list[str], stride: int) -> None:
            for i in range(height):
                at = f"(({n} * 2 + {i}) * {self.tiles_max} + {tile}) * {4 * TILE_WORDS}"
                self._load(4 + i, f"weight[{at}]", 64)
                for j in range(count):
                    if i == 0:
                        self._load(6 + j, pixels[j], stride)
                    e.intrinsic(
                        "llvm.x86.tdpbssd",
                        f"T.int8({2 * i + j})",
                        f"T.int8({4 + i})",
                        f"T.int8({6 + j})",
                    )

        if scratch:
            with e.loop("k", self.tiles) as k:
                at = [
                    f"{scratch}[(({local} * 2 + {j}) * {self.tiles} + {k}) * {TILE_WORDS}]"
                    for j in range(count)
                ]
                products(k, at, 64)
        else:
            with e.loop("k", layout.quads // ROWS) as k:
                base = f"{b} * {layout.image_words} + {k} * {ROWS * layout.quad_words} + {p}"
                for taps in layout.classes:
                    with e.loop("i", taps.count[0]) as ki, e.loop("j", taps.count[1]) as kj:
                        shift = f"{taps.start} + {ki} * {taps.step[0]} + {kj} * {taps.step[1]}"
                        word = e.let("at", f"{base} + {shift}")
                        tap = f"({taps.first} + {ki} * {taps.count[1]} + {kj})"
                        tile = f"({k} * {layout.taps} + {tap})"
                        pixels = [f"codes[{word} + {LANES * v}]" for v in range(count)]
                        products(tile, pixels, layout.quad_words * 4)
        for i in range(height):
            for j in range(count):
                e.intrinsic(
                    "llvm.x86.tilestored64",
                    f"T.int8({2 * i + j})",
                    f"T.address_of({out}[{i * 2 * TILE_WORDS + j * LANES}])",
                    "T.int64(128)",
                )
        panel = panel_at(e, layout, p, count, last=last)
        self._store(b, n, panel, height, out)

    def _load(self, tile: int, element: str, stride: int) -> None:
        """Load a tile register from rows `stride` bytes apart."""
        self.e.intrinsic(
            "llvm.x86.tileloadd64",
            f"T.int8({tile})",
            f"T.address_of({element})",
            f"T.int64({stride})",
        )

    def _store(self, b: str, n: str, panel: Panel, height: int, out: str) -> None:
        """Dequantize, apply the epilogue and store the accumulators in `out`."""
        e, s = self.e, self.layout.shape
        rows = str(height * ROWS)
        if s.out_channels % ROWS:
            rows = f"T.min({rows}, {s.out_channels} - {n} * {2 * ROWS})"
        with e.block(f"for r in range({rows}):"):
            channel = e.let("channel", f"{n} * {2 * ROWS} + r")
            scale = bias = ""
            if not self.raw:
                scale = e.let("s", splat(f"(scales[{b}] * wscale[{channel}])"))
                bias = e.let("h", splat(f"bias[{channel}]"))
            for j in range(len(panel.start)):
                value = f"{out}[{lanes(f'r * {2 * LANES} + {LANES * j}')}]"
                if self.raw:
                    panel.store(f"y[{b}, {channel}, 0, ", j, value, "int32")
                else:
                    panel.finish(j, f"{b}, {channel}", value, scale, bias, self.steps)
