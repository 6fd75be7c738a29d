"""Softmax, norms and their like: several blocks that need only their own row of each other.

Before: for r, k: sum[r] += x[r, k];  for r, k: y[r, k] = x[r, k] / sum[r]
After:  parallel for r: {sum by vectors of k;  y by vectors of k}, intermediates one row long
"""

from collections.abc import Sequence
from typing import Any

from t3c.codegen.rules.expressions import loads
from t3c.codegen.rules.nests import (
    PARALLEL_WORK,
    Values,
    Writer,
    fused,
    scope,
    scratch,
    sequence,
    work,
)
from t3c.codegen.rules.program import Axis, Block, Program
from t3c.targets.base import TargetSpec


def schedule(program: Program, spec: TargetSpec) -> Any | None:
    """Takes two or more blocks that share leading axes, one of them a reduction."""
    blocks = program.blocks
    if len(blocks) < 2 or not any(b.combine for b in blocks):
        return None
    lead = shared(program)
    if not lead or all(n == 1 for n in lead):
        return None
    depth = len(lead)
    places = {
        buffer: (
            scratch([int(n) for n in buffer.shape[depth:]] or [1], buffer.dtype, buffer.name),
            depth,
        )
        for buffer in program.scratch
        if any(b.buffer.same_as(buffer) for b in blocks)
    }
    writer = Writer(spec.vector, places)
    first = blocks[0].spatial[:depth]

    def row(values: Values) -> Any:
        points = [values[axis.var] for axis in first]
        parts = [
            writer.write(b, dict(zip((a.var for a in b.spatial[:depth]), points, strict=True)))
            for b in blocks
        ]
        return scope(sequence(parts), [buffer for buffer, _ in places.values()])

    big = sum(map(work, blocks)) >= PARALLEL_WORK
    return program.finish(fused(first, {}, row, "PARALLEL" if big else "SERIAL"), [])


def shared(program: Program) -> tuple[int, ...]:
    """Extents of the leading axes that all blocks walk alike; intermediates stay within a row."""
    blocks = program.blocks
    lead = tuple(a.extent for a in blocks[0].spatial)
    for block in blocks:
        extents = tuple(a.extent for a in block.spatial)
        same = 0
        while same < min(len(lead), len(extents)) and lead[same] == extents[same]:
            same += 1
        lead = lead[:same]
    while lead and not all(_within(block, len(lead), program.scratch) for block in blocks):
        lead = lead[:-1]
    # A row that is a single point of the last block has nothing left for vectors.
    while lead and _points(blocks[-1].spatial[len(lead) :]) == 1:
        lead = lead[:-1]
    return lead


def _points(axes: Sequence[Axis]) -> int:
    total = 1
    for axis in axes:
        total *= axis.extent
    return total


def _within(block: Block, depth: int, buffers: Sequence[Any]) -> bool:
    """Whether a block reads and writes intermediates at its own leading point only."""
    own = [a.var for a in block.spatial[:depth]]
    accesses = [(load.source, load.indices) for load in loads(block.term)]
    accesses.append((block.buffer, block.indices))
    for buffer, indices in accesses:
        if not any(buffer.same_as(b) for b in buffers):
            continue
        if len(indices) < depth:
            return False
        for axis, index in zip(block.spatial[:depth], indices, strict=False):
            if axis.extent > 1 and not index.same_as(own[block.spatial.index(axis)]):
                return False
    return True
