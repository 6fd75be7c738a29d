"""Linear kernels of 4-bit weights: nibbles unpacked in registers, a scale for each 64 inputs.

A line of 64 bytes holds 16 outputs x 8 inputs: of each byte the low nibble belongs to input i, the
high one to input i + 4. Nibbles are codes plus 8, so sums exceed the true ones by 8 * sum(codes of
the group); accumulators start below by that. They are exact integers; a float32 sum over the
groups follows. One row reads every weight once, in several streams; many rows share unpacked
weights within a block.

A nested layer has a second plane of nibbles, laid out alike. With it the same lines give bytes
RATIO * coarse + fine, the 8-bit weights: one buffer serves both widths.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.kernels.emit import (
    LANES,
    Emitter,
    activate,
    buffer,
    ceil_div,
    epilogue_steps,
    kernel_name,
    lanes,
    load,
    splat,
    store,
)
from t3c.codegen.kernels.family import AbstractGroupedKernels, Kernel, Packed
from t3c.codegen.kernels.gemv_depth import FEW, DepthCut, each_panel, walk_depth
from t3c.codegen.kernels.linear_tiles import (
    DEPTH,
    PANEL,
    CodeLayout,
    check_rank,
    check_sizes,
    cut,
    emit_quantize,
    even_rows,
    pack_columns,
    pad_to,
    walk_blocks,
)
from t3c.core.codes import F32, GROUP, I8, RATIO, Grouped, Nested

ROWS = CodeLayout(tiled=False, sums=False)
"""What the products read: codes row by row."""
LINES = GROUP // 8
"""Lines of a group."""
COARSE_EXCESS = 8
"""What a nibble exceeds its code by."""
BYTES_US = 2e4
"""Weight bytes read from memory in a microsecond on one thread."""
WORTH_US = 100.0
"""Work above which several threads help."""


class GroupDot(ABC):
    """One processor's way to multiply nibbles by codes."""

    part: ClassVar[int]
    """Int32 lanes of an accumulator register."""
    panels: ClassVar[tuple[int, int, int]]
    """Panels of a block of one row, of 2 to `FEW` rows, of more."""
    height: ClassVar[int]
    """Most rows of a block."""
    most: ClassVar[int]
    """Accumulator registers of a block of few rows."""
    macs_us: ClassVar[float]
    """Multiply-adds in a microsecond on one thread."""
    excess: ClassVar[int] = COARSE_EXCESS * (RATIO + 1)
    """What the operands of nested weights exceed their codes by."""

    @abstractmethod
    def add(self, acc: str, low: tuple[str, str], high: tuple[str, str]) -> str:
        """The accumulators plus two (nibbles, codes) products of `part` x 4 bytes."""

    def inputs(self, codes: str) -> str:
        """Four codes, repeated for each of the `part` outputs."""
        word = f'T.broadcast(T.reinterpret({codes}, dtype="int32"), {self.part})'
        return f'T.reinterpret({word}, dtype="int8x{4 * self.part}")'

    def nibbles(self, e: Emitter, line: str) -> tuple[str, str]:
        """Low and high nibbles of `part` x 4 bytes, as bytes from 0 to 15."""
        size = 4 * self.part
        mask = f"T.broadcast(T.int8(15), {size})"
        line = e.let("w", line)
        words = f'T.reinterpret({line}, dtype="int16x{size // 2}")'
        down = f"{words} >> T.broadcast(T.int16(4), {size // 2})"
        high = f'T.reinterpret({down}, dtype="int8x{size}") & {mask}'
        return e.let("low", f"{line} & {mask}"), e.let("high", high)

    def operands(self, e: Emitter, lines: Sequence[str]) -> tuple[str, ...]:
        """Registers to multiply, of a line of one plane or of one line of each.

        Both planes make bytes RATIO * coarse + fine, from 0 to 15 * RATIO + 15. None carries into
        its neighbour, so words of 16 bits are shifted in place of bytes.
        """
        if len(lines) == 1:
            return self.nibbles(e, lines[0])
        size = 4 * self.part
        shift = f"T.broadcast(T.int16({RATIO.bit_length() - 1}), {size // 2})"
        planes = [self.nibbles(e, line) for line in lines]
        found = []
        for coarse, fine in zip(*planes, strict=True):
            words = f'T.reinterpret({coarse}, dtype="int16x{size // 2}") << {shift}'
            found.append(e.let("byte", f'T.reinterpret({words}, dtype="int8x{size}") + {fine}'))
        return tuple(found)

    def total(self, acc: str, operands: tuple[str, ...], codes: tuple[str, str]) -> str:
        """The accumulators plus the products of `operands` by the codes of both nibbles."""
        low, high = operands
        return self.add(acc, (low, codes[0]), (high, codes[1]))


