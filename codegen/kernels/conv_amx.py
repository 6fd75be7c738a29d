"""Convolution with AMX int8 tiles: pixels are rows, output channels are columns.

Sixteen pixels of the image, 64 bytes each and one pixel apart, are the first operand as they lie;
sixteen words of packed weights are the second. Both are loaded from where they are. With stride 1
the sixteen pixels may run over the end of a row: what lies between rows is computed and dropped.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from t3c.codegen.kernels import conv_flow
from t3c.codegen.kernels.conv_flow import RANK_STEP, WORD, Depth, Output, Spot, row_of
from t3c.codegen.kernels.conv_x86 import AbstractX86Conv
from t3c.codegen.kernels.emit import LANES, Emitter, ceil_div, i32, lanes
from t3c.codegen.kernels.family import ConvShape, Flow, Packed
from t3c.codegen.kernels.image_codes import Grid
from t3c.core.codes import F32, Matrix

ROWS = 16
"""Rows of a tile."""
PARALLEL_MACS = 1 << 26
"""Multiply-adds worth several threads: about 50 us of one."""
CHUNK = 8
"""Pairs of pixel tiles that share a block of weights in the first-level cache."""
OUT_WORDS = 2 * ROWS * 2 * LANES
"""Words of the sums of a pair of pixel tiles by a pair of channel tiles."""


@final
class AmxConv(AbstractX86Conv):
    """The family ``x86-amx``."""

    name: ClassVar[str] = "x86-amx"
    wide: ClassVar[bool] = True

    def pack(self, w: Matrix, bias: F32 | None, shape: ConvShape) -> Packed:
        """Weights [out / 16, words, 16, 4] int8; starts, scale and bias of each channel."""
        return conv_flow.pack(w, bias, shape)

    def product(self, output: Output, depth: Depth, most: tuple[int, int], epilogue: str) -> None:
        """See `AbstractX86Conv.product`."""
        _Product(output.e, output.flow, depth, most, output).write()


def words_of(words: int) -> int:
    """Words of a tile along the sum: the most that divide it evenly."""
    return next(size for size in range(min(ROWS, words), 0, -1) if words % size == 0)


@dataclass(frozen=True, slots=True)
class _Product:
    """Writer of one convolution kernel."""

    e: Emitter
    flow: Flow
    depth: Depth
    channels_max: tuple[int, int]
    output: Output

    @property
    def flat(self) -> bool:
        """Whether tiles run over the ends of rows."""
        return self.output.direct and self.flow.shape.stride == (1, 1)

    @property
    def pitch(self) -> int:
        """Pixels from one output row to the next, if `flat`."""
        return Grid(self.flow.source).pitch

    @property
    def width(self) -> int:
        """Pixels of a tile."""
        rows, columns = self.flow.shape.out_size
        if self.flat:
            return min(ROWS, (rows - 1) * self.pitch + columns)
        return ceil_div(columns, ceil_div(columns, ROWS))

    @property
    def across(self) -> int:
        """Tiles of a row; of an image, if `flat`."""
        rows, columns = self.flow.shape.out_size
        length = (rows - 1) * self.pitch + columns if self.flat else columns
        return ceil_div(length, self.width)

    def write(self) -> None:
        """The body of the function: tasks are chunks of tile pairs by groups of channel pairs."""
        e, s = self.e, self.flow.shape
        tiles = self.across * (1 if self.flat else s.out_size[0])
        pairs = ceil_div(tiles, 2)
        chunks = ceil_div(pairs, CHUNK)
        groups = ceil_div(s.out_channels, LANES)
        blocks = ceil_div(groups, 2)
        macs = s.batch * s.out_channels * tiles * self.width * self.depth.packed * WORD
        threads = macs >= PARALLEL_MACS
        parts = min(blocks, ceil_div(4, s.batch * chunks)) if threads else 1
        each = ceil_div(blocks, parts)
        parts = ceil_div(blocks, each)
        e('T.evaluate(T.call_extern("int64", "syscall", 158, 0x1023, 18))')
        with e.parallel("t", s.batch * chunks * parts, threads) as t:
            self._configure()
            b = e.let("b", f"{t} // {chunks * parts}")
            first = e.let("first", f"{t} // {parts} % {chunks} * {CHUNK}")
            out = e.alloc("out", (OUT_WORDS,), "int32")
            with e.loop("i", OUT_WORDS // LANES) as i:
                # TVM shrinks a buffer to what it sees accessed, and it does not see tile stores
                e(f"{out}[{lanes(f'{i} * 16')}] = {i32(0)}")
            n0 = e.let("n", f"{t} % {parts} * {each}")
            with e.block(f"for n in range(T.min({each}, {blocks} - {n0})):"):
                group = e.let("group", f"({n0} + n) * 2")
                with e.block(f"for g in range(T.min({CHUNK}, {pairs} - {first})):"):
                    tile = e.let("tile", f"({first} + g) * 2")
                    self._tall(b, tile, group, groups, tiles, out)
            e.intrinsic("llvm.x86.tilerelease")

    def _configure(self) -> None:
        """Sums are tiles 0 to 3, pixels 4 and 5, weights 6 and 7."""
        e = self.e
        size = words_of(self.depth.words)
        config = e.alloc("config", (64,), "uint8")
        with e.loop("i", 64) as i:
            e(f"{config}[{i}] = T.uint8(0)")
        e(f"{config}[0] = T.uint8(1)")
        for tile in range(8):
            rows = size if tile >= 6 else self.width
            width = size * WORD if tile in (4, 5) else 4 * LANES
            e(f"{config}[{16 + 2 * tile}] = T.uint8({width})")
            e(f"{config}[{48 + tile}] = T.uint8({rows})")
        e.intrinsic("llvm.x86.ldtilecfg", f"T.address_of({config}[0])")

    def _tall(self, b: str, tile: str, group: str, groups: int, tiles: int, out: str) -> None:
        """Split by whether the last pair of pixel tiles or of channel tiles is whole."""
        e = self.e

        def wide(pixels: int) -> None:
            if groups >= 2:
                with e.maybe(f"{group} + 1 < {groups}" if groups % 2 else ""):
                    self._body(b, tile, group, pixels, 2, out)
            if groups % 2:
                with e.maybe(f"{group} + 1 == {groups}" if groups >= 2 else ""):
                    self._body(b, tile, group, pixels, 1, out)

        if tiles >= 2:
            with e.maybe(f"{tile} + 1 < {tiles}" if tiles % 2 else ""):
                wide(2)
        if tiles % 2:
            with e.maybe(f"{tile} + 1 == {tiles}" if tiles >= 2 else ""):
                wide(1)

    def _body(self, b: str, tile: str, group: str, pixels: int, vectors: int, out: str) -> None:
        """`pixels` tiles of pixels by `vectors` tiles of channels: products, then store."""
        e, depth, s = self.e, self.depth, self.flow.shape
        grid = Grid(self.flow.source)
        for i in range(pixels):
            for v in range(vectors):
                e.intrinsic("llvm.x86.tilezero", f"T.int8({2 * i + v})")
        bases = []
        corner = f"{b} * {grid.plane} + {grid.origin}"
        corner += f" - {s.padding[0] * grid.row + s.padding[1] * grid.depth}"
        for i in range(pixels):
            if self.flat:
                where = f"({tile} + {i}) * {self.width * grid.depth}"
            else:
                row, column = self._place(f"({tile} + {i})")
                where = f"{row} * {s.stride[0] * grid.row} + {column} * "
                where += f"{s.stride[1] * grid.depth}"
            bases.append(e.let("base", f"{corner} + {where}"))
        size = words_of(depth.words)
        with (
            e.loop("i", depth.rows) as ki,
            e.loop("j", depth.columns) as kj,
            e.loop("k", depth.words // size) as k,
        ):
            shift = f"{ki} * {s.dilation[0] * grid.row} + {kj} * {s.dilation[1] * grid.depth}"
            shift = e.let("shift", f"{shift} + {k} * {size * WORD}")
            word = f"({ki} * {depth.columns} + {kj}) * {depth.most} + {k} * {size}"
            word = e.let("word", word)
            for v in range(vectors):
                at = f"((({group}) + {v}) * {depth.packed} + {word}) * {4 * LANES}"
                self._load(6 + v, f"weight[{at}]", 4 * LANES)
            for i, base in enumerate(bases):
                self._load(4 + i, f"codes[{base} + {shift}]", s.stride[1] * grid.depth)
                for v in range(vectors):
                    names = (f"T.int8({n})" for n in (2 * i + v, 4 + i, 6 + v))
                    e.intrinsic("llvm.x86.tdpbusd", *names)
        for i in range(pixels):
            for v in range(vectors):
                at = f"T.address_of({out}[{i * ROWS * 2 * LANES + v * LANES}])"
                name = f"T.int8({2 * i + v})"
                e.intrinsic("llvm.x86.tilestored64", name, at, f"T.int64({2 * 4 * LANES})")
        starts = self._starts(group, vectors)
        for i in range(pixels):
            if self.flat:
                self._scattered(b, f"({tile} + {i}) * {self.width}", group, i, starts, out)
                continue
            row, column = self._place(f"({tile} + {i})")
            sums = [
                [self._sum(out, i, str(p), v, start) for p in range(self.width)]
                for v, start in enumerate(starts)
            ]
            self.output.finish(b, row_of(row, column, self.width), group, sums)

    def _place(self, tile: str) -> tuple[str, str]:
        """(row, first column) of a tile within one row; the last one of a row ends with it."""
        row = self.e.let("row", f"{tile} // {self.across}")
        last = self.flow.shape.out_size[1] - self.width
        column = f"T.min({tile} % {self.across} * {self.width}, {last})"
        return row, self.e.let("column", column)

    def _starts(self, group: str, vectors: int) -> list[str]:
        """What makes up for the 128 of signed codes, for each vector of channels."""
        if not self.flow.source.signed:
            return [""] * vectors
        out = ceil_div(self.channels_max[0], LANES) * LANES
        line = (ceil_div(self.flow.shape.in_channels, RANK_STEP) - 1) * out
        return [
            self.e.let(
                "start", conv_flow.start_of(self.flow.source, f"{line} + {first} * {LANES}", LANES)
            )
            for first in (f"(({group}) + {v})" for v in range(vectors))
        ]

    def _sum(self, out: str, i: int, pixel: str, v: int, start: str) -> str:
        """One pixel's sums of sixteen channels."""
        at = f"({i * ROWS} + {pixel}) * {2 * LANES} + {v * LANES}"
        value = f"{out}[{lanes(at)}]"
        return f"({value} + {start})" if start else value

    def _scattered(
        self, b: str, first: str, group: str, i: int, starts: list[str], out: str
    ) -> None:
        """Store a tile whose pixels may run over the end of a row, two at a time."""
        e, (rows, columns) = self.e, self.flow.shape.out_size
        step = 2 if self.width % 2 == 0 else 1
        with e.loop("m", self.width // step) as m:
            spots = []
            for u in range(step):
                place = e.let("at", f"{first} + {m} * {step} + {u}")
                row, column = e.let("r", f"{place} // {self.pitch}"), f"{place} % {self.pitch}"
                column = e.let("c", column)
                guard = f"{row} < {rows} and {column} < {columns}"
                inside = f"T.min({row}, {rows - 1})", f"T.min({column}, {columns - 1})"
                spots.append(Spot(*inside, guard=guard))
            sums = [
                [self._sum(out, i, f"{m} * {step} + {u}", v, start) for u in range(step)]
                for v, start in enumerate(starts)
            ]
            self.output.finish(b, spots, group, sums)

    def _load(self, tile: int, element: str, stride: int) -> None:
        """Load a tile register from rows `stride` bytes apart."""
        self.e.intrinsic(
            "llvm.x86.tileloadd64",
            f"T.int8({tile})",
            f"T.address_of({element})",
            f"T.int64({stride})",
        )
