"""Convolution with VNNI on channels-last codes: runs of pixels by vectors of channels.

A word of four activations is broadcast (the unsigned operand), a vector of weights is sixteen
channels of one word (the signed one). Signed images are stored plus 128; their accumulators start
at -128 times the sum of the weights.
"""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
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

PARALLEL_MACS = 1 << 23
"""Multiply-adds worth several threads: about 50 us of one."""
L1_BYTES = 48 << 10
"""Weights above a first-level cache are read once instead of once per row."""

THIN = 160
"""Products up to which storing a block takes so long that the next one should begin early."""


@dataclass(frozen=True, slots=True)
class ConvSchedule(Schedule):
    """What registers hold, and the outer loop.

    Attributes:
        pixels: Longest run of pixels.
        vectors: Vectors of sixteen output channels.
        outer: "rows" or "channels".
    """

    pixels: int
    vectors: int
    outer: str


class AbstractVnniConv(AbstractX86Conv, Scheduled):
    """A family whose instruction is vpdpbusd."""

    blocks: ClassVar[tuple[tuple[int, int], ...]]
    """(pixels, vectors) of the accumulators that the registers hold beside their operands."""

    @abstractmethod
    def block(self, op: Op) -> tuple[int, int]:
        """The one of `blocks` that the rule takes."""

    def __init__(self, records: Mapping[str, Schedule] | None = None) -> None:
        """Records: key of an operator -> its tuned schedule."""
        self.records: Mapping[str, Schedule] = records or {}

    def schedules(self, op: Op) -> tuple[Schedule, ...]:
        """Register blocks of at most 28 accumulators by the outer loop."""
        if op.kind not in KINDS:
            raise self.unknown(op)
        groups = ceil_div(op["o"], LANES)
        return tuple(
            ConvSchedule(pixels, vectors, outer)
            for pixels, vectors in self.blocks
            if vectors <= groups
            for outer in ("rows", "channels")
        )

    def default(self, op: Op) -> Schedule:
        """The family's block; weights that leave the first cache are read once."""
        if op.kind not in KINDS:
            raise self.unknown(op)
        weights = op["c"] * op["o"] * op["kh"] * op["kw"]
        return ConvSchedule(*self.block(op), "channels" if weights > L1_BYTES else "rows")

    def kernel(self, op: Op) -> Kernel:
        """A flow between unsigned images, a residual is codes too; planes by each image's range."""
        s = shape_of(op)
        if op.kind == "planes":
            return self.conv(s, None, op.epilogue)
        source = Image(s.batch, s.in_channels, s.in_size, max(s.padding), signed=False)
        target = Image(s.batch, s.out_channels, s.out_size, 1, signed=False)
        residual = target if "add" in op.epilogue else None
        return self.flow(Flow(s, source, target, residual), None, op.epilogue)

    def pack(self, w: Matrix, bias: F32 | None, shape: ConvShape) -> Packed:
        """Weights [out / 16, words, 16, 4] int8; starts, scale and bias of each channel."""
        return conv_flow.pack(w, bias, shape)

    def product(
        self, output: Output, depth: Depth, most: tuple[int, int], epilogue: str
    ) -> tuple[Op, Schedule, str]:
        """See `AbstractX86Conv.product`."""
        op = op_of(output.flow.shape, epilogue, output.kind)
        schedule = self.pick(op)
        assert isinstance(schedule, ConvSchedule)
        part = LANES if self.wide else LANES // 2
        _Product(output.e, output.flow, depth, most, schedule, output, part).write()
        return op, schedule, self.suffix(op, schedule)


@final
class VnniConv(AbstractVnniConv):
    """The family ``x86-vnni``: registers of 512 bits."""

    name: ClassVar[str] = "x86-vnni"
    wide: ClassVar[bool] = True
    blocks: ClassVar[tuple[tuple[int, int], ...]] = (
        (14, 2),
        (7, 3),
        (8, 3),
        (7, 2),
        (6, 4),
        (4, 4),
        (28, 1),
        (14, 1),
    )

    def block(self, op: Op) -> tuple[int, int]:
        """As square as fits."""
        groups = ceil_div(op["o"], LANES)
        if groups == 1:
            return 14, 1
        if op.kind == "planes" or groups == 2:  # planes are transposed sixteen pixels at a time
            return 14, 2
        if op["c"] * op["kh"] * op["kw"] <= THIN:
            return 7, 2
        if shape_of(op).out_size[1] <= 7:
            return 7, 3
        return (8, 3) if groups == 3 else (6, 4)


