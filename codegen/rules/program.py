"""A fused function as a list of blocks: what the rules look at.

Before: loop nests of one block each, every operator of the fusion with its own intermediate.
After: the same, cheap intermediates computed where they are used.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from t3c.codegen.rules.expressions import Load, Rewriter, is_costly, is_guarded, loads, walk
from t3c.codegen.tvm_api import tvm

tirx = tvm.tirx
log = logging.getLogger(__name__)
LARGEST = 400
"""Nodes of an expression beyond which intermediates are stored rather than computed again."""


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """One iterator of a block: 0 <= var < extent."""

    var: Any
    extent: int
    reduce: bool


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One assignment for all points of its axes.

    Spatial: buffer[indices] = term. Reduction: buffer[indices] = init, then for all reduce points
    buffer[indices] = combine(buffer[indices], term).

    Attributes:
        name: Of the operator.
        axes: In loop order.
        buffer: What is written.
        indices: Where.
        term: The value.
        combine: TIR class of the reduction (Add, Mul, Max or Min); None for a spatial block.
        init: Start of the reduction; None for a spatial block.
    """

    name: str
    axes: tuple[Axis, ...]
    buffer: Any
    indices: tuple[Any, ...]
    term: Any
    combine: Any = None
    init: Any = None

    @property
    def spatial(self) -> tuple[Axis, ...]:
        """The axes of the output."""
        return tuple(a for a in self.axes if not a.reduce)

    @property
    def reduced(self) -> tuple[Axis, ...]:
        """The axes summed over."""
        return tuple(a for a in self.axes if a.reduce)

    def analyzer(self) -> Any:
        """Arithmetic that knows the ranges of the axes."""
        found = tvm.sym.Analyzer()
        for axis in self.axes:
            found.bind(axis.var, tvm.ir.Range(0, axis.extent))
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A function read as blocks.

    Attributes:
        func: As it came, intermediates inlined.
        blocks: In execution order.
        scratch: Intermediate buffers still there.
    """

    func: Any
    blocks: tuple[Block, ...]
    scratch: tuple[Any, ...]

    def finish(self, body: Any, scratch: Sequence[Any]) -> Any:
        """The function with a new body, marked as scheduled."""
        root = tvm.s_tir.SBlock([], [], [], "root", body, alloc_buffers=list(scratch))
        made = self.func.with_body(tvm.s_tir.SBlockRealize([], True, root))
        return made.with_attr("tirx.is_scheduled", True)


def read(func: Any) -> Program | None:
    """The function as blocks; None if it has anything else."""
    func = _inline(func)
    root = func.body
    if not isinstance(root, tvm.s_tir.SBlockRealize):
        return None
    body = root.block.body
    blocks = []
    for nest in body.seq if isinstance(body, tirx.SeqStmt) else [body]:
        block = _block(nest)
        if block is None:
            return None
        blocks.append(block)
    return Program(func, tuple(blocks), tuple(root.block.alloc_buffers))


def _block(nest: Any) -> Block | None:
    loops = {}
    while isinstance(nest, tirx.For):
        if nest.kind != tirx.ForKind.SERIAL or not _is_zero(nest.min):
            return None
        loops[nest.loop_var] = nest.extent
        nest = nest.body
    if not isinstance(nest, tvm.s_tir.SBlockRealize) or not isinstance(
        nest.block.body, tirx.BufferStore
    ):
        return None
    if not isinstance(nest.predicate, tirx.IntImm) or not nest.predicate.value:
        return None
    axes = []
    for iterator, value in zip(nest.block.iter_vars, nest.iter_values, strict=True):
        extent = iterator.dom.extent
        whole = value in loops if isinstance(value, tirx.Var) else _is_zero(value)
        kind = iterator.iter_type
        if not isinstance(extent, tirx.IntImm) or not whole or kind not in (0, 2):
            return None
        axes.append(Axis(iterator.var, int(extent.value), kind == 2))
    return _assignment(nest.block, tuple(axes))


def _assignment(block: Any, axes: tuple[Axis, ...]) -> Block | None:
    store = block.body
    plain = Block(block.name_hint, axes, store.buffer, tuple(store.indices), store.value)
    tidy = _Tidy(plain.analyzer())
    indices = tuple(tidy(i) for i in store.indices)
    value = tidy(store.value)
    if not plain.reduced:
        if block.init is not None or any(
            load.source.same_as(store.buffer) for load in loads(value)
        ):
            return None
        return Block(plain.name, axes, store.buffer, indices, value)
    if not isinstance(block.init, tirx.BufferStore):
        return None
    if not isinstance(value, tirx.Add | tirx.Mul | tirx.Max | tirx.Min):
        return None
    for own, term in ((value.a, value.b), (value.b, value.a)):
        if isinstance(own, Load) and own.source.same_as(store.buffer):
            if any(load.source.same_as(store.buffer) for load in loads(term)):
                return None
            return Block(
                plain.name, axes, store.buffer, indices, term, type(value), block.init.value
            )
    return None


class _Tidy:
    """Simplifies the indices of every access."""

    def __init__(self, analyzer: Any) -> None:
        self.analyzer = analyzer

    def __call__(self, expr: Any) -> Any:
        return self.analyzer.simplify(Rewriter(polynomials=False)(expr))


def _is_zero(expr: Any) -> bool:
    return isinstance(expr, tirx.IntImm) and int(expr.value) == 0


def _inline(func: Any) -> Any:
    """Compute cheap intermediates where they are used."""
    schedule = tvm.s_tir.Schedule(func)
    roots = schedule.get_sblock("root")
    outputs = list(func.params)
    for ref in schedule.get_child_blocks(roots):
        block = schedule.get(ref)
        if not isinstance(block.body, tirx.BufferStore) or any(
            v.iter_type == 2 for v in block.iter_vars
        ):
            continue
        if any(block.body.buffer.same_as(b) for b in outputs):
            continue
        users = [schedule.get(c) for c in schedule.get_consumers(ref)]
        if not _worth(block, users):
            continue
        try:
            schedule.compute_inline(ref)
        except tvm.s_tir.ScheduleError as error:
            log.debug("%s stays an intermediate: %s", block.name_hint, error)
    return schedule.mod["main"]


def _worth(block: Any, users: Sequence[Any]) -> bool:
    """Whether to compute a block's value at every use."""
    size = sum(1 for _ in walk(block.body.value))
    uses = 0
    for user in users:
        if not isinstance(user.body, tirx.BufferStore):
            return False
        reads = loads(user.body.value)
        uses += sum(load.source.same_as(block.body.buffer) for load in reads)
        reduces = any(v.iter_type == 2 for v in user.iter_vars)
        product = reduces and any(
            isinstance(e, tirx.Mul) and isinstance(user.body.value, tirx.Add)
            for e in walk(user.body.value)
        )
        if product and not isinstance(block.body.value, Load):
            return False
        wider = _points(user) > _points(block)
        if is_costly(block.body.value) and (wider or reduces):
            return False
        if reduces and is_guarded(block.body.value):
            return False
    if is_costly(block.body.value) and uses > 1:
        return False
    return size * max(uses, 1) <= LARGEST


def _points(block: Any) -> int:
    points = 1
    for iterator in block.iter_vars:
        extent = iterator.dom.extent
        points *= int(extent.value) if isinstance(extent, tirx.IntImm) else 1
    return points
