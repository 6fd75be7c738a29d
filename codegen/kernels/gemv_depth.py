"""Products of few rows with weights whose depth lies outermost, read from front to back.

The second factor of a low-rank layer is packed that way, so that a rank is a prefix. A kernel that
keeps a block of columns in registers would jump through it; here the sums of all columns lie in
scratch, and every weight is met in the order of memory, at a few depths in turn.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Self

from t3c.codegen.kernels.emit import LANES, Emitter, ceil_div, lanes
from t3c.codegen.kernels.linear_tiles import DEPTH, PANEL, TASKS, Finish

if TYPE_CHECKING:
    from t3c.codegen.kernels.linear_rows import Dot

FEW = 4
"""Rows up to which a kernel waits for its weights."""
STREAMS = 8
"""Depths that are read in turn: one stream alone waits at every page. Two neighbouring panels of
each in turn took 1.3 times as long as one (4096x1024, cold)."""
BYTES_US = 2e4
"""Weight bytes read from memory in a microsecond on one thread."""
WORTH_US = 100.0
"""Work above which several threads help."""


@dataclass(frozen=True, slots=True)
class DepthCut:
    """How a product is cut.

    Attributes:
        panels: Panels of the output.
        depth: Blocks of 64 inputs.
        streams: Depths of a block.
    """

    panels: int
    depth: int
    streams: int

    @classmethod
    def of(cls, most: int, each: int, panels: int, depth: int) -> Self:
        """As many streams as `most` accumulators allow, `each` for a panel and depth."""
        return cls(panels, depth, min(STREAMS, depth, max(1, most // each)))


def walk_depth(
    e: Emitter,
    cut: DepthCut,
    threads: bool,
    body: Callable[[str, Sequence[str], str | None], None],
) -> None:
    """Emit the loops over depths and panels.

    Args:
        e: Emitter.
        cut: The blocks.
        threads: Whether the work is worth several threads.
        body: Emits one block, of (panel, depths, first): the condition of a first visit, "" where
            there is no other, None where there was one.
    """
    hop, rest = divmod(cut.depth, cut.streams)
    tasks = min(TASKS, cut.panels) if threads else 1
    each = ceil_div(cut.panels, tasks)

    def run(task: str, depths: Sequence[str], first: str | None) -> None:
        with e.loop("n", each) as inner:
            panel = e.let("panel", f"{task} * {each} + {inner}")
            with e.maybe(f"{panel} < {cut.panels}" if tasks * each > cut.panels else ""):
                body(panel, depths, first)

    with e.parallel("task", tasks, threads) as task:
        with e.loop("k", hop) as kb:
            depths = [f"{kb} + {s * hop}" for s in range(cut.streams)]
            run(task, depths, f"{kb} == 0" if hop > 1 else "")
        if rest:
            run(task, [str(hop * cut.streams + s) for s in range(rest)], None)


def each_panel(e: Emitter, n: int) -> Iterator[tuple[str, int]]:
    """Loop over the panels of n columns: (panel, columns that exist)."""
    whole, rest = divmod(n, PANEL)
    if whole:
        with e.loop("n", whole) as panel:
            yield panel, PANEL
    if rest:
        yield str(whole), rest


@dataclass(frozen=True, slots=True)
class DepthProduct:
    """One int8 product of at most `FEW` rows.

    Attributes:
        codes: Activations, [m][k padded to 64].
        weights: Buffer [k/64][n/16][lines][bytes].
        dot: The multiplication.
        size: (m, n, k).
        finish: What becomes of the accumulators.
    """

    codes: str
    weights: str
    dot: "Dot"
    size: tuple[int, int, int]
    finish: Finish

    def emit(self, e: Emitter) -> None:
        """Emit the whole product."""
        m, n, k = self.size
        dot, part = self.dot, self.dot.part
        panels = ceil_div(n, PANEL)
        total = e.alloc("total", (m, panels * PANEL), "int32")
        threads = n * k / BYTES_US > WORTH_US
        cut = DepthCut.of(
            2 * min(8, dot.alone) * LANES // part, m * LANES // part, panels, ceil_div(k, DEPTH)
        )
        walk_depth(e, cut, threads, lambda *block: self._block(e, total, *block))
        rest = e.alloc("rest", (LANES,), "float32")
        for panel, valid in each_panel(e, n):
            hoisted = self.finish.hoist(e, panel)
            for row in range(m):
                value = f"{total}[{row}, {lanes(f'{panel} * {PANEL}')}]"
                self.finish.write(e, rest, value, str(row), panel, hoisted, valid)

    def _block(
        self, e: Emitter, total: str, panel: str, depths: Sequence[str], first: str | None
    ) -> None:
        dot, part = self.dot, self.dot.part
        parts = range(0, LANES, part)
        rows = range(self.size[0])
        keys = product(rows, depths, parts)
        accs = {key: e.alloc("acc", (part,), "int32") for key in keys}
        for name in accs.values():
            e(f"{name}[{lanes(0, part)}] = T.broadcast(T.int32(0), {part})")
        with e.loop("line", dot.lines()) as line:
            for depth in depths:
                weights = {}
                for p in parts:
                    at = lanes(p * dot.depth, part * dot.depth)
                    text = f"{self.weights}[{depth}, {panel}, {line}, {at}]"
                    weights[p] = e.let("w", dot.weight(text))
                for row in rows:
                    at = lanes(f"({depth}) * {DEPTH} + {line} * {dot.depth}", dot.depth)
                    x = e.let("x", dot.inputs(f"{self.codes}[{row}, {at}]"))
                    for p in parts:
                        acc = f"{accs[row, depth, p]}[{lanes(0, part)}]"
                        e(f"{acc} = {dot.add(acc, weights[p], x)}")
        for row in rows:
            start = "T.int32(0)"
            if dot.layout.sums:
                excess = f"{self.finish.scales}[{row + self.size[0]}]"
                start = e.let("start", f'T.cast({excess}, "int32")')
            for p in parts:
                place = f"{total}[{row}, {lanes(f'({panel}) * {PANEL} + {p}', part)}]"
                if first is not None:
                    with e.maybe(first):
                        e(f"{place} = T.broadcast({start}, {part})")
                values = [f"{accs[row, d, p]}[{lanes(0, part)}]" for d in depths]
                e(f"{place} = {place} + {' + '.join(values)}")
