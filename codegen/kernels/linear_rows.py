"""Int8 linear kernels over row-major activations and packed lines of weights.

A line of weights holds 16 outputs x `depth` inputs, the operand of one or several dot-product
instructions; a block of outputs keeps its accumulators in registers. What differs between
processors is a `Dot`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from t3c.codegen.kernels.emit import (
    LANES,
    Emitter,
    buffer,
    ceil_div,
    epilogue_steps,
    kernel_name,
    lanes,
)
from t3c.codegen.kernels.family import Kernel
from t3c.codegen.kernels.gemv_depth import FEW, DepthProduct
from t3c.codegen.kernels.linear_tiles import (
    CACHE,
    DEPTH,
    PANEL,
    Blocks,
    CodeLayout,
    Finish,
    cut,
    emit_quantize,
    even_rows,
    walk_blocks,
)
from t3c.codegen.kernels.schedule import Schedule

BYTES_US = 2e4
"""Weight bytes read from memory in a microsecond on one thread."""
CACHE_LINE = 64
"""Bytes that a prefetch brings."""
FETCH_BLOCKS = 4
"""Row blocks from which on a weight panel is used often enough to fetch the next one meanwhile."""
WORTH_US = 100.0
"""Work above which several threads help."""


KILOBYTES = (16, 64, CACHE // 1024)
"""Choices of `RowTile.kilobytes`."""


@dataclass(frozen=True, slots=True)
class RowTile(Schedule):
    """How one product is cut.

    Attributes:
        rows: Most rows of a register block.
        panels: Weight panels of a register block.
        kilobytes: Activations that one run over the weights keeps in cache: few turn the loops
            over rows and over weights around.
    """

    rows: int
    panels: int
    kilobytes: int


@dataclass(frozen=True, slots=True)
class RowPair(Schedule):
    """How the two products of a low-rank kernel are cut; see `RowTile`."""

    low_rows: int
    low_panels: int
    rows: int
    panels: int

    @property
    def low(self) -> RowTile:
        """The first product."""
        return RowTile(self.low_rows, self.low_panels, CACHE // 1024)

    @property
    def high(self) -> RowTile:
        """The second product."""
        return RowTile(self.rows, self.panels, CACHE // 1024)


class Dot(ABC):
    """One processor's way to multiply a line of weights by the inputs of a row."""

    layout: ClassVar[CodeLayout]
    depth: ClassVar[int]
    """Inputs in a line."""
    height: ClassVar[int]
    """Most rows of a block."""
    wide: ClassVar[int]
    """Panels of a block."""
    alone: ClassVar[int]
    """Panels of a block of one row: enough accumulators to hide the instruction's latency."""
    part: ClassVar[int]
    """Int32 lanes of an accumulator register."""
    registers: ClassVar[int] = 32
    """Vector registers of the processor."""
    tables: ClassVar[bool] = False
    """Whether activations are looked up (`tables.py`)."""
    macs_us: ClassVar[float]
    """Multiply-adds in a microsecond on one thread."""
    quantized_us: ClassVar[float]
    """Elements quantized in a microsecond on one thread."""

    @abstractmethod
    def weight(self, line: str) -> str:
        """What is multiplied, of `part` outputs x `depth` bytes `line`."""

    @abstractmethod
    def inputs(self, codes: str) -> str:
        """`depth` codes, repeated for each of the `part` outputs."""

    @abstractmethod
    def add(self, acc: str, weight: str, inputs: str) -> str:
        """The accumulators plus their products."""

    def lines(self) -> int:
        """Lines in a depth block of 64 inputs."""
        return DEPTH // self.depth

    def line_bytes(self) -> int:
        """Bytes of a line."""
        return PANEL * self.depth