@final
class AvxVnniConv(AbstractVnniConv):
    """The family ``x86-avx-vnni``: registers of 256 bits, and sixteen of them."""

    name: ClassVar[str] = "x86-avx-vnni"
    wide: ClassVar[bool] = False
    blocks: ClassVar[tuple[tuple[int, int], ...]] = ((6, 1), (5, 1), (4, 1))

    def block(self, op: Op) -> tuple[int, int]:
        """Twelve accumulators, two vectors of weights, one of pixels."""
        return 6, 1


@dataclass(frozen=True, slots=True)
class _Product:
    """Writer of one convolution kernel."""

    e: Emitter
    flow: Flow
    depth: Depth
    channels_max: tuple[int, int]
    schedule: ConvSchedule
    output: Output
    part: int

    @property
    def _skip(self) -> bool:
        """Whether taps outside the image are left out."""
        return not self.flow.source.signed

    @property
    def _runs(self) -> tuple[Run, ...]:
        skip = self._skip and self.depth.columns == self.flow.shape.kernel[1]
        longest = self.schedule.pixels if self.output.direct else min(self.schedule.pixels, LANES)
        return runs(self.flow.shape, longest, skip=skip)

    def write(self) -> None:
        """The body of the function."""
        e, s = self.e, self.flow.shape
        rows, vectors = s.out_size[0], self.schedule.vectors
        groups = ceil_div(s.out_channels, LANES)
        blocks = ceil_div(groups, vectors)
        macs = s.batch * s.out_channels * rows * s.out_size[1] * self.depth.packed * WORD
        threads = macs >= PARALLEL_MACS
        if self.schedule.outer == "rows":
            with e.parallel("t", s.batch * rows, threads) as t:
                b, r = e.let("b", f"{t} // {rows}"), e.let("r", f"{t} % {rows}")
                with e.loop("n", groups // vectors) as n:
                    self._row(b, r, f"{n} * {vectors}", vectors)
                if groups % vectors:
                    self._row(b, r, str(groups // vectors * vectors), groups % vectors)
            return
        with e.parallel("t", blocks, threads) as n:
            for count, last in ((vectors, False), (groups % vectors, True)):
                if not (count and (last or groups >= vectors)):
                    continue
                with ExitStack() as stack:
                    if groups % vectors and groups >= vectors:
                        test = f"if {n} < {groups // vectors}:"
                        stack.enter_context(e.block("else:" if last else test))
                    with e.loop("b", s.batch) as b, e.loop("r", rows) as r:
                        self._row(b, r, f"{n} * {vectors}", count)

    def _row(self, b: str, r: str, group: str, vectors: int) -> None:
        """One row of output pixels by some vectors of channels."""
        e = self.e
        for run in self._runs:
            with e.loop("c", run.count) as c:
                column = e.let("col", f"{run.first} + {c} * {run.width}")
                self._run(b, r, column, group, vectors, run)

    def _run(self, b: str, r: str, column: str, group: str, vectors: int, run: Run) -> None:
        """One run: products, then store."""
        e, s = self.e, self.flow.shape
        grid = Grid(self.flow.source)
        here, parts = lanes(0, self.part), LANES // self.part
        acc = [
            [
                [e.alloc("acc", (self.part,), "int32") for _ in range(parts)]
                for _ in range(run.width)
            ]
            for _ in range(vectors)
        ]
        for v, pixels in enumerate(acc):
            for part in range(parts):
                value = f"T.broadcast(0, {self.part})"
                if self.flow.source.signed:
                    out_max = ceil_div(self.channels_max[0], LANES) * LANES
                    line = (ceil_div(s.in_channels, RANK_STEP) - 1) * out_max + part * self.part
                    at = f"{line} + ({group} + {v}) * {LANES}"
                    start = conv_flow.start_of(self.flow.source, at, self.part)
                    value = e.let("start", start)
                for pixel in pixels:
                    e(f"{pixel[part]}[{here}] = {value}")
        top = e.let("top", f"{r} * {s.stride[0]} - {s.padding[0]}")
        first, count = "0", str(s.kernel[0])
        if self._skip and s.padding[0]:
            down = s.dilation[0]
            first = e.let("first", f"T.max(0, (0 - {top} + {down - 1}) // {down})")
            last = f"T.min({s.kernel[0]}, ({s.in_size[0] - 1} - {top}) // {down} + 1)"
            count = e.let("taps", f"{last} - {first}")
        left = f"({column} * {s.stride[1]} - {s.padding[1]}) * {grid.depth}"
        base = e.let("base", f"{b} * {grid.plane} + {grid.origin} + {left}")
        with e.block(f"for i in range({count}):"):
            tap = e.let("tap", f"{first} + i")
            start = e.let("line", f"{base} + ({top} + {tap} * {s.dilation[0]}) * {grid.row}")
            across = s.dilation[1] * grid.depth
            if run.inner:
                with e.loop("j", self.depth.columns) as j:
                    self._tap(r, start, tap, j, across, group, acc, (0, run.width))
            else:
                for column_of, live in enumerate(run.live):
                    if live[0] < live[1]:
                        self._tap(r, start, tap, str(column_of), across, group, acc, live)
        sums = [[self._sum(pixel) for pixel in pixels] for pixels in acc]
        self.output.finish(b, row_of(r, column, run.width), group, sums)

    def _tap(
        self,
        row: str,
        line: str,
        tap: str,
        j: str,
        across: int,
        group: str,
        acc: list[list[list[str]]],
        live: tuple[int, int],
    ) -> None:
        """Add the products of one tap, or of one kernel row where its taps are merged."""
        e, depth = self.e, self.depth
        step = self.flow.shape.stride[1] * Grid(self.flow.source).depth
        word = e.let("word", f"({tap} * {depth.columns} + {j}) * {depth.most}")
        at = e.let("at", f"{line} + {j} * {across}")
        with e.loop("q", depth.words) as q:
            weights = []
            for v in range(len(acc)):
                where = f"((({group}) + {v}) * {depth.packed} + {word} + {q}) * {WORD * LANES}"
                width = WORD * self.part
                weights.append(
                    [
                        e.let("w", f"weight[{lanes(f'{where} + {start}', width)}]")
                        for start in range(0, WORD * LANES, width)
                    ]
                )
            if self.schedule.outer == "channels":  # the next block's weights, one vector a row
                where = f"(({group}) + {len(acc)} + T.min({row}, {len(acc) - 1})) * {depth.packed}"
                e.prefetch(f"weight[({where} + {word} + {q}) * 64]", False, 2)
            for p in range(*live):
                four = f"codes[{lanes(f'{at} + {q} * {WORD} + {p * step}', WORD)}]"
                word_of = f'T.broadcast(T.reinterpret({four}, dtype="int32"), {self.part})'
                pixel = e.let("a", f'T.reinterpret({word_of}, dtype="int8x{WORD * self.part}")')
                for pixels, vector in zip(acc, weights, strict=True):
                    for name, w in zip(pixels[p], vector, strict=True):
                        total = f"{name}[{lanes(0, self.part)}]"
                        e(
                            f'{total} = T.call_llvm_pure_intrin("int32x{self.part}", '
                            f'"llvm.x86.avx512.vpdpbusd.{32 * self.part}", {total}, {pixel}, {w})'
                        )

    def _sum(self, names: list[str]) -> str:
        """Sixteen lanes of one pixel."""
        parts = [f"{name}[{lanes(0, self.part)}]" for name in names]
        whole = f"T.Shuffle([{', '.join(parts)}], {list(range(LANES))})"
        return parts[0] if len(parts) == 1 else whole
