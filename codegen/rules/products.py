"""Matrix products and convolutions: packed panels, register tiles, the epilogue while it is hot.

Before: for m, n, k: c[m, n] += a[m, k] * b[k, n];  for m, n: y[m, n] = epilogue(c[m, n])
After:  parallel for each panel of n: {pack b[:, panel];  for each 6 rows of m:
            tile in registers = sum over k;  y[rows, panel] = epilogue(tile)}

An axis of the output belongs to the side (a or b) that reads it; both read a batch axis.
So a convolution is a product of filters (m) with pixels (n), and packing gathers the pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from t3c.codegen.kernels.vectors import Panels, panels, tile
from t3c.codegen.rules.expressions import Rewriter, loads, mentions, stride, walk
from t3c.codegen.rules.nests import (
    PARALLEL_WORK,
    UNITS,
    Values,
    Writer,
    fused,
    lanes,
    loop,
    nest,
    pieces,
    scope,
    scratch,
    sequence,
)
from t3c.codegen.rules.polynomials import fma
from t3c.codegen.rules.program import Axis, Block, Program
from t3c.codegen.tvm_api import tvm
from t3c.targets.base import TargetSpec

tirx = tvm.tirx
CHUNK = 8
"""Row tiles that at least share one packing, where the rows are split among threads."""


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A block seen as a product.

    Attributes:
        block: The block; a grouped axis is already split in two.
        left: The factor read row by row.
        right: The factor that is packed.
        batch: Axes of both factors.
        rows: Axes of the left factor only.
        columns: Axes of the right factor only; the last is the last of the output.
    """

    block: Block
    left: Any
    right: Any
    batch: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]


def schedule(program: Program, spec: TargetSpec) -> Any | None:
    """Takes functions with one product that is worth packing."""
    found = [(i, p) for i, b in enumerate(program.blocks) if (p := product(b)) is not None]
    if len(found) != 1 or not _worth(found[0][1], spec.vector):
        return None
    index, what = found[0]
    before, after = program.blocks[:index], program.blocks[index + 1 :]
    writer = Writer(spec.vector, {})
    ends = _epilogue(what.block, after, program.scratch)
    if ends:
        after = ()
    parts = [writer.threads(b) for b in before]
    parts.append(_Product(what, ends, writer).write())
    parts.extend(writer.threads(b) for b in after)
    kept = [b for b in program.scratch if not (ends and b.same_as(what.block.buffer))]
    return program.finish(sequence(parts), kept)


def product(block: Block) -> Product | None:
    """The block as a product of two factors; None if it is not one."""
    if block.combine is not tirx.Add or not isinstance(block.term, tirx.Mul):
        return None
    if block.buffer.dtype != "float32" or not _is_zero(block.init):
        return None
    block = _split_groups(block)
    last = next((a for a in reversed(block.spatial) if a.extent > 1), None)
    if last is None:
        return None
    left, right = block.term.a, block.term.b
    if mentions(left, last.var):
        left, right = right, left
    if mentions(left, last.var) or not mentions(right, last.var):
        return None
    sides = [(a, mentions(left, a.var), mentions(right, a.var)) for a in block.spatial]
    return Product(
        block,
        left,
        right,
        batch=tuple(a for a, in_left, in_right in sides if in_left == in_right),
        rows=tuple(a for a, in_left, in_right in sides if in_left and not in_right),
        columns=tuple(a for a, in_left, in_right in sides if in_right and not in_left),
    )