def pack_nibbles(q: I8) -> NDArray[np.uint8]:
    """Codes [n, k] of 4 bits as lines [n/16][k/64][8][64]."""
    w = pad_to(q, PANEL, GROUP).astype(np.uint8) + np.uint8(8)
    n, k = w.shape
    blocks = w.reshape(n // PANEL, PANEL, k // GROUP, LINES, 2, 4)
    low, high = blocks[:, :, :, :, 0], blocks[:, :, :, :, 1]
    lines = (low | (high << np.uint8(4))).transpose(0, 2, 3, 1, 4)
    return np.ascontiguousarray(lines.reshape(n // PANEL, k // GROUP, LINES, PANEL * 4))


def pack_scales(scale: F32) -> NDArray[np.uint16]:
    """Scales [n, groups] as upper halves of float32 numbers, [n/32 * 2][groups][16]."""
    halves = (np.ascontiguousarray(scale).view(np.uint32) >> 16).astype(np.uint16)
    padded = np.pad(halves, ((0, -len(halves) % (2 * PANEL)), (0, 0)))
    groups = padded.shape[1]
    return np.ascontiguousarray(padded.reshape(-1, PANEL, groups).transpose(0, 2, 1))


def scale_panels(n: int) -> int:
    """Panels of packed scales: an even number, for whole cache lines."""
    return ceil_div(n, 2 * PANEL) * 2


def widen(halves: str, count: int) -> str:
    """Float32 numbers of their upper halves."""
    bits = f'T.cast({halves}, "int32x{count}") << T.broadcast(T.int32(16), {count})'
    return f'T.reinterpret({bits}, dtype="float32x{count}")'


@dataclass(frozen=True, slots=True)
class Inputs:
    """Quantized rows, as the products read them.

    Attributes:
        codes: [m][k padded to 64] int8.
        starts: [m][k/64] int32, the sum of a group's codes times minus the weights' excess.
        scales: [m] float32, or longer.
    """

    codes: str
    starts: str
    scales: str


def emit_inputs(
    e: Emitter,
    layout: CodeLayout,
    codes: str,
    scales: str,
    size: tuple[int, int],
    excess: int = COARSE_EXCESS,
) -> Inputs:
    """Emit the sums of groups, and a copy of codes [m, k] that do not lie row by row."""
    m, k = size
    depth = ceil_div(k, DEPTH)
    copied = layout.tiled or layout.dtype != "int8"
    rows = e.alloc("rows", (m, depth * DEPTH), "int8") if copied else codes
    starts = e.alloc("starts", (m, depth), "int32")
    with e.loop("row", m) as row, e.loop("k", depth) as kb:
        parts = []
        for u in range(DEPTH // LANES):
            part = e.let("part", layout.at(codes, row, kb, u * LANES))
            if copied:
                e(f'{ROWS.at(rows, row, kb, u * LANES)} = T.cast({part}, "int8x{LANES}")')
            parts.append(f'T.cast({part}, "int32x{LANES}")')
        total = f'T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add", {" + ".join(parts)})'
        e(f"{starts}[{row}, {kb}] = {total} * {-excess}")
    return Inputs(rows, starts, scales)


@dataclass(frozen=True, slots=True)
class GroupFinish:
    """What becomes of a row of 16 sums.

    Attributes:
        y: Output buffer name, [m, n]; int32 [groups * m, n] if raw.
        n: Columns of the output.
        bias: Buffer of the bias; None: no bias.
        steps: Epilogue.
        raw: Store the int32 accumulators of each group.
        ratio: What sums are divided by: steps of the codes in one of the scales' steps.
    """

    y: str
    n: int
    bias: str | None
    steps: Sequence[str] = ()
    raw: bool = False
    ratio: int = 1

    def valid(self, panel: int) -> int:
        """Columns of a panel that exist."""
        return min(PANEL, self.n - panel * PANEL)

    def write(
        self, e: Emitter, rest: str, total: str, scale: str, row: str, panel: str, valid: int
    ) -> None:
        """Finish and store the float32 sums of one row and panel."""
        col = f"({panel}) * {PANEL}"
        if self.ratio != 1:
            scale = f"{scale} * T.float32({1 / self.ratio!r})"
        value = f"{total} * {splat(scale)}"
        value = f"{value} + {self.bias}[{lanes(col)}]" if self.bias else value
        value = e.let("v", value)
        residual = load(e, rest, "residual", row, col, valid) if "add" in self.steps else None
        store(e, rest, self.y, row, col, activate(e, self.steps, value, residual), valid)


@dataclass(frozen=True, slots=True)
class GroupProduct:
    """One product of quantized rows and 4-bit weights.

    Attributes:
        inputs: The rows.
        weights: Buffers of nibbles: the one plane, or the coarse and the fine one.
        columns: Buffer of the scales of the weights.
        depth_first: Weights and scales lie with groups outermost.
        dot: The multiplication.
        size: (m, n, k).
        finish: What becomes of the sums.
    """

    inputs: Inputs
    weights: tuple[str, ...]
    columns: str
    depth_first: bool
    dot: GroupDot
    size: tuple[int, int, int]
    finish: GroupFinish

    @property
    def depth(self) -> int:
        """Groups."""
        return ceil_div(self.size[2], GROUP)

    @property
    def threads(self) -> bool:
        """Whether the work is worth several threads."""
        m, n, k = self.size
        read = n * k / 2 * len(self.weights)
        return max(m * n * k / self.dot.macs_us, read / BYTES_US) > WORTH_US

    def emit(self, e: Emitter) -> None:
        """Emit the whole product."""
        if self.depth_first and self.size[0] <= FEW and not self.finish.raw:
            self._by_depth(e)
        else:
            self._by_panels(e)

    def _by_panels(self, e: Emitter) -> None:
        """Panels outside, groups inside: sums stay in registers."""
        m, n, _ = self.size
        panels = ceil_div(n, PANEL)
        # as many streams of weights for two planes as for one: eight took 1.11 times int8's time
        # for one row (4096x4096, cold), four 1.04, with 1.03 times its bytes
        width = self.dot.panels[(m > 1) + (m > FEW)] // len(self.weights)
        width = min(max(1, width), panels)
        rest = {"": ""}

        def prepare() -> None:
            rest[""] = e.alloc("rest", (LANES,), "int32" if self.finish.raw else "float32")

        def body(row: str, height: int, panel: str, count: int) -> None:
            self._block(e, rest[""], row, height, panel, [PANEL] * count)

        def last(row: str, height: int, panel: str, count: int) -> None:
            valid = [self.finish.valid(int(panel) + i) for i in range(count)]
            self._block(e, rest[""], row, height, panel, valid)

        blocks = cut(even_rows(m, self.dot.height), panels, width, self.size[2], self.threads)
        walk_blocks(e, blocks, prepare, body, last if n % (width * PANEL) else None)

    def _block(
        self, e: Emitter, rest: str, row: str, height: int, panel: str, valid: list[int]
    ) -> None:
        part = self.dot.part
        each = LANES // part
        names = [f"{panel} + {j}" for j in range(len(valid))]
        rows = [f"{row} + {i}" for i in range(height)]
        sums = [[e.alloc("sum", (part,), "float32") for _ in names * each] for _ in rows]
        if not self.finish.raw:
            for line in sums:
                for name in line:
                    e(f"{name}[{lanes(0, part)}] = T.broadcast(T.float32(0), {part})")
        with e.loop("k", self.depth) as kb:
            places = [(name, kb) for name in names]
            accs = self._group(e, rows, places)
            if self.finish.raw:
                self._store_raw(e, rest, accs, rows, names, kb, valid)
            else:
                self._scale(e, accs, places, [[f"{x}[{lanes(0, part)}]" for x in y] for y in sums])
        if self.finish.raw:
            return
        for at, line in zip(rows, sums, strict=True):
            for j, some in enumerate(valid):
                total = join(e, line[j * each : (j + 1) * each], part, "float32")
                scale = f"{self.inputs.scales}[{at}]"
                self.finish.write(e, rest, total, scale, at, names[j], some)

    def _by_depth(self, e: Emitter) -> None:
        """Groups outside: a buffer with groups outermost is read from front to back.

        The sums of all columns lie in scratch, few enough for the first-level cache.
        """
        m, n, _ = self.size
        part = self.dot.part
        rows = [str(i) for i in range(m)]
        panels = ceil_div(n, PANEL)
        total = e.alloc("total", (m, panels * PANEL), "float32")

        def body(panel: str, groups: Sequence[str], first: str | None) -> None:
            starts = [f"({panel}) * {PANEL} + {p}" for p in range(0, LANES, part)]
            sums = [[f"{total}[{row}, {lanes(at, part)}]" for at in starts] for row in rows]
            if first is not None:
                with e.maybe(first):
                    for place in chain(*sums):
                        e(f"{place} = T.broadcast(T.float32(0), {part})")
            accs = self._group(e, rows, [(panel, group) for group in groups])
            each = LANES // part
            for s, group in enumerate(groups):
                some = [names[s * each : (s + 1) * each] for names in accs]
                self._scale(e, some, [(panel, group)], sums)

        cuts = DepthCut.of(self.dot.most, m * LANES // part, panels, self.depth)
        walk_depth(e, cuts, self.threads, body)
        rest = e.alloc("rest", (LANES,), "float32")
        for row in rows:
            scale = f"{self.inputs.scales}[{row}]"
            for panel, valid in each_panel(e, n):
                value = f"{total}[{row}, {lanes(f'{panel} * {PANEL}')}]"
                self.finish.write(e, rest, value, scale, row, panel, valid)

    def _group(
        self, e: Emitter, rows: Sequence[str], places: Sequence[tuple[str, str]]
    ) -> list[list[str]]:
        """Accumulators [row][place and part] of some (panel, group)."""
        part, dot = self.dot.part, self.dot
        groups = dict.fromkeys(group for _, group in places)
        accs: list[list[str]] = []
        for row in rows:
            starts = {g: e.let("start", f"{self.inputs.starts}[{row}, {g}]") for g in groups}
            accs.append([])
            for _, group in places:
                for _ in range(LANES // part):
                    name = e.alloc("acc", (part,), "int32")
                    e(f"{name}[{lanes(0, part)}] = T.broadcast({starts[group]}, {part})")
                    accs[-1].append(name)
        with e.loop("line", LINES) as line:
            weights = []
            for panel, group in places:
                for p in range(0, LANES, part):
                    at = f"{self._at(panel, group)}, {line}, {lanes(4 * p, 4 * part)}"
                    lines = [f"{plane}[{at}]" for plane in self.weights]
                    weights.append((group, dot.operands(e, lines)))
            for row, names in zip(rows, accs, strict=True):
                inputs = {g: self._inputs(e, row, g, line) for g in groups}
                for name, (group, operands) in zip(names, weights, strict=True):
                    acc = f"{name}[{lanes(0, part)}]"
                    e(f"{acc} = {dot.total(acc, operands, inputs[group])}")
        return accs

    def _at(self, panel: str, group: str) -> str:
        """Leading indices of a panel's group."""
        return f"{group}, {panel}" if self.depth_first else f"{panel}, {group}"

    def _inputs(self, e: Emitter, row: str, group: str, line: str) -> tuple[str, str]:
        """The codes that belong to the low and the high nibbles of a line."""
        first = f"({group}) * {GROUP} + {line} * 8"
        low, high = (
            e.let("x", self.dot.inputs(f"{self.inputs.codes}[{row}, {lanes(at, 4)}]"))
            for at in (first, f"{first} + 4")
        )
        return low, high

    def _scale(
        self,
        e: Emitter,
        accs: list[list[str]],
        places: Sequence[tuple[str, str]],
        sums: list[list[str]],
    ) -> None:
        """Add the accumulators of some (panel, group) times their scales to the sums."""
        part = self.dot.part
        scales = []
        for panel, group in places:
            for p in range(0, LANES, part):
                halves = f"{self.columns}[{self._at(panel, group)}, {lanes(p, part)}]"
                scales.append(e.let("scale", widen(halves, part)))
        for names, targets in zip(accs, sums, strict=True):
            for name, scale, target in zip(names, scales, targets, strict=True):
                value = f'T.cast({name}[{lanes(0, part)}], "float32x{part}") * {scale}'
                e(f"{target} = {target} + {value}")

    def _store_raw(
        self,
        e: Emitter,
        rest: str,
        accs: list[list[str]],
        rows: Sequence[str],
        panels: Sequence[str],
        kb: str,
        valid: list[int],
    ) -> None:
        each = LANES // self.dot.part
        for row, names in zip(rows, accs, strict=True):
            for j, some in enumerate(valid):
                whole = join(e, names[j * each : (j + 1) * each], self.dot.part, "int32")
                at = f"{kb} * {self.size[0]} + {row}"
                store(e, rest, self.finish.y, at, f"({panels[j]}) * {PANEL}", whole, some)


def join(e: Emitter, names: Sequence[str], part: int, dtype: str) -> str:
    """Registers of `part` lanes as one vector."""
    if len(names) == 1:
        return f"{names[0]}[{lanes(0)}]"
    whole = e.alloc("whole", (LANES,), dtype)
    for p, name in enumerate(names):
        e(f"{whole}[{lanes(p * part, part)}] = {name}[{lanes(0, part)}]")
    return f"{whole}[{lanes(0)}]"


class AbstractGroupFamily(AbstractGroupedKernels):
    """4-bit kernels of one `GroupDot` over the codes of an int8 family."""

    prefix: ClassVar[str]
    """Begins every kernel's name."""
    rank_step: ClassVar[int]
    dot: ClassVar[GroupDot]

    @abstractmethod
    def layout(self, m: int) -> CodeLayout:
        """Where the codes of m rows lie, as the int8 family's `quantize` wrote them."""

    def pack_dense(self, w: Grouped, bias: F32) -> Packed:
        """Weights [n/16][k/64][8][64], scales [n/16][k/64][16], bias."""
        return {
            "weight": pack_nibbles(w.q),
            "scale": pack_scales(w.scale),
            "bias": pack_columns(bias),
        }

    def pack_fine(self, w: Nested) -> Packed:
        """The second plane of nested weights, laid out as the first."""
        return {"weight": pack_nibbles(w.fine)}

    def dense(self, m: int, n: int, k: int, epilogue: str = "", *, raw: bool = False) -> Kernel:
        """See `AbstractGroupedKernels.dense`."""
        return self._dense(("weight",), COARSE_EXCESS, (m, n, k), "" if raw else epilogue, raw)

    def nested(self, m: int, n: int, k: int, epilogue: str = "", *, raw: bool = False) -> Kernel:
        """See `AbstractGroupedKernels.nested`."""
        planes = ("weight", "fine")
        return self._dense(planes, self.dot.excess, (m, n, k), "" if raw else epilogue, raw)

    def _dense(
        self,
        planes: tuple[str, ...],
        excess: int,
        size: tuple[int, int, int],
        epilogue: str,
        raw: bool,
    ) -> Kernel:
        m, n, k = size
        check_sizes(self.prefix, m=m, n=n, k=k)
        steps = epilogue_steps(epilogue)
        depth, panels = ceil_div(k, GROUP), ceil_div(n, PANEL)
        e = Emitter()
        inputs = emit_inputs(e, self.layout(m), "codes", "scales", (m, k), excess)
        ratio = 1 if len(planes) == 1 else RATIO
        finish = GroupFinish("y", n, "bias", steps, raw, ratio)
        GroupProduct(inputs, planes, "scale", False, self.dot, size, finish).emit(e)
        what = "dense" if len(planes) == 1 else "nested"
        sizes = (f"m{m}", f"n{n}", f"k{k}")
        name = kernel_name("linear4", self.prefix, what, *sizes, "raw" if raw else epilogue)
        lines = {plane: buffer(plane, (panels, depth, LINES, 64), "uint8") for plane in planes}
        params = [
            *self._codes(m, k),
            lines["weight"],
            buffer("scale", (scale_panels(n), depth, PANEL), "uint16"),
            buffer("bias", (panels * PANEL,), "float32"),
            *(text for plane, text in lines.items() if plane != "weight"),
        ]
        if "add" in steps:
            params.append(buffer("residual", (m, n), "float32"))
        out = ((depth * m, n), "int32") if raw else ((m, n), "float32")
        params.append(buffer("y", *out))
        return Kernel(name, e.function(name, params), (out,))

    def pack_low_rank(self, low: Grouped, high: Grouped, bias: F32) -> Packed:
        """Both factors; the second with groups of ranks outermost, so that ranks are prefixes."""
        turn = (1, 0, 2, 3)
        return {
            "low": pack_nibbles(low.q),
            "low_scale": pack_scales(low.scale),
            "high": np.ascontiguousarray(pack_nibbles(high.q).transpose(turn)),
            "high_scale": np.ascontiguousarray(pack_scales(high.scale).transpose(turn[:3])),
            "bias": pack_columns(bias),
        }

    def low_rank(
        self, m: int, n: int, k: int, rank: int, rank_max: int, epilogue: str = ""
    ) -> Kernel:
        """See `AbstractGroupedKernels.low_rank`."""
        check_sizes(self.prefix, m=m, n=n, k=k)
        check_rank(self.prefix, rank, rank_max, self.rank_step)
        steps = epilogue_steps(epilogue)
        e = Emitter()
        middle = e.alloc("middle", (m, rank), "float32")
        codes = e.alloc("codes", ROWS.shape(m, rank), "int8")
        scales = e.alloc("scales", (m,), "float32")
        inputs = emit_inputs(e, self.layout(m), "codes", "scales", (m, k))
        thin = GroupFinish(middle, rank, None)
        GroupProduct(inputs, ("low",), "low_scale", False, self.dot, (m, rank, k), thin).emit(e)
        emit_quantize(e, ROWS, middle, codes, scales, (m, rank))
        between = emit_inputs(e, ROWS, codes, scales, (m, rank))
        wide = GroupFinish("y", n, "bias", steps)
        GroupProduct(between, ("high",), "high_scale", True, self.dot, (m, n, rank), wide).emit(e)
        sizes = (f"m{m}", f"n{n}", f"k{k}", f"r{rank}of{rank_max}")
        name = kernel_name("linear4", self.prefix, "low_rank", *sizes, epilogue)
        panels, thin_panels = ceil_div(n, PANEL), ceil_div(rank_max, PANEL)
        depth, thin_depth = ceil_div(k, GROUP), ceil_div(rank_max, GROUP)
        params = [
            *self._codes(m, k),
            buffer("low", (thin_panels, depth, LINES, 64), "uint8"),
            buffer("low_scale", (scale_panels(rank_max), depth, PANEL), "uint16"),
            buffer("high", (thin_depth, panels, LINES, 64), "uint8"),
            buffer("high_scale", (thin_depth, scale_panels(n), PANEL), "uint16"),
            buffer("bias", (panels * PANEL,), "float32"),
        ]
        if "add" in steps:
            params.append(buffer("residual", (m, n), "float32"))
        params.append(buffer("y", (m, n), "float32"))
        return Kernel(name, e.function(name, params), (((m, n), "float32"),))

    def _codes(self, m: int, k: int) -> list[str]:
        layout = self.layout(m)
        return [
            buffer("codes", layout.shape(m, k), layout.dtype),
            buffer("scales", (layout.scales(m),), "float32"),
        ]
