"""Loop nests for one block: which axis becomes vectors, where sums are held, what is threaded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from t3c.codegen.rules.expressions import Rewriter, is_costly, is_guarded, loads, stride
from t3c.codegen.rules.polynomials import fma
from t3c.codegen.rules.program import Axis, Block
from t3c.codegen.tvm_api import tvm

tirx = tvm.tirx
Values = Mapping[Any, Any]
Places = Mapping[Any, tuple[Any, int]]
PARALLEL_WORK = 1 << 15
"""Points of a block (times 8 where a libm call is in it) below which threads cost more than they
give: a parallel launch takes microseconds."""
UNITS = 16
"""Parallel units to offer where the shape allows."""
ACCUMULATORS = 4
"""Vectors of partial sums held at once, to hide the latency of the addition."""


def loop(extent: int, body: Callable[[Any], Any], kind: str = "SERIAL", name: str = "i") -> Any:
    """For var in range(extent): body(var); no loop where extent is 1."""
    if extent == 1:
        return body(tirx.const(0, "int64"))
    var = tirx.Var(name, "int64")
    zero = tirx.const(0, "int64")
    return tirx.For(var, zero, tirx.const(extent, "int64"), tirx.ForKind[kind], body(var))


def sequence(parts: Sequence[Any]) -> Any:
    """The statements one after the other."""
    return parts[0] if len(parts) == 1 else tirx.SeqStmt(list(parts))


def scope(body: Any, buffers: Sequence[Any], name: str = "scope") -> Any:
    """Scratch that lives while the body runs."""
    if not buffers:
        return body
    block = tvm.s_tir.SBlock([], [], [], name, body, alloc_buffers=list(buffers))
    return tvm.s_tir.SBlockRealize([], True, block)


def scratch(shape: Sequence[int], dtype: str, name: str) -> Any:
    """A buffer; below 1024 bytes it becomes registers or stack."""
    return tirx.decl_buffer(list(shape), dtype, name)


def nest(
    axes: Sequence[Axis], values: Values, body: Callable[[Values], Any], kind: str = "SERIAL"
) -> Any:
    """Loops over the axes in order; body gets the values of all variables."""
    if not axes:
        return body(values)
    first, *rest = axes
    return loop(
        first.extent,
        lambda var: nest(rest, {**values, first.var: var}, body, kind),
        kind,
        first.var.name,
    )


def fused(axes: Sequence[Axis], values: Values, body: Callable[[Values], Any], kind: str) -> Any:
    """One loop over all points of the axes."""
    total = 1
    for axis in axes:
        total *= axis.extent

    def point(var: Any) -> Any:
        found, below = dict(values), total
        for axis in axes:
            below //= axis.extent
            index = tirx.floordiv(var, below) if below > 1 else var
            outermost = axis is axes[0]
            found[axis.var] = index if outermost else tirx.floormod(index, axis.extent)
        return body(found)

    return loop(total, point, kind, "unit")


def pieces(extent: int, width: int) -> Iterator[tuple[int, int, int]]:
    """(start, width, count) that cover an extent: whole vectors, then powers of two, then 1."""
    start = 0
    while width >= 4:
        if count := (extent - start) // width:
            yield start, width, count
            start += count * width
        width //= 2
    if extent > start:
        yield start, 1, extent - start


def chunks(axis: Axis, width: int, values: Values, body: Callable[[Values, int, Any], Any]) -> Any:
    """Cover an axis with vectors: body(values, width, start), each start an expression."""
    parts = []
    for start, wide, count in pieces(axis.extent, width):
        parts.append(
            loop(count, lambda c, s=start, w=wide: body(values, w, c * w + s), name="c")  # type: ignore[misc]
        )
    return sequence(parts)


def lanes(width: int, body: Callable[[Any], Any]) -> Any:
    """Body for every lane of one vector."""
    if width == 1:
        return body(tirx.const(0, "int64"))
    return loop(width, body, "VECTORIZED", "lane")


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes loop nests.

    Attributes:
        width: Float32 lanes of a vector.
        places: Buffers that moved: the new buffer and the leading indices it no longer has.
    """

    width: int
    places: Places

    def value(self, block: Block, values: Values) -> Any:
        """The block's term at a point."""
        return Rewriter(values, self.places)(block.term)

    def store(self, block: Block, values: Values, value: Any) -> Any:
        """The block's assignment at a point."""
        target = Rewriter(values, self.places)(tirx.BufferLoad(block.buffer, list(block.indices)))
        return tirx.BufferStore(target.source, value, list(target.indices))

    def write(self, block: Block, values: Values) -> Any:
        """All points of a block whose variables are not in `values` yet."""
        if block.combine is None:
            return self.spatial(block, values)
        rest = [a for a in block.spatial if a.var not in values]
        by_output = reach(block, rest[-1]) if rest else 0.0
        by_sum = reach(block, block.reduced[-1])
        if by_output and by_output >= by_sum:
            return self.columns(block, values)
        if by_sum:
            return nest(rest, values, lambda point: self.row(block, point))
        if rest and rest[-1].extent >= self.width:
            return self.columns(block, values)
        return nest(rest, values, lambda point: self.plain(block, point))

    def spatial(self, block: Block, values: Values) -> Any:
        """Assign all points; the last axis in vectors."""
        rest = [a for a in block.spatial if a.var not in values]
        if not rest:
            return self.store(block, values, self.value(block, values))
        *outer, last = rest

        def piece(point: Values, width: int, start: Any) -> Any:
            def lane(j: Any) -> Any:
                at = {**point, last.var: start + j}
                return self.store(block, at, self.value(block, at))

            return lanes(width, lane)

        return nest(outer, values, lambda point: chunks(last, self.width, point, piece))

    def columns(self, block: Block, values: Values) -> Any:
        """Reduce with the last output axis in vectors; partial results stay in registers."""
        *outer, last = [a for a in block.spatial if a.var not in values]

        def piece(point: Values, width: int, start: Any) -> Any:
            held = scratch([width], block.buffer.dtype, "held")

            def cell(j: Any) -> Any:
                return tirx.BufferLoad(held, [j])

            clear = lanes(width, lambda j: tirx.BufferStore(held, block.init, [j]))

            def step(inner: Values) -> Any:
                return lanes(
                    width,
                    lambda j: tirx.BufferStore(
                        held,
                        combine(block, cell(j), self.value(block, {**inner, last.var: start + j})),
                        [j],
                    ),
                )

            put = lanes(width, lambda j: self.store(block, {**point, last.var: start + j}, cell(j)))
            return scope(sequence([clear, nest(block.reduced, point, step), put]), [held])

        width = self.width * ACCUMULATORS
        return nest(outer, values, lambda point: chunks(last, width, point, piece))

    def row(self, block: Block, point: Values) -> Any:
        """Reduce one output point with the last reduced axis in vectors of partial results."""
        *outer, last = block.reduced
        dtype = block.buffer.dtype
        wide = self.width * ACCUMULATORS
        while wide > self.width and last.extent < 2 * wide:
            wide //= 2
        total = scratch([1], dtype, "total")
        whole = tirx.BufferLoad(total, [0])
        parts = [tirx.BufferStore(total, block.init, [0])]
        buffers = [total]
        for start, width, count in pieces(last.extent, wide):
            if width == 1:
                parts.append(self._each(block, point, outer, last, total, start, count))
                continue
            held = scratch([width], dtype, "held")
            buffers.append(held)
            clear = partial(_put, held, block.init)
            parts.append(lanes(width, clear))

            def step(
                inner: Values, h: Any = held, w: int = width, s: int = start, n: int = count
            ) -> Any:
                def vector(c: Any) -> Any:
                    return lanes(
                        w,
                        lambda j: tirx.BufferStore(
                            h,
                            combine(
                                block,
                                tirx.BufferLoad(h, [j]),
                                self.value(block, {**inner, last.var: c * w + s + j}),
                            ),
                            [j],
                        ),
                    )

                return loop(n, vector, name="c")

            parts.append(nest(outer, point, step))
            parts.extend(fold(block, held, width))
            parts.append(
                tirx.BufferStore(total, combine(block, whole, tirx.BufferLoad(held, [0])), [0])
            )
        parts.append(self.store(block, point, whole))
        return scope(sequence(parts), buffers)

    def _each(
        self,
        block: Block,
        point: Values,
        outer: Sequence[Axis],
        last: Axis,
        total: Any,
        start: int,
        count: int,
    ) -> Any:
        """Add single points of the last axis to a total."""

        def step(inner: Values) -> Any:
            def one(c: Any) -> Any:
                value = self.value(block, {**inner, last.var: c + start})
                return tirx.BufferStore(
                    total, combine(block, tirx.BufferLoad(total, [0]), value), [0]
                )

            return loop(count, one, name="c")

        return nest(outer, point, step)

    def plain(self, block: Block, point: Values) -> Any:
        """Reduce one output point, one element at a time."""
        total = scratch([1], block.buffer.dtype, "total")
        whole = tirx.BufferLoad(total, [0])
        step = nest(
            block.reduced,
            point,
            lambda inner: tirx.BufferStore(
                total, combine(block, whole, self.value(block, inner)), [0]
            ),
        )
        clear = tirx.BufferStore(total, block.init, [0])
        return scope(sequence([clear, step, self.store(block, point, whole)]), [total])

    def turned(self, block: Block) -> Any | None:
        """A block that reads along one axis and writes along another, square by square.

        Each square of the source is read by lines into scratch, and from there across: read across
        at once, lines of a large matrix would throw each other out of the cache. None: no such
        block.
        """
        found = crossed(block, self.width)
        if found is None:
            return None
        load, along = found
        width, last = self.width, block.spatial[-1]
        others = [a for a in block.spatial if a is not along and a is not last]
        full = along.extent // width
        squares = Axis(tirx.Var("square", "int64"), full, False)
        kind = "PARALLEL" if work(block) >= PARALLEL_WORK else "SERIAL"

        def strip(values: Values) -> Any:
            first = values[squares.var] * width

            def square(c: Any) -> Any:
                stage = scratch([width, width], load.source.dtype, "stage")
                fetch = loop(
                    width,
                    lambda i: lanes(
                        width,
                        lambda t: tirx.BufferStore(
                            stage,
                            self.at(
                                load, {**values, along.var: first + t, last.var: c * width + i}
                            ),
                            [i, t],
                        ),
                    ),
                    "UNROLLED",
                )

                def line(t: Any) -> Any:
                    def one(i: Any) -> Any:
                        at = {**values, along.var: first + t, last.var: c * width + i}
                        cell = tirx.BufferLoad(stage, [i, t])
                        term = Rewriter(at, self.places, {load.source: cell})(block.term)
                        return self.store(block, at, term)

                    return lanes(width, one)

                return scope(sequence([fetch, loop(width, line, "UNROLLED")]), [stage])

            parts = [loop(last.extent // width, square, name="c")]
            if last.extent % width:
                rest = last.extent // width * width

                def tail(t: Any) -> Any:
                    def one(i: Any) -> Any:
                        at = {**values, along.var: first + t, last.var: i + rest}
                        return self.store(block, at, self.value(block, at))

                    return loop(last.extent - rest, one)

                parts.append(loop(width, tail, name="t"))
            return sequence(parts)

        parts = [fused([*others, squares], {}, strip, kind)]
        if along.extent % width:
            start = full * width

            def rest(t: Any) -> Any:
                return self.write(block, {along.var: t + start})

            parts.append(loop(along.extent - start, rest, name="t"))
        return sequence(parts)

    def at(self, load: Any, values: Values) -> Any:
        """A read at a point."""
        return Rewriter(values, self.places)(load)

    def threads(self, block: Block) -> Any:
        """All points of a block, the outer axes in parallel where the work is worth it."""
        if (turned := self.turned(block)) is not None:
            return turned
        spatial = block.spatial
        limit = len(spatial) - 1
        if limit < 1 or work(block) < PARALLEL_WORK:
            return self.write(block, {})
        outer, units = [], 1
        for axis in spatial[:limit]:
            outer.append(axis)
            units *= axis.extent
            if units >= UNITS:
                break
        return fused(outer, {}, lambda values: self.write(block, values), "PARALLEL")


def _put(buffer: Any, value: Any, at: Any) -> Any:
    return tirx.BufferStore(buffer, value, [at])


def crossed(block: Block, width: int) -> tuple[Any, Axis] | None:
    """The read of a block that is contiguous along another axis than the write, and that axis."""
    found = loads(block.term)
    if block.combine is not None or not block.spatial or is_guarded(block.term):
        return None
    last = block.spatial[-1]
    if last.extent < width:
        return None
    analyzer = block.analyzer()
    for load in found:
        if stride(load, last.var, analyzer) in (0, 1) or any(
            other is not load and other.source.same_as(load.source) for other in found
        ):
            continue
        for axis in block.spatial[:-1]:
            if axis.extent >= width and stride(load, axis.var, analyzer) == 1:
                return load, axis
    return None


def combine(block: Block, sofar: Any, term: Any) -> Any:
    """One step of a reduction; a product and sum in one rounding."""
    if block.combine is tirx.Add and isinstance(term, tirx.Mul) and block.buffer.dtype == "float32":
        return fma(term.a, term.b, sofar)
    return block.combine(sofar, term)


def fold(block: Block, held: Any, width: int) -> list[Any]:
    """Combine all elements of a buffer into its first, halving."""
    steps = []
    while width > 1:
        width //= 2

        def lane(j: Any, w: int = width) -> Any:
            both = block.combine(tirx.BufferLoad(held, [j]), tirx.BufferLoad(held, [j + w]))
            return tirx.BufferStore(held, both, [j])

        steps.append(lanes(width, lane))
    return steps


def work(block: Block) -> int:
    """Points of a block; each counts for 8 where it has a costly call."""
    points = 8 if is_costly(block.term) else 1
    for axis in block.axes:
        points *= axis.extent
    return points


def reach(block: Block, axis: Axis) -> float:
    """How well an axis suits vectors: 0 not at all, else more for every contiguous access."""
    if axis.extent < 4:
        return 0.0
    analyzer = block.analyzer()
    steps = [stride(load, axis.var, analyzer) for load in loads(block.term)]
    if any(s not in (0, 1) for s in steps):
        return 0.0
    contiguous = sum(s == 1 for s in steps)
    if not axis.reduce:
        contiguous += stride((block.buffer, block.indices), axis.var, analyzer) == 1
    return contiguous * min(1.0, axis.extent / 8)