def _split_groups(block: Block) -> Block:
    """Split an axis that one factor reads whole and the other by groups: f into (f // n, f % n)."""
    for axis in block.spatial:
        sizes = {
            int(e.b.value)
            for e in walk(block.term)
            if isinstance(e, tirx.FloorDiv) and e.a.same_as(axis.var) and _is_const(e.b)
        }
        if len(sizes) != 1 or axis.extent % (size := sizes.pop()) or size == 1:
            continue
        group = Axis(tirx.Var(f"{axis.var.name}_group", axis.var.ty), axis.extent // size, False)
        inner = Axis(tirx.Var(axis.var.name, axis.var.ty), size, False)
        values = {axis.var: group.var * size + inner.var}
        at = block.axes.index(axis)
        axes = (*block.axes[:at], group, inner, *block.axes[at + 1 :])
        split = replace(block, axes=axes)
        tidy = split.analyzer()
        return replace(
            split,
            term=tidy.simplify(Rewriter(values, polynomials=False)(block.term)),
            indices=tuple(Rewriter(values)(i) for i in block.indices),
        )
    return block


def _is_const(expr: Any) -> bool:
    return isinstance(expr, tirx.IntImm)


def _is_zero(expr: Any) -> bool:
    return isinstance(expr, tirx.FloatImm) and float(expr.value) == 0.0


def size(axes: Sequence[Axis]) -> int:
    """Points of some axes."""
    return prod(a.extent for a in axes)


def _worth(what: Product, width: int) -> bool:
    """Whether every packed element is used often enough."""
    return (
        size(what.rows) >= 4
        and size(what.columns) >= min(width, 8)
        and size(what.block.reduced) >= 4
    )


def _epilogue(block: Block, after: Sequence[Block], kept: Sequence[Any]) -> tuple[Block, ...]:
    """The one block that finishes the product point by point; empty if there is none."""
    if len(after) != 1 or not any(block.buffer.same_as(b) for b in kept):
        return ()
    (end,) = after
    own = [a.var for a in end.spatial]
    reads = [load for load in loads(end.term) if load.source.same_as(block.buffer)]
    if end.combine is not None or len(own) != len(block.indices):
        return ()
    for load in reads:
        for index, axis in zip(load.indices, end.spatial, strict=True):
            if not index.same_as(axis.var) and not (axis.extent == 1 and _is_const(index)):
                return ()
    return (end,)


class _Product:
    """Writes one product."""

    def __init__(self, what: Product, ends: tuple[Block, ...], writer: Writer) -> None:
        self.what, self.ends, self.writer = what, ends, writer
        rows, self.widest = tile(writer.width)
        total = size(what.rows)
        self.tiles = -(-total // rows)
        self.rows = -(-total // self.tiles)
        self.total = size(what.columns)
        self.depth = size(what.block.reduced)
        self.vectors = -(-self.total // writer.width)

    def write(self) -> Any:
        """All panels of all batches, in threads."""
        what = self.what
        units = size(what.batch) * -(-self.vectors // self.widest)
        chunks = max(1, min(-(-UNITS // units), self.tiles // CHUNK))
        big = size(what.block.axes) >= PARALLEL_WORK
        kind = "PARALLEL" if big else "SERIAL"
        parts = []
        for run in panels(self.vectors, self.widest):
            partial = run.first + run.count * run.width == self.vectors
            partial = partial and self.total % self.writer.width != 0
            whole = run.count - partial
            if whole:
                parts.append(self._run(run, 0, whole, chunks, kind, False))
            if partial:
                parts.append(self._run(run, whole, 1, chunks, kind, True))
        return sequence(parts)

    def _run(
        self, run: Panels, start: int, count: int, chunks: int, kind: str, partial: bool
    ) -> Any:
        """Some panels of equal width; `partial`: the last vector goes past the last column.

        With enough panels, each is packed by the thread that uses it; else all are packed first and
        then shared by threads that take a chunk of the rows each.
        """
        batch = self.what.batch
        panel = Axis(tirx.Var("panel", "int64"), count, False)
        chunk = Axis(tirx.Var("chunk", "int64"), chunks, False)
        wide = run.width * self.writer.width
        valid = wide - (-self.total % self.writer.width if partial else 0)
        shape = [1 if chunks == 1 else size(batch) * count, self.depth, wide]
        packed = scratch(shape, "float32", "packed")

        def place(values: Values) -> tuple[Any, Any]:
            column = ((values[panel.var] + start) * run.width + run.first) * self.writer.width
            slot: Any = tirx.const(0, "int64")
            for axis in [*batch, panel] if chunks > 1 else []:
                slot = slot * axis.extent + values[axis.var]
            return column, slot

        def pack(values: Values) -> Any:
            column, slot = place(values)
            return self._pack(values, column, packed, slot, valid)

        def compute(values: Values) -> Any:
            column, slot = place(values)
            each = -(-self.tiles // chunks)
            last = tirx.const(size(self.what.rows) - self.rows, "int64")

            def rows(t: Any) -> Any:
                # The last tile is moved up to end at the last row: some rows are computed twice.
                at = tirx.min((values[chunk.var] * each + t) * self.rows, last)
                return self._tile(values, column, at, packed, slot, valid)

            return loop(each, rows, name="t")

        if chunks > 1:
            first = fused([*batch, panel], {}, pack, kind)
            second = fused([*batch, panel, chunk], {}, compute, kind)
            return scope(sequence([first, second]), [packed])

        def both(values: Values) -> Any:
            return scope(sequence([pack(values), compute(values)]), [packed])

        return fused([*batch, panel, chunk], {}, both, kind)

    def _decode(self, axes: Sequence[Axis], point: Any) -> dict[Any, Any]:
        """Values of fused axes."""
        found, below = {}, size(axes)
        for i, axis in enumerate(axes):
            below //= axis.extent
            index = tirx.floordiv(point, tirx.const(below, "int64")) if below > 1 else point
            found[axis.var] = (
                index if i == 0 else tirx.floormod(index, tirx.const(axis.extent, "int64"))
            )
        return found

    def _pack(self, values: Values, column: Any, packed: Any, slot: Any, valid: int) -> Any:
        """packed[slot, k, j] = right factor; lanes past the last column are zero."""
        what = self.what
        wide = int(packed.shape[2])
        contiguous = self._contiguous()

        def put(k: Any, j: Any, inner: Values) -> Any:
            at = {**values, **self._decode(what.columns, column + j), **inner}
            term = Rewriter(at, self.writer.places)(what.right)
            return tirx.BufferStore(packed, term, [slot, k, j])

        def group(start: Any, count: int) -> Any:
            """Some neighbouring columns of all k: one line written at a time."""

            def line(inner: Values) -> Any:
                k: Any = tirx.const(0, "int64")
                for axis in what.block.reduced:
                    k = k * axis.extent + inner[axis.var]
                if contiguous:
                    return lanes(count, lambda j: put(k, start + j, inner))
                return sequence([put(k, start + j, inner) for j in range(count)])

            return nest(what.block.reduced, {}, line)

        parts = []
        for start, width, count in pieces(valid, self.writer.width):
            parts.append(loop(count, lambda c, s=start, w=width: group(c * w + s, w), name="g"))  # type: ignore[misc]
        if valid < wide:
            zero = tirx.const(0.0, "float32")

            def clear(k: Any) -> Any:
                return loop(
                    wide - valid, lambda j: tirx.BufferStore(packed, zero, [slot, k, j + valid])
                )

            parts.append(loop(self.depth, clear, name="k"))
        return sequence(parts)

    def _contiguous(self) -> bool:
        """Whether neighbouring columns of the right factor lie side by side."""
        what = self.what
        point = tirx.Var("point", "int64")
        analyzer = what.block.analyzer()
        analyzer.bind(point, tvm.ir.Range(0, self.total))
        values = self._decode(what.columns, point)
        return all(
            stride(load, point, analyzer) in (0, 1)
            for load in loads(Rewriter(values, polynomials=False)(what.right))
        )

    def _tile(
        self, values: Values, column: Any, row: Any, packed: Any, slot: Any, valid: int
    ) -> Any:
        """One register tile and its epilogue."""
        what = self.what
        wide = int(packed.shape[2])
        held = [scratch([wide], "float32", f"held{i}") for i in range(self.rows)]
        points = [self._decode(what.rows, row + i) for i in range(self.rows)]
        zero = tirx.const(0.0, "float32")
        clear = [
            self._vectors(wide, lambda j, h=h: tirx.BufferStore(h, zero, [j]))  # type: ignore[misc]
            for h in held
        ]

        def step(k: Any) -> Any:
            inner = self._decode(what.block.reduced, k)
            parts = []
            for buffer, point in zip(held, points, strict=True):
                left = Rewriter({**values, **point, **inner}, self.writer.places)(what.left)

                def one(j: Any, b: Any = buffer, a: Any = left) -> Any:
                    right = tirx.BufferLoad(packed, [slot, k, j])
                    return tirx.BufferStore(b, fma(a, right, tirx.BufferLoad(b, [j])), [j])

                parts.append(self._vectors(wide, one))
            return sequence(parts)

        ends = [
            self._end({**values, **point}, column, buffer, valid)
            for buffer, point in zip(held, points, strict=True)
        ]
        body = [*clear, loop(self.depth, step, name="k"), *ends]
        return scope(sequence(body), held)

    def _vectors(self, wide: int, body: Callable[[Any], Any]) -> Any:
        """Body for every lane of some whole vectors, one after the other.

        A loop over all lanes at once would make vectors of, say, 48 elements, which LLVM spills.
        """
        width = self.writer.width
        return sequence(
            [lanes(width, lambda j, s=s: body(j + s)) for s in range(0, wide, width)]  # type: ignore[misc]
        )

    def _end(self, values: Values, column: Any, held: Any, valid: int) -> Any:
        """Store one row of a tile, through the epilogue if there is one."""
        what = self.what
        parts = []
        spilled = []
        if valid % self.writer.width:
            # Parts of vectors are read from memory: read from `held`, they would keep it there.
            wide = int(held.shape[0])
            row = scratch([wide], "float32", "row")
            source = held
            parts.append(
                self._vectors(
                    wide, lambda j: tirx.BufferStore(row, tirx.BufferLoad(source, [j]), [j])
                )
            )
            spilled.append(row)
            held = row
        for start, width, count in pieces(valid, self.writer.width):

            def vector(c: Any, s: int = start, w: int = width) -> Any:
                def one(lane: Any) -> Any:
                    j = c * w + s + lane
                    at = {**values, **self._decode(what.columns, column + j)}
                    return self._store(at, tirx.BufferLoad(held, [j]))

                return lanes(w, one)

            parts.append(sequence([vector(tirx.const(c, "int64")) for c in range(count)]))
        return scope(sequence(parts), spilled)

    def _store(self, values: Values, cell: Any) -> Any:
        block = self.what.block
        if not self.ends:
            return self.writer.store(block, values, cell)
        (end,) = self.ends
        rewrite = Rewriter(values)
        point = {
            axis.var: rewrite(index) for axis, index in zip(end.spatial, block.indices, strict=True)
        }
        name = tirx.Var("cell", "float32")
        term = Rewriter(point, reads={block.buffer: name})(end.term)
        return self.writer.store(end, point, tirx.Let(name, cell, term))
