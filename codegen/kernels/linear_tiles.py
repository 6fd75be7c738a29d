"""What the x86 linear families share: packing, the quantization pass, the walk over output blocks.

Weights [n, k] are packed [n/16][k/64][16][64]: a line of 64 bytes holds 16 outputs x 4 inputs, the
operand of one VNNI instruction; 16 lines are one AMX tile. Both sizes are padded with zeros.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.kernels.emit import (
    LANES,
    ROUND,
    ROUND_BITS,
    Emitter,
    activate,
    bits,
    ceil_div,
    f32,
    i32,
    lanes,
    load,
    splat,
    store,
)
from t3c.codegen.kernels.tables import LOOK_UP
from t3c.core.codes import F32, I8
from t3c.core.errors import LoweringError

PANEL = 16
"""Output columns of one weight panel."""
DEPTH = 64
"""Input columns of one tile."""
TASKS = 16
"""Tasks of a kernel that several threads may share: enough for 16 threads to finish together."""
CACHE = 512 * 1024
"""Bytes of activations that one run over the weights keeps in the second-level cache."""


def check_sizes(family: str, **sizes: int) -> None:
    """Refuse sizes below 1.

    Raises:
        LoweringError: If a size is below 1.
    """
    for name, size in sizes.items():
        if size < 1:
            raise LoweringError(f"{family} linear kernel: {name} = {size}; need at least 1")


def check_rank(family: str, rank: int, rank_max: int, step: int) -> None:
    """Refuse ranks that the packed buffers cannot serve.

    Raises:
        LoweringError: If a rank is not a positive multiple of `step` up to `rank_max`.
    """
    for name, value in (("rank", rank), ("rank_max", rank_max)):
        if value < 1 or value % step:
            near = max(step, value // step * step)
            raise LoweringError(
                f"{family} low rank: {name} {value} is not a positive multiple of {step}; nearest "
                f"are {near} and {near + step}"
            )
    if rank > rank_max:
        raise LoweringError(
            f"{family} low rank: rank {rank} is above rank_max {rank_max} of the packed weights; "
            "pack them for a larger rank_max"
        )


def pad_to(x: NDArray[np.generic], *multiples: int) -> NDArray[np.generic]:
    """`x` with zeros appended until each size is a multiple."""
    widths = [(0, -size % step) for size, step in zip(x.shape, multiples, strict=True)]
    return np.pad(x, widths)


def pack_lines(q: I8, depth: int) -> NDArray[np.int8]:
    """Codes [n, k] as [n/16][k/64][64/depth][16 * depth]: lines of 16 outputs x `depth` inputs."""
    w = pad_to(q, PANEL, DEPTH)
    n, k = w.shape
    blocks = w.reshape(n // PANEL, PANEL, k // DEPTH, DEPTH // depth, depth)
    shape = (n // PANEL, k // DEPTH, DEPTH // depth, PANEL * depth)
    return np.ascontiguousarray(blocks.transpose(0, 2, 3, 1, 4).reshape(shape)).astype(np.int8)


def pack_panels(q: I8) -> NDArray[np.int8]:
    """Codes [n, k] as [n/16][k/64][16][64]."""
    return pack_lines(q, 4)


def pack_depth_first(q: I8) -> NDArray[np.int8]:
    """Codes [n, k] as [k/64][n/16][16][64]: every prefix of k is a prefix of the buffer."""
    return np.ascontiguousarray(pack_panels(q).transpose(1, 0, 2, 3))


def pack_columns(x: F32) -> F32:
    """One float32 for each output column, padded to whole panels."""
    return np.ascontiguousarray(pad_to(x.astype(np.float32), PANEL)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class CodeLayout:
    """Where quantized activations lie.

    Attributes:
        tiled: [rows/16][k/64][16][64] (AMX) instead of [rows][k padded to 64].
        sums: The scales are followed by -128 * (sum of the row's codes), as exact float32 values:
            the correction of a product with weights that are stored plus 128.
        dtype: Of the codes.
    """

    tiled: bool
    sums: bool
    dtype: str = "int8"

    def shape(self, m: int, k: int) -> tuple[int, ...]:
        """Shape of the codes of [m, k]."""
        depth = ceil_div(k, DEPTH)
        return (ceil_div(m, 16), depth, 16, DEPTH) if self.tiled else (m, depth * DEPTH)

    def scales(self, m: int) -> int:
        """Number of float32 scales, with the sums."""
        rows = ceil_div(m, 16) * 16 if self.tiled else m
        return rows * 2 if self.sums else rows

    def at(self, codes: str, row: str, block: str, lane: int) -> str:
        """16 codes of a row, from column block * 64 + lane."""
        if self.tiled:
            return f"{codes}[{row} // 16, {block}, {row} % 16, {lanes(lane)}]"
        return f"{codes}[{row}, {lanes(f'{block} * {DEPTH} + {lane}')}]"


def emit_quantize(
    e: Emitter,
    layout: CodeLayout,
    x: str,
    codes: str,
    scales: str,
    size: tuple[int, int],
    *,
    pad_rows: bool = True,
    threads: bool = False,
) -> None:
    """Quantize the rows of x [m, k] float32 (t3c/core/ops.py).

    The product is cut off at 127 before it is rounded: no effect on the code, but LLVM cannot fuse
    it with the rounding addition then, which would round once where the definition rounds twice.

    Args:
        e: Emitter.
        layout: Of the codes.
        x: Buffer name.
        codes: Buffer name.
        scales: Buffer name.
        size: (m, k).
        pad_rows: Write zero rows up to a whole tile; columns are always padded.
        threads: Spread the rows over threads.
    """
    m, k = size
    whole, rest = divmod(k, DEPTH)
    vectors, short = divmod(rest, LANES)
    groups = DEPTH // LANES
    tasks = min(16, m) if threads else 1
    share = ceil_div(m, tasks)
    with e.parallel("task", tasks, threads) as task:
        peak = e.alloc("peak", (DEPTH,), "float32", "local")
        total = e.alloc("total", (LANES,), "int32", "local")
        tail = e.alloc("tail", (LANES,), "float32", "local")
        if short:
            e(f"{tail}[{lanes(0)}] = {f32(0.0)}")
        with e.loop("row", share) as inner:
            row = e.let("row", f"{task} * {share} + {inner}")
            with e.maybe(f"{row} < {m}" if tasks * share > m else ""):
                for u in range(groups):
                    e(f"{peak}[{lanes(u * LANES)}] = {f32(0.0)}")
                if layout.sums:
                    e(f"{total}[{lanes(0)}] = {i32(0)}")
                for j in range(short):
                    e(f"{tail}[{j}] = {x}[{row}, {whole * DEPTH + vectors * LANES + j}]")

                def values(block: str, u: int, short_one: bool) -> str:
                    if short_one:
                        return f"{tail}[{lanes(0)}]"
                    return f"{x}[{row}, {lanes(f'{block} * {DEPTH} + {u * LANES}')}]"

                def grow(block: str, u: int, short_one: bool) -> None:
                    at = f"{peak}[{lanes(u * LANES)}]"
                    e(f"{at} = T.max({at}, T.abs({values(block, u, short_one)}))")

                def walk(visit: Callable[[str, int, bool], None]) -> None:
                    if whole:
                        with e.loop("block", whole) as block:
                            for u in range(groups):
                                visit(block, u, False)
                    for u in range(vectors):
                        visit(str(whole), u, False)
                    if short:
                        visit(str(whole), vectors, True)

                walk(grow)
                pair = [f"{peak}[{lanes(u * LANES)}]" for u in range(groups)]
                most = e.let(
                    "most", f"T.max(T.max({pair[0]}, {pair[1]}), T.max({pair[2]}, {pair[3]}))"
                )
                top = e.let(
                    "top",
                    'T.max(T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fmax", '
                    f"{most}), T.float32(1e-12))",
                )
                e(f"{scales}[{row}] = {top} * T.float32({1 / 127!r})")
                scale = e.let("scale", splat(f"T.float32(127) / {top}"))

                def write(block: str, u: int, short_one: bool) -> None:
                    cut = f"T.min({values(block, u, short_one)} * {scale}, {f32(127.0)})"
                    code = e.let("code", f"{bits(f'{cut} + {f32(ROUND)}')} - {i32(ROUND_BITS)}")
                    if layout.sums:
                        e(f"{total}[{lanes(0)}] = {total}[{lanes(0)}] + {code}")
                    at = layout.at(codes, row, block, u * LANES)
                    e(f'{at} = T.cast({code}, "{layout.dtype}x16")')

                walk(write)
                if rest:
                    zero = f"T.broadcast(T.{layout.dtype}(0), {LANES})"
                    for u in range(vectors + bool(short), groups):
                        e(f"{layout.at(codes, row, str(whole), u * LANES)} = {zero}")
                if layout.sums:
                    count = layout.scales(m) // 2
                    sum_ = 'T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", '
                    e(
                        f"{scales}[{row} + {count}] = "
                        f'T.cast({sum_}{total}[{lanes(0)}]) * -128, "float32")'
                    )
    if pad_rows and layout.tiled and m % 16:
        with e.loop("row", 16 - m % 16) as inner, e.loop("block", ceil_div(k, DEPTH)) as block:
            row = e.let("row", f"{inner} + {m}")
            e(f"{scales}[{row}] = T.float32(0)")
            for u in range(groups):
                e(f"{layout.at(codes, row, block, u * LANES)} = T.broadcast(T.int8(0), {LANES})")


@dataclass(frozen=True, slots=True)
class Finish:
    """What becomes of a row of 16 accumulators.

    Attributes:
        y: Output buffer name, [m, n].
        n: Columns of the output.
        scales: Buffer of the row scales.
        columns: Buffer of the column scales.
        bias: Buffer of the bias; None: no bias.
        steps: Epilogue.
        raw: Store the int32 accumulators.
        tables: Look activations up (AVX-512).
    """

    y: str
    n: int
    scales: str
    columns: str
    bias: str | None
    steps: Sequence[str] = ()
    raw: bool = False
    tables: bool = False

    @property
    def long(self) -> bool:
        """Whether the epilogue has more than a few instructions."""
        return any(step not in ("relu", "add") for step in self.steps)

    def valid(self, panel: int) -> int:
        """Columns of a panel that exist."""
        return min(PANEL, self.n - panel * PANEL)

    def hoist(self, e: Emitter, panel: str) -> tuple[str, str]:
        """Bind column scale and bias of a panel; gives their names ("" for none)."""
        if self.raw:
            return "", ""
        at = lanes(f"({panel}) * {PANEL}")
        scale = e.let("scale", f"{self.columns}[{at}]")
        return scale, e.let("bias", f"{self.bias}[{at}]") if self.bias else ""

    def write(
        self,
        e: Emitter,
        rest: str,
        acc: str,
        row: str,
        panel: str,
        hoisted: tuple[str, str],
        valid: int,
    ) -> None:
        """Finish and store the accumulators `acc` (an int32 vector) of one row and panel."""
        col = f"({panel}) * {PANEL}"
        if self.raw:
            store(e, rest, self.y, row, col, acc, valid)
            return
        scale = f"({splat(f'{self.scales}[{row}]')} * {hoisted[0]})"
        value = f'T.cast({acc}, "float32x{LANES}") * {scale}'
        value = e.let("v", f"{value} + {hoisted[1]}" if self.bias else value)
        residual = load(e, rest, "residual", row, col, valid) if "add" in self.steps else None
        value = activate(e, self.steps, value, residual, LOOK_UP if self.tables else None)
        store(e, rest, self.y, row, col, value, valid)


@dataclass(frozen=True, slots=True)
class Blocks:
    """How an output [m, n] is cut into register blocks, and these into tasks.

    Attributes:
        rows: (height, count) of the runs of row blocks, from the top.
        panels: Panels of a full block.
        total: Panels of the output.
        row_tasks: Independent runs of rows.
        col_tasks: Independent runs of panels.
        threads: Whether tasks are spread over threads.
    """

    rows: tuple[tuple[int, int], ...]
    panels: int
    total: int
    row_tasks: int
    col_tasks: int
    threads: bool


def even_rows(m: int, most: int) -> tuple[tuple[int, int], ...]:
    """(height, count) of row blocks of at most `most` rows, as even as possible."""
    count = ceil_div(m, most)
    base, more = divmod(m, count)
    return tuple(run for run in ((base + 1, more), (base, count - more)) if run[1])


Body = Callable[[str, int, str, int], None]
"""(first row, rows, first panel, panels): emits one block."""


def walk_blocks(
    e: Emitter,
    blocks: Blocks,
    prepare: Callable[[], None],
    body: Body,
    last: Body | None,
    done: str = "",
) -> None:
    """Emit the loops over all blocks: tasks, then panels, then rows innermost.

    Args:
        e: Emitter.
        blocks: The cut.
        prepare: Called at the start of each task: its scratch and settings.
        body: Emits a block of full panels.
        last: Emits the last block, which has fewer panels or a short one; None: all are full.
        done: Line at the end of each task.
    """
    whole = blocks.total // blocks.panels
    if last is not None and blocks.total % blocks.panels == 0:
        whole -= 1
    rest = blocks.total - whole * blocks.panels
    share = ceil_div(whole + (rest > 0), blocks.col_tasks)

    def rows_of(visit: Callable[[str, int], None], row_task: str) -> None:
        start = 0
        for index, (height, count) in enumerate(blocks.rows):
            split = blocks.row_tasks if index == 0 else 1
            each = ceil_div(count, split)
            alone = index > 0 and blocks.row_tasks > 1
            with (
                e.maybe(f"{row_task} == {blocks.row_tasks - 1}" if alone else ""),
                e.loop("m", each) as inner,
            ):
                block = e.let("mb", f"{row_task} * {each} + {inner}") if split > 1 else inner
                with e.maybe(f"{block} < {count}" if each * split > count else ""):
                    visit(
                        str(start)
                        if block == "0"
                        else e.let("row", f"{block} * {height} + {start}"),
                        height,
                    )
            start += height * count

    def columns_of(block: str, row_task: str) -> None:
        panel = "0" if block == "0" else e.let("panel", f"{block} * {blocks.panels}")
        rows_of(lambda row, height: body(row, height, panel, blocks.panels), row_task)

    with e.parallel("task", blocks.row_tasks * blocks.col_tasks, blocks.threads) as task:
        prepare()
        row_task, col_task = (
            (f"({task} // {blocks.col_tasks})", f"({task} % {blocks.col_tasks})")
            if blocks.row_tasks > 1
            else ("0", task)
        )
        at = str(whole * blocks.panels)
        if blocks.col_tasks == 1:
            if whole:
                with e.loop("n", whole) as block:
                    columns_of(block, row_task)
            if last is not None:
                rows_of(lambda row, height: last(row, height, at, rest), row_task)
        else:
            with e.loop("n", share) as inner:
                block = e.let("nb", f"{col_task} * {share} + {inner}")
                if whole:
                    ragged = last is not None or share * blocks.col_tasks > whole
                    with e.maybe(f"{block} < {whole}" if ragged else ""):
                        columns_of(block, row_task)
                if last is not None:
                    with e.maybe(f"{block} == {whole}"):
                        rows_of(lambda row, height: last(row, height, at, rest), row_task)
        if done:
            e(done)


def cut(
    rows: tuple[tuple[int, int], ...],
    total: int,
    panels: int,
    depth: int,
    threads: bool,
    cache: int = CACHE,
) -> Blocks:
    """Tasks for an output of `rows` x `total` panels over `depth` input columns.

    Args:
        rows: (height, count) runs of row blocks.
        total: Panels of the output.
        panels: Panels of a block.
        depth: Input columns.
        threads: Whether the work is worth several threads.
        cache: Bytes of activations that one run over the weights keeps in cache.
    """
    blocks = ceil_div(total, panels)
    col_tasks = min(TASKS, blocks) if threads else 1
    height, count = rows[0]
    fit = max(1, cache // (height * depth))
    row_tasks = ceil_div(count, fit)
    if threads:
        row_tasks = max(row_tasks, min(count, ceil_div(TASKS, col_tasks)))
    return Blocks(rows, panels, total, row_tasks, col_tasks, threads)