@dataclass(frozen=True, slots=True)
class Product:
    """One product over row-major activations and packed weights.

    Attributes:
        codes: Activations, [m][k padded to 64].
        weights: Weight buffer.
        depth_first: The weights are [k/64][n/16][16][64].
        dot: The multiplication.
        size: (m, n, k).
        finish: What becomes of the accumulators.
        tile: The cut.
    """

    codes: str
    weights: str
    depth_first: bool
    dot: Dot
    size: tuple[int, int, int]
    finish: Finish
    tile: RowTile

    @property
    def panels(self) -> int:
        """Panels of the output."""
        return ceil_div(self.size[1], PANEL)

    def cut(self, rows: tuple[tuple[int, int], ...]) -> Blocks:
        """Tasks over runs of row blocks."""
        m, n, k = self.size
        threads = m * n * k / self.dot.macs_us > WORTH_US or n * k / BYTES_US > WORTH_US
        near = self.tile.kilobytes * 1024
        return cut(rows, self.panels, self.tile.panels, k, threads, near)

    def emit(self, e: Emitter) -> None:
        """Emit the whole product."""
        m, n, _ = self.size
        width = self.tile.panels
        rest = {"": ""}

        def prepare() -> None:
            rest[""] = e.alloc("rest", (LANES,), "int32" if self.finish.raw else "float32")

        def body(row: str, height: int, panel: str, count: int) -> None:
            self._block(e, rest[""], row, height, panel, [PANEL] * count)

        def last(row: str, height: int, panel: str, count: int) -> None:
            valid = [self.finish.valid(int(panel) + i) for i in range(count)]
            self._block(e, rest[""], row, height, panel, valid)

        blocks = self.cut(even_rows(m, self.tile.rows))
        walk_blocks(e, blocks, prepare, body, last if n % (width * PANEL) else None)

    def _block(
        self, e: Emitter, rest: str, row: str, height: int, panel: str, valid: list[int]
    ) -> None:
        dot = self.dot
        parts = len(valid) * LANES // dot.part
        accs = []
        for i in range(height):
            start = "T.int32(0)"
            if dot.layout.sums:
                excess = f"{self.finish.scales}[{row} + {i} + {self.size[0]}]"
                start = e.let("start", f'T.cast({excess}, "int32")')
            names = [e.alloc("acc", (dot.part,), "int32") for _ in range(parts)]
            for name in names:
                e(f"{name}[{lanes(0, dot.part)}] = T.broadcast({start}, {dot.part})")
            accs.append(names)
        count = ceil_div(self.size[2], dot.depth)
        whole, short = divmod(count, dot.lines())
        if whole:
            with e.loop("k", whole) as kb:
                self._fetch(e, row, height, panel, len(valid), kb)
                with e.loop("line", dot.lines()) as line:
                    self._line(e, accs, row, panel, kb, line)
        if short:
            with e.loop("line", short) as line:
                self._line(e, accs, row, panel, str(whole), line)
        hoisted = [self.finish.hoist(e, f"{panel} + {j}") for j in range(len(valid))]
        if self.finish.long:
            self._finish_by_rows(e, accs, rest, row, panel, hoisted, valid)
            return
        each = LANES // dot.part
        for i, names in enumerate(accs):
            for j, some in enumerate(valid):
                value = f"{names[j]}[{lanes(0)}]"
                if each > 1:
                    whole_vector = e.alloc("sum", (LANES,), "int32")
                    for p in range(each):
                        at = lanes(p * dot.part, dot.part)
                        part = names[j * each + p]
                        e(f"{whole_vector}[{at}] = {part}[{lanes(0, dot.part)}]")
                    value = f"{whole_vector}[{lanes(0)}]"
                line = f"{row} + {i}"
                self.finish.write(e, rest, value, line, f"{panel} + {j}", hoisted[j], some)

    def _fetch(self, e: Emitter, row: str, height: int, panel: str, count: int, kb: str) -> None:
        """Ask for this row block's share of the next panels: they arrive while these are used."""
        rows = even_rows(self.size[0], self.tile.rows)
        blocks = ceil_div(rows[0][1], self.cut(rows).row_tasks)
        if blocks < FETCH_BLOCKS:
            return
        lines = DEPTH * PANEL // CACHE_LINE  # of a panel in a depth block
        each = ceil_div(count * lines, blocks)
        for u in range(each):
            at = f"({row} // {height} % {blocks} * {each} + {u})"
            place = f"T.min({panel} + {count} + {at} // {lines}, {self.panels - 1})"
            where = f"{kb}, {place}" if self.depth_first else f"{place}, {kb}"
            line = f"{at} % {lines} * {CACHE_LINE // self.dot.line_bytes()}"
            e.prefetch(f"{self.weights}[{where}, {line}, 0]", write=False, locality=2)

    def _finish_by_rows(
        self,
        e: Emitter,
        accs: list[list[str]],
        rest: str,
        row: str,
        panel: str,
        hoisted: list[tuple[str, str]],
        valid: list[int],
    ) -> None:
        """Finish in a loop over rows: an epilogue of many instructions is not repeated for each."""
        part = self.dot.part
        block = e.alloc("block", (len(accs), len(valid) * LANES), "int32")
        for i, names in enumerate(accs):
            for p, name in enumerate(names):
                e(f"{block}[{i}, {lanes(p * part, part)}] = {name}[{lanes(0, part)}]")
        with e.loop("i", len(accs)) as line:
            for j, some in enumerate(valid):
                value = f"{block}[{line}, {lanes(j * LANES)}]"
                at = e.let("at", f"{row} + {line}")
                self.finish.write(e, rest, value, at, f"{panel} + {j}", hoisted[j], some)

    def _line(
        self, e: Emitter, accs: list[list[str]], row: str, panel: str, kb: str, line: str
    ) -> None:
        """One line of every panel times its inputs of every row."""
        dot = self.dot
        weights = []
        each = LANES // dot.part
        size = dot.part * dot.depth
        for j in range(len(accs[0])):
            at = f"{panel} + {j // each}"
            where = f"{kb}, {at}" if self.depth_first else f"{at}, {kb}"
            part = lanes(j % each * size, size)
            weights.append(e.let("w", dot.weight(f"{self.weights}[{where}, {line}, {part}]")))
        for i, names in enumerate(accs):
            at = lanes(f"{kb} * {DEPTH} + {line} * {dot.depth}", dot.depth)
            x = e.let("x", dot.inputs(f"{self.codes}[{row} + {i}, {at}]"))
            for name, w in zip(names, weights, strict=True):
                acc = f"{name}[{lanes(0, dot.part)}]"
                e(f"{acc} = {dot.add(acc, w, x)}")


