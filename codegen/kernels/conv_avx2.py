"""Convolution with AVX2 on channels-last codes: exact sums, in two ways.

Codes of 7 bits, which the grids of this family have: `vpmaddubsw` multiplies bytes and adds pairs
in 16 bits. Two products are 2 * 127 * 127 = 32258 at most, so that nothing saturates. Signed codes
are stored plus 64; sums start at -64 times the sum of the weights.

Codes of 8 bits, where each image has its own range, would saturate. Rows of the image are widened
to 16 bits once for all output channels, the weights of sixteen channels once for all these rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from t3c.codegen.kernels import conv_flow
from t3c.codegen.kernels.conv_flow import RANK_STEP, WORD, Depth, Output, Run, row_of, runs
from t3c.codegen.kernels.conv_x86 import KINDS, AbstractX86Conv, op_of, shape_of
from t3c.codegen.kernels.emit import LANES, Emitter, ceil_div, lanes
from t3c.codegen.kernels.family import ConvShape, Flow, Image, Kernel, Packed
from t3c.codegen.kernels.image_codes import Grid
from t3c.codegen.kernels.schedule import Op, Schedule, Scheduled
from t3c.core.codes import F32, Matrix

HALF = LANES // 2
"""Lanes of a register."""
PARALLEL_MACS = 1 << 22
"""Multiply-adds worth several threads: about 50 us of one."""
SCRATCH_BYTES = 128 << 10
"""Widened rows that stay in a second-level cache beside weights."""


@dataclass(frozen=True, slots=True)
class WideSchedule(Schedule):
    """What registers and scratch hold.

    Attributes:
        pixels: Longest run of pixels.
        rows: Output rows whose input is widened at a time.
    """

    pixels: int
    rows: int


@final
class Avx2Conv(AbstractX86Conv, Scheduled):
    """The family ``x86-avx2``."""

    name: ClassVar[str] = "x86-avx2"
    wide: ClassVar[bool] = False
    activation_bits: ClassVar[int] = 7

    def __init__(self, records: Mapping[str, Schedule] | None = None) -> None:
        """Records: key of an operator -> its tuned schedule."""
        self.records: Mapping[str, Schedule] = records or {}

    def schedules(self, op: Op) -> tuple[Schedule, ...]:
        """Runs of at most six pixels by rows at a time."""
        most = self._rows(op)
        rows = sorted({ceil_div(most, part) for part in (1, 2, 4)})
        return tuple(WideSchedule(pixels, r) for pixels in (6, 5, 4) for r in rows)

    def default(self, op: Op) -> Schedule:
        """As many rows as fit."""
        return WideSchedule(6, self._rows(op))

    def kernel(self, op: Op) -> Kernel:
        """A flow between unsigned images, a residual is codes too; planes by each image's range."""
        s = shape_of(op)
        if op.kind == "planes":
            return self.conv(s, None, op.epilogue)
        source = Image(s.batch, s.in_channels, s.in_size, max(s.padding), False, 7)
        target = Image(s.batch, s.out_channels, s.out_size, 1, False, 7)
        residual = target if "add" in op.epilogue else None
        return self.flow(Flow(s, source, target, residual), None, op.epilogue)

    def _rows(self, op: Op) -> int:
        """Output rows whose widened input fits the scratch."""
        if op.kind not in KINDS:
            raise self.unknown(op)
        s = shape_of(op)
        grid = Grid(Image(s.batch, s.in_channels, s.in_size, max(s.padding), signed=False))
        reach = (s.kernel[0] - 1) * s.dilation[0] + 1
        fitting = (SCRATCH_BYTES // (2 * grid.row) - reach) // s.stride[0] + 1
        return max(1, min(s.out_size[0], fitting))

    def pack(self, w: Matrix, bias: F32 | None, shape: ConvShape) -> Packed:
        """Weights [out / 16, words, 16, 4] int8; starts, scale and bias of each channel."""
        return conv_flow.pack(w, bias, shape)

    def product(
        self, output: Output, depth: Depth, most: tuple[int, int], epilogue: str
    ) -> tuple[Op, Schedule, str]:
        """See `AbstractX86Conv.product`."""
        op = op_of(output.flow.shape, epilogue, output.kind)
        schedule = self.pick(op)
        assert isinstance(schedule, WideSchedule)
        product = _Bytes if output.flow.source.bits < 8 else _Words
        product(output.e, output.flow, depth, most, schedule, output).write()
        return op, schedule, self.suffix(op, schedule)


Place = tuple[str, str, str]
"""(buffer of pixels, index of their first value, buffer of weights)."""


@dataclass(frozen=True, slots=True)
class _Product(ABC):
    """Writer of one convolution kernel.

    A place is what `_tap` reads from: names of buffers, and the first value in the source's row.
    """

    e: Emitter
    flow: Flow
    depth: Depth
    channels_max: tuple[int, int]
    schedule: WideSchedule
    output: Output

    @property
    def grid(self) -> Grid:
        """Of the source; widened rows are as far apart."""
        return Grid(self.flow.source)

    def write(self) -> None:
        """Tasks are chunks of rows by groups of channels."""
        e, s = self.e, self.flow.shape
        rows, height = s.out_size[0], self.schedule.rows
        chunks = ceil_div(rows, height)
        groups = ceil_div(s.out_channels, LANES)
        macs = s.batch * s.out_channels * rows * s.out_size[1] * self.depth.packed * WORD
        threads = macs >= PARALLEL_MACS
        parts = min(groups, ceil_div(4, s.batch * chunks)) if threads else 1
        each = ceil_div(groups, parts)
        parts = ceil_div(groups, each)
        with e.parallel("t", s.batch * chunks * parts, threads) as t:
            b = e.let("b", f"{t} // {chunks * parts}")
            first = e.let("first", f"{t} // {parts} % {chunks} * {height}")
            count = e.let("count", f"T.min({height}, {rows} - {first})")
            pixels = self._pixels(b, first, count)
            n0 = e.let("n", f"{t} % {parts} * {each}")
            with e.block(f"for n in range(T.min({each}, {groups} - {n0})):"):
                group = e.let("group", f"{n0} + n")
                place = (*pixels, self._weights(group))
                with e.block(f"for r in range({count}):"):
                    self._row(b, first, "r", group, place)

    @property
    def _skip(self) -> bool:
        """Whether taps outside the image are left out."""
        return True

    @abstractmethod
    def _pixels(self, b: str, first: str, count: str) -> tuple[str, str]:
        """(buffer, index of the first value that the chunk of rows reads)."""

    @abstractmethod
    def _weights(self, group: str) -> str:
        """The buffer of the weights of sixteen channels."""

    @abstractmethod
    def _start(self, group: str, half: int) -> str:
        """What eight sums begin with."""

    @abstractmethod
    def _tap(
        self,
        line: str,
        tap: str,
        j: str,
        group: str,
        acc: list[list[str]],
        live: tuple[int, int],
        place: Place,
    ) -> None:
        """Add the products of one tap, or of one kernel row where its taps are merged."""

    def _row(self, b: str, first: str, r: str, group: str, place: Place) -> None:
        """One row of output pixels by sixteen channels."""
        e, s = self.e, self.flow.shape
        skip = self._skip and self.depth.columns == s.kernel[1]
        for run in runs(s, self.schedule.pixels, skip=skip):
            with e.loop("c", run.count) as c:
                column = e.let("col", f"{run.first} + {c} * {run.width}")
                self._run(b, first, r, column, group, run, place)

    def _run(
        self,
        b: str,
        first: str,
        r: str,
        column: str,
        group: str,
        run: Run,
        place: Place,
    ) -> None:
        """One run: products, then store."""
        e, s, grid = self.e, self.flow.shape, self.grid
        acc = [[e.alloc("acc", (HALF,), "int32") for _ in "ab"] for _ in range(run.width)]
        here = lanes(0, HALF)
        starts = [self._start(group, half) for half in range(2)]
        for pair in acc:
            for name, value in zip(pair, starts, strict=True):
                e(f"{name}[{here}] = {value}")
        row = e.let("row", f"{first} + {r}")
        top = e.let("top", f"{row} * {s.stride[0]} - {s.padding[0]}")
        begin, count = "0", str(s.kernel[0])
        if self._skip and s.padding[0]:
            down = s.dilation[0]
            begin = e.let("begin", f"T.max(0, (0 - {top} + {down - 1}) // {down})")
            last = f"T.min({s.kernel[0]}, ({s.in_size[0] - 1} - {top}) // {down} + 1)"
            count = e.let("taps", f"{last} - {begin}")
        left = f"({column} * {s.stride[1]} + {self.flow.source.halo - s.padding[1]}) * {grid.depth}"
        base = e.let("base", f"{place[1]} + {r} * {s.stride[0] * grid.row} + {left}")
        with e.block(f"for i in range({count}):"):
            tap = e.let("tap", f"{begin} + i")
            start = e.let("line", f"{base} + {tap} * {s.dilation[0] * grid.row}")
            if run.inner:
                with e.loop("j", self.depth.columns) as j:
                    self._tap(start, tap, j, group, acc, (0, run.width), place)
            else:
                for j_at, live in enumerate(run.live):
                    if live[0] < live[1]:
                        self._tap(start, tap, str(j_at), group, acc, live, place)
        sums = [[f"T.Shuffle([{a}[{here}], {z}[{here}]], {list(range(LANES))})" for a, z in acc]]
        self.output.finish(b, row_of(row, column, run.width), group, sums)


@final
class _Words(_Product):
    """Pairs of 16-bit values: codes of 8 bits."""

    def _pixels(self, b: str, first: str, count: str) -> tuple[str, str]:
        """Copy the rows that some output row reads, as 16-bit values."""
        e, s, grid = self.e, self.flow.shape, self.grid
        reach = (s.kernel[0] - 1) * s.dilation[0] + 1
        most = (self.schedule.rows - 1) * s.stride[0] + reach
        vectors = ceil_div(grid.row + self.flow.source.halo * grid.depth, LANES) + 1
        scratch = e.alloc("scratch", (most * grid.row + vectors * LANES,), "int16")
        with e.block(f"for i in range(({count} - 1) * {s.stride[0]} + {reach}):"):
            line = e.let("line", f"{first} * {s.stride[0]} - {s.padding[0]} + i")
            with (
                e.block(f"if {line} >= 0 and {line} < {s.in_size[0]}:"),
                e.loop("v", vectors) as v,
            ):
                left = self.flow.source.halo * grid.depth
                at = f"{b} * {grid.plane} + {grid.origin - left} + {line} * {grid.row} + {v} * 16"
                value = f'T.cast(codes[{lanes(at)}], "int16x16")'
                if grid.zero:
                    value = f"{value} - T.broadcast(T.int16({grid.zero}), 16)"
                e(f"{scratch}[{lanes(f'i * {grid.row} + {v} * 16')}] = {value}")
        return scratch, "0"

    def _weights(self, group: str) -> str:
        """Copy the weights as 16-bit values [words, 2, 16, 2]."""
        e, count = self.e, self.depth.packed * WORD * LANES
        scratch = e.alloc("wide", (count,), "int16")
        with e.loop("v", count // 64) as v:
            word = e.let("word", f"weight[{lanes(f'({group}) * {count} + {v} * 64', 64)}]")
            for part in range(4):
                first, half = part % 2 * HALF, part // 2
                order = [WORD * (first + i) + 2 * half + k for i in range(HALF) for k in (0, 1)]
                value = f'T.cast(T.Shuffle([{word}], {order}), "int16x16")'
                e(f"{scratch}[{lanes(f'{v} * 64 + {part * LANES}')}] = {value}")
        return scratch

    def _start(self, group: str, half: int) -> str:
        return f"T.broadcast(0, {HALF})"

    def _tap(
        self,
        line: str,
        tap: str,
        j: str,
        group: str,
        acc: list[list[str]],
        live: tuple[int, int],
        place: Place,
    ) -> None:
        e, depth, grid = self.e, self.depth, self.grid
        step = self.flow.shape.stride[1] * grid.depth
        run = f"({tap} * {depth.columns} + {j}) * {depth.most}"
        word = e.let("word", f"({run}) * 2")
        at = e.let("at", f"{line} + {j} * {self.flow.shape.dilation[1] * grid.depth}")
        here = lanes(0, HALF)
        with e.loop("q", 2 * depth.words) as q:
            weights = []
            for half in range(2):
                where = f"({word} + {q}) * {2 * LANES} + {half * LANES}"
                weights.append(e.let("w", f"{place[2]}[{lanes(where)}]"))
            for p in range(*live):
                pair = f"{place[0]}[{lanes(f'{at} + {q} * 2 + {p * step}', 2)}]"
                both = f'T.broadcast(T.reinterpret({pair}, dtype="int32"), {HALF})'
                pixel = e.let("a", f'T.reinterpret({both}, dtype="int16x16")')
                for name, w in zip(acc[p], weights, strict=True):
                    product = (
                        'T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", '
                        f"{pixel}, {w})"
                    )
                    e(f"{name}[{here}] = {name}[{here}] + {product}")


@final
class _Bytes(_Product):
    """Bytes as they lie: codes of 7 bits."""

    @property
    def _skip(self) -> bool:
        return not self.flow.source.signed

    def _pixels(self, b: str, first: str, count: str) -> tuple[str, str]:
        s, grid = self.flow.shape, self.grid
        left = grid.origin - self.flow.source.halo * grid.depth
        line = f"({first} * {s.stride[0]} - {s.padding[0]}) * {grid.row}"
        return "codes", self.e.let("origin", f"{b} * {grid.plane} + {left} + {line}")

    def _weights(self, group: str) -> str:
        return "weight"

    def _start(self, group: str, half: int) -> str:
        if not self.flow.source.signed:
            return f"T.broadcast(0, {HALF})"
        out_max = ceil_div(self.channels_max[0], LANES) * LANES
        line = (ceil_div(self.flow.shape.in_channels, RANK_STEP) - 1) * out_max + half * HALF
        at = f"{line} + ({group}) * {LANES}"
        return self.e.let("start", conv_flow.start_of(self.flow.source, at, HALF))

    def _tap(
        self,
        line: str,
        tap: str,
        j: str,
        group: str,
        acc: list[list[str]],
        live: tuple[int, int],
        place: Place,
    ) -> None:
        e, depth, grid = self.e, self.depth, self.grid
        step = self.flow.shape.stride[1] * grid.depth
        run = f"({group}) * {depth.packed} + ({tap} * {depth.columns} + {j}) * {depth.most}"
        word = e.let("word", run)
        at = e.let("at", f"{line} + {j} * {self.flow.shape.dilation[1] * grid.depth}")
        here, ones = lanes(0, HALF), f"T.broadcast(T.int16(1), {LANES})"
        call = "T.call_llvm_pure_intrin"
        with e.loop("q", depth.words) as q:
            weights = []
            for half in range(2):
                where = f"({word} + {q}) * {WORD * LANES} + {half * WORD * HALF}"
                weights.append(e.let("w", f"{place[2]}[{lanes(where, WORD * HALF)}]"))
            for p in range(*live):
                four = f"{place[0]}[{lanes(f'{at} + {q} * {WORD} + {p * step}', WORD)}]"
                both = f'T.broadcast(T.reinterpret({four}, dtype="int32"), {HALF})'
                pixel = e.let("a", f'T.reinterpret({both}, dtype="int8x{WORD * HALF}")')
                for name, w in zip(acc[p], weights, strict=True):
                    pairs = f'{call}("int16x16", "llvm.x86.avx2.pmadd.ub.sw", {pixel}, {w})'
                    sums = f'{call}("int32x8", "llvm.x86.avx2.pmadd.wd", {pairs}, {ones})'
                    e(f"{name}[{here}] = {name}[{here}] + {sums}")
