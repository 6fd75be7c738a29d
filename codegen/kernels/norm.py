"""Normalization of rows, with what stands around it in a network: residual sum before, int8 after.

One pass over memory: the row stays in the first-level cache while it is summed, normalized and
quantized, so the quantization pass of the layer that follows disappears.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from t3c.codegen.kernels.emit import (
    LANES,
    ROUND,
    ROUND_BITS,
    Emitter,
    bits,
    buffer,
    ceil_div,
    f32,
    i32,
    kernel_name,
    lanes,
    load,
    splat,
    store,
)
from t3c.codegen.kernels.family import Kernel
from t3c.codegen.kernels.linear_tiles import DEPTH, CodeLayout
from t3c.codegen.kernels.vectors import Vectors

GROUPS = DEPTH // LANES
"""Vectors of a column block, each with its own partial sum."""
WORTH = 1 << 15
"""Elements above which several threads help."""
TASKS = 16
"""Parallel tasks to offer."""


@dataclass(frozen=True, slots=True)
class NormOptions:
    """What a kernel does besides normalizing.

    Attributes:
        scaled: Multiply by gamma [cols].
        shifted: Add beta [cols]; needs `scaled`.
        residual: Normalize x + residual.
        keep_sum: Give x + residual as an output too; needs `residual`.
        keep_output: Give the float result as an output; drop it where only its codes are read.
        layout: Also quantize the result, into codes of this layout; None: do not.
    """

    scaled: bool = True
    shifted: bool = True
    residual: bool = False
    keep_sum: bool = False
    keep_output: bool = True
    layout: CodeLayout | None = None

    def __post_init__(self) -> None:
        """Refuse a shift without a scale and a sum of one input."""
        if self.shifted and not self.scaled:
            raise ValueError("shifted norms are scaled too; give gamma, ones if there is none")
        if self.keep_sum and not self.residual:
            raise ValueError("keep_sum without residual would give back the input; drop it")
        if not self.keep_output and self.layout is None:
            raise ValueError("a norm without output and codes has no result; keep one of them")


def layer_norm(rows: int, cols: int, eps: float, options: NormOptions | None = None) -> Kernel:
    """(x, [residual], [gamma], [beta]) -> ([sum], y, [codes, scales]); y = (x - mean) / deviation.

    Args:
        rows: Rows of x; each is normalized for itself.
        cols: Columns of x.
        eps: Added to the variance.
        options: None: gamma and beta, nothing else.
    """
    return _Norm(rows, cols, eps, options or NormOptions(), centred=True).kernel()


def rms_norm(rows: int, cols: int, eps: float, options: NormOptions | None = None) -> Kernel:
    """(x, [residual], [gamma]) -> ([sum], y, [codes, scales]); y = x / sqrt(mean(x**2) + eps).

    Args:
        rows: Rows of x; each is normalized for itself.
        cols: Columns of x.
        eps: Added to the mean square.
        options: None: gamma, nothing else.
    """
    given = options or NormOptions(shifted=False)
    return _Norm(rows, cols, eps, given, centred=False).kernel()


@final
class _Norm:
    """Writes one kernel."""

    def __init__(
        self, rows: int, cols: int, eps: float, options: NormOptions, *, centred: bool
    ) -> None:
        for name, size in (("rows", rows), ("cols", cols)):
            if size < 1:
                raise ValueError(f"norm kernel: {name} = {size}; need at least 1")
        self.rows, self.cols, self.eps = rows, cols, eps
        self.options, self.centred = options, centred
        self.e = Emitter()
        self.v = Vectors(LANES)

    def name(self) -> str:
        o = self.options
        flags = ("scaled", "shifted", "residual", "keep_sum", "keep_output")
        kept = [flag for flag in flags if getattr(o, flag)]
        layout: tuple[str, ...] = ()
        if o.layout is not None:
            layout = ("tiled" if o.layout.tiled else "rows", "sums" if o.layout.sums else "plain")
        eps = f"{self.eps:.9g}".replace(".", "p")
        kind = "layer_norm" if self.centred else "rms_norm"
        return kernel_name(kind, f"m{self.rows}", f"k{self.cols}", eps, *kept, *layout)

    def kernel(self) -> Kernel:
        o, e, shape = self.options, self.e, (self.rows, self.cols)
        threads = self.rows * self.cols >= WORTH
        tasks = min(TASKS, self.rows) if threads else 1
        share = ceil_div(self.rows, tasks)
        with e.parallel("task", tasks, threads) as task:
            self.rest = e.alloc("rest", (LANES,), "float32")
            self.edge = e.alloc("edge", (LANES,), "float32")
            self.kept = ""
            if o.residual and not o.keep_sum:
                self.kept = e.alloc("kept", (self.cols,), "float32")
            self.result = "" if o.keep_output else e.alloc("result", (1, self.cols), "float32")
            with e.loop("row", share) as inner:
                row = e.let("row", f"{task} * {share} + {inner}")
                with e.maybe(f"{row} < {self.rows}" if tasks * share > self.rows else ""):
                    self.row(row)
        if o.layout is not None and o.layout.tiled and self.rows % 16:
            self.pad(o.layout)
        params = [buffer("x", shape, "float32")]
        params += [buffer("residual", shape, "float32")] if o.residual else []
        params += [buffer("gamma", (self.cols,), "float32")] if o.scaled else []
        params += [buffer("beta", (self.cols,), "float32")] if o.shifted else []
        outs: list[tuple[str, tuple[int, ...], str]] = []
        outs += [("sum", shape, "float32")] if o.keep_sum else []
        outs += [("y", shape, "float32")] if o.keep_output else []
        if o.layout is not None:
            outs.append(("codes", o.layout.shape(*shape), o.layout.dtype))
            outs.append(("scales", (o.layout.scales(self.rows),), "float32"))
        params += [buffer(*out) for out in outs]
        name = self.name()
        return Kernel(
            name, e.function(name, params), tuple((size, dtype) for _, size, dtype in outs)
        )

    def sweep(self, visit: Callable[[str, int, int], None]) -> None:
        """Visit(first column, group of partial results, valid columns) for all vectors of a row."""
        blocks, rest = divmod(self.cols, DEPTH)
        if blocks:
            with self.e.loop("block", blocks) as block:
                for u in range(GROUPS):
                    visit(f"({block} * {DEPTH} + {u * LANES})", u, LANES)
        for u in range(ceil_div(rest, LANES)):
            visit(str(blocks * DEPTH + u * LANES), u, min(LANES, rest - u * LANES))

    def partial(self, start: float) -> list[str]:
        """Fresh partial results, one vector for each group."""
        cells = []
        for _ in range(GROUPS):
            cells.append(f"{self.e.alloc('part', (LANES,), 'float32')}[{lanes(0)}]")
            self.e(f"{cells[-1]} = {f32(start)}")
        return cells

    def mean(self, cells: list[str]) -> str:
        """Sum of all partial results over the number of columns, as a vector."""
        a, b, c, d = cells
        total = self.v.total(self.e, self.e.let("sum", f"({a} + {b}) + ({c} + {d})"))
        return self.e.let("mean", splat(f"{total} * T.float32({1 / self.cols!r})"))

    def row(self, row: str) -> None:
        o, e = self.options, self.e
        sums = self.partial(0.0)

        def gather(col: str, u: int, valid: int) -> None:
            if valid < LANES:
                e(f"{self.rest}[{lanes(0)}] = {f32(0.0)}")
            value = load(e, self.rest, "x", row, col, valid)
            if o.residual:
                other = load(e, self.rest, "residual", row, col, valid)
                value = e.let("s", f"{value} + {other}")
            if o.keep_sum:
                store(e, self.rest, "sum", row, col, value, valid)
                if valid < LANES:
                    e(f"{self.rest}[{lanes(0)}] = {f32(0.0)}")
            if valid < LANES:
                e(f"{self.edge}[{lanes(0)}] = {value}")
            elif self.kept:
                e(f"{self.kept}[{lanes(col)}] = {value}")
            term = value if self.centred else f"{value} * {value}"
            e(f"{sums[u]} = {sums[u]} + {term}")

        self.sweep(gather)
        middle = self.mean(sums)
        spread = middle
        if self.centred:
            squares = self.partial(0.0)

            def deviate(col: str, u: int, valid: int) -> None:
                apart = e.let("d", f"{self.source(row, col, valid)} - {middle}")
                if valid < LANES:
                    there = f"T.ramp(0, 1, {LANES}) < T.broadcast({valid}, {LANES})"
                    apart = e.let("d", f"T.Select({there}, {apart}, {f32(0.0)})")
                e(f"{squares[u]} = {squares[u]} + {apart} * {apart}")

            self.sweep(deviate)
            spread = self.mean(squares)
        root = f"T.sqrt({spread} + {f32(self.eps)})"
        factor = e.let("factor", f"{f32(1.0)} / {root}")
        peaks = self.partial(0.0) if o.layout is not None else []

        def finish(col: str, u: int, valid: int) -> None:
            value = self.source(row, col, valid)
            value = e.let(
                "n", f"({value} - {middle}) * {factor}" if self.centred else f"{value} * {factor}"
            )
            if o.scaled:
                value = e.let("n", f"{value} * {self.column('gamma', col, valid)}")
            if o.shifted:
                value = e.let("n", f"{value} + {self.column('beta', col, valid)}")
            if o.keep_output or valid == LANES:
                store(e, self.rest, *self.output(row), col, value, valid)
            if o.layout is None:
                return
            if valid < LANES:
                there = f"T.ramp(0, 1, {LANES}) < T.broadcast({valid}, {LANES})"
                value = e.let("n", f"T.Select({there}, {value}, {f32(0.0)})")
                e(f"{self.edge}[{lanes(0)}] = {value}")
            e(f"{peaks[u]} = T.max({peaks[u]}, T.abs({value}))")

        self.sweep(finish)
        if o.layout is not None:
            self.quantize(row, o.layout, peaks)

    def source(self, row: str, col: str, valid: int) -> str:
        """What is normalized, from the nearest copy that is there anyway."""
        if valid < LANES:
            return f"{self.edge}[{lanes(0)}]"
        if self.kept:
            return f"{self.kept}[{lanes(col)}]"
        return f"{'sum' if self.options.keep_sum else 'x'}[{row}, {lanes(col)}]"

    def output(self, row: str) -> tuple[str, str]:
        """Buffer and row of the float result."""
        return ("y", row) if self.options.keep_output else (self.result, "0")

    def column(self, name: str, col: str, valid: int) -> str:
        """A vector of gamma or beta."""
        if valid == LANES:
            return f"{name}[{lanes(col)}]"
        e = self.e
        for j in range(valid):
            e(f"{self.rest}[{j}] = {name}[{col} + {j}]")
        return e.let("c", f"{self.rest}[{lanes(0)}]")

    def quantize(self, row: str, layout: CodeLayout, peaks: list[str]) -> None:
        """Codes and scale of the finished row, as linear_tiles.emit_quantize makes them."""
        e = self.e
        a, b, c, d = peaks
        most = e.let("most", f"T.max(T.max({a}, {b}), T.max({c}, {d}))")
        top = e.let("top", f"T.max({self.v.largest(e, most)}, T.float32(1e-12))")
        e(f"scales[{row}] = {top} * T.float32({1 / 127!r})")
        scale = e.let("scale", splat(f"T.float32(127) / {top}"))
        total = e.alloc("total", (LANES,), "int32") if layout.sums else ""
        if layout.sums:
            e(f"{total}[{lanes(0)}] = {i32(0)}")

        def write(col: str, u: int, valid: int) -> None:
            value = (
                f"{self.edge}[{lanes(0)}]"
                if valid < LANES
                else "{}[{}, {}]".format(*self.output(row), lanes(col))
            )
            cut = f"T.min({value} * {scale}, {f32(127.0)})"
            code = e.let("code", f"{bits(f'{cut} + {f32(ROUND)}')} - {i32(ROUND_BITS)}")
            if layout.sums:
                e(f"{total}[{lanes(0)}] = {total}[{lanes(0)}] + {code}")
            at = layout.at("codes", row, f"({col} // {DEPTH})", u * LANES)
            e(f'{at} = T.cast({code}, "{layout.dtype}x{LANES}")')

        self.sweep(write)
        zero = f"T.broadcast(T.{layout.dtype}(0), {LANES})"
        if rest := self.cols % DEPTH:
            for u in range(ceil_div(rest, LANES), GROUPS):
                e(f"{layout.at('codes', row, str(self.cols // DEPTH), u * LANES)} = {zero}")
        if layout.sums:
            count = layout.scales(self.rows) // 2
            whole = self.v.total(e, e.let("whole", f"{total}[{lanes(0)}]"))
            e(f'scales[{row} + {count}] = T.cast({whole} * -128, "float32")')

    def pad(self, layout: CodeLayout) -> None:
        """Zero rows up to a whole tile."""
        e = self.e
        with (
            e.loop("row", 16 - self.rows % 16) as inner,
            e.loop("block", ceil_div(self.cols, DEPTH)) as block,
        ):
            row = e.let("row", f"{inner} + {self.rows}")
            e(f"scales[{row}] = T.float32(0)")
            for u in range(GROUPS):
                zero = f"T.broadcast(T.{layout.dtype}(0), {LANES})"
                e(f"{layout.at('codes', row, block, u * LANES)} = {zero}")