@dataclass(frozen=True, slots=True)
class RowKernels:
    """Kernels over row-major activations.

    Attributes:
        prefix: Begins every kernel's name.
        dot: The multiplication.
    """

    prefix: str
    dot: Dot

    def tile(self, m: int, n: int) -> RowTile:
        """The rule: as many accumulators as the registers hold, all activations in one run."""
        wide = self.dot.alone if m == 1 else self.dot.wide
        rows = even_rows(m, self.dot.height)[0][0]
        return RowTile(rows, min(wide, ceil_div(n, PANEL)), CACHE // 1024)

    def tiles(self, m: int, n: int, k: int) -> tuple[RowTile, ...]:
        """Every cut whose block fits the registers, one for each kernel text."""
        each = LANES // self.dot.part
        found = {self.tile(m, n)}
        for panels in range(1, min(ceil_div(n, PANEL), 2 * self.dot.alone) + 1):
            # the weights of a block, one activation, and the accumulators
            most = (self.dot.registers - 1) // (panels * each) - 1
            heights = {even_rows(m, most)[0][0] for most in range(1, most + 1)}
            for rows in heights:
                # a block with few accumulators waits for the instruction
                if rows == max(heights) or rows * panels * each * 3 >= self.dot.registers:
                    for kilobytes in self._kilobytes(m, k, rows):
                        found.add(RowTile(rows, panels, kilobytes))
        return tuple(sorted(found, key=lambda t: (t.rows, t.panels, t.kilobytes)))

    def _kilobytes(self, m: int, k: int, rows: int) -> list[int]:
        """Choices that differ in the number of runs, the largest first."""
        runs: dict[int, int] = {}
        for kilobytes in reversed(KILOBYTES):
            fit = max(1, kilobytes * 1024 // (rows * k))
            runs.setdefault(ceil_div(ceil_div(m, rows), fit), kilobytes)
        return list(runs.values())

    def pair(self, m: int, n: int, rank: int) -> RowPair:
        """The rule for both products."""
        low, high = self.tile(m, rank), self.tile(m, n)
        return RowPair(low.rows, low.panels, high.rows, high.panels)

    def pairs(self, m: int, n: int, rank: int) -> tuple[RowPair, ...]:
        """Every pair of cuts that keep all activations in one run."""
        lows, highs = (
            [t for t in self.tiles(m, size, 1) if t.kilobytes == CACHE // 1024]
            for size in (rank, n)
        )
        return tuple(RowPair(a.rows, a.panels, b.rows, b.panels) for a in lows for b in highs)

    def quantize(self, m: int, k: int) -> Kernel:
        """Codes [m][k padded to 64]; scales and, where the dot needs it, the excess of each row."""
        e = Emitter()
        threads = m * k / self.dot.quantized_us > WORTH_US
        emit_quantize(e, self.dot.layout, "x", "codes", "scales", (m, k), threads=threads)
        name = kernel_name("linear", self.prefix, "quantize", f"m{m}", f"k{k}")
        codes, scales = self.dot.layout.shape(m, k), (self.dot.layout.scales(m),)
        params = [
            buffer("x", (m, k), "float32"),
            buffer("codes", codes, self.dot.layout.dtype),
            buffer("scales", scales, "float32"),
        ]
        return Kernel(
            name, e.function(name, params), ((codes, self.dot.layout.dtype), (scales, "float32"))
        )

    def dense(
        self,
        m: int,
        n: int,
        k: int,
        epilogue: str,
        tile: RowTile,
        *,
        raw: bool,
        suffix: str = "",
    ) -> Kernel:
        """See `AbstractLinearKernels.dense`; `suffix` ends the name."""
        steps = epilogue_steps("" if raw else epilogue)
        e = Emitter()
        finish = Finish("y", n, "scales", "scale", "bias", steps, raw, self.dot.tables)
        Product("codes", "weight", False, self.dot, (m, n, k), finish, tile).emit(e)
        sizes = (f"m{m}", f"n{n}", f"k{k}")
        end = "raw" if raw else epilogue
        name = kernel_name("linear", self.prefix, "dense", *sizes, end, suffix)
        padded, line = ceil_div(n, PANEL), (self.dot.lines(), self.dot.line_bytes())
        params = [
            buffer("codes", self.dot.layout.shape(m, k), self.dot.layout.dtype),
            buffer("scales", (self.dot.layout.scales(m),), "float32"),
            buffer("weight", (padded, ceil_div(k, DEPTH), *line), "int8"),
            buffer("scale", (padded * PANEL,), "float32"),
            buffer("bias", (padded * PANEL,), "float32"),
        ]
        if "add" in steps:
            params.append(buffer("residual", (m, n), "float32"))
        dtype = "int32" if raw else "float32"
        params.append(buffer("y", (m, n), dtype))
        return Kernel(name, e.function(name, params), (((m, n), dtype),))

    def low_rank(
        self,
        m: int,
        n: int,
        k: int,
        ranks: tuple[int, int],
        epilogue: str,
        pair: RowPair,
        suffix: str = "",
    ) -> Kernel:
        """See `AbstractLinearKernels.low_rank`; `ranks` are the rank and that of the buffers."""
        rank, rank_max = ranks
        steps = epilogue_steps(epilogue)
        e = Emitter()
        middle = e.alloc("middle", (m, rank), "float32")
        codes = e.alloc("codes", self.dot.layout.shape(m, rank), self.dot.layout.dtype)
        scales = e.alloc("scales", (self.dot.layout.scales(m),), "float32")
        thin = Finish(middle, rank, "scales", "low_scale", None)
        Product("codes", "low", False, self.dot, (m, rank, k), thin, pair.low).emit(e)
        threads = m * rank / self.dot.quantized_us > WORTH_US
        emit_quantize(e, self.dot.layout, middle, codes, scales, (m, rank), threads=threads)
        wide = Finish("y", n, scales, "high_scale", "bias", steps, tables=self.dot.tables)
        if m <= FEW:
            DepthProduct(codes, "high", self.dot, (m, n, rank), wide).emit(e)
        else:
            Product(codes, "high", True, self.dot, (m, n, rank), wide, pair.high).emit(e)
        sizes = (f"m{m}", f"n{n}", f"k{k}", f"r{rank}of{rank_max}")
        name = kernel_name("linear", self.prefix, "low_rank", *sizes, epilogue, suffix)
        padded, padded_rank = ceil_div(n, PANEL), ceil_div(rank_max, PANEL)
        line = (self.dot.lines(), self.dot.line_bytes())
        params = [
            buffer("codes", self.dot.layout.shape(m, k), self.dot.layout.dtype),
            buffer("scales", (self.dot.layout.scales(m),), "float32"),
            buffer("low", (padded_rank, ceil_div(k, DEPTH), *line), "int8"),
            buffer("low_scale", (padded_rank * PANEL,), "float32"),
            buffer("high", (ceil_div(rank_max, DEPTH), padded, *line), "int8"),
            buffer("high_scale", (padded * PANEL,), "float32"),
            buffer("bias", (padded * PANEL,), "float32"),
        ]
        if "add" in steps:
            params.append(buffer("residual", (m, n), "float32"))
        params.append(buffer("y", (m, n), "float32"))
        return Kernel(name, e.function(name, params), (((m, n), "float32"),))
