"""4-bit weights in plain loops that LLVM turns into vector code on any CPU.

Weights lie along k: 32 bytes hold a group of 64 inputs of one output, input i in the low nibble of
byte i and input i + 32 in its high one. So a dot product is one loop without shuffles.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.kernels.emit import (
    LANES,
    Emitter,
    buffer,
    ceil_div,
    epilogue_steps,
    kernel_name,
    lanes,
    store,
)
from t3c.codegen.kernels.family import AbstractGroupedKernels, Kernel, Packed
from t3c.codegen.kernels.gemv_groups import (
    COARSE_EXCESS,
    ROWS,
    GroupFinish,
    Inputs,
    emit_inputs,
    pack_scales,
    scale_panels,
    widen,
)
from t3c.codegen.kernels.linear_tiles import (
    PANEL,
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

HEIGHT = 2
"""Rows of a block."""
WIDTH = 4
"""Columns whose dot products share one loop."""
HALF = GROUP // 2
"""Bytes of a group."""
MACS_US = 1e4
"""Multiply-adds in a microsecond on one thread."""
WORTH_US = 100.0
"""Work above which several threads help."""


def pack_rows(q: I8) -> NDArray[np.uint8]:
    """Codes [n, k] of 4 bits as [n padded to 16][k/64][32]."""
    w = pad_to(q, PANEL, GROUP).astype(np.uint8) + np.uint8(8)
    low, high = np.split(w.reshape(len(w), -1, GROUP), 2, axis=2)
    return np.ascontiguousarray(low | (high << np.uint8(4)))


@dataclass(frozen=True, slots=True)
class Product:
    """One product of quantized rows and 4-bit weights along k.

    Attributes:
        inputs: The rows.
        weights: Buffers of nibbles: the one plane, or the coarse and the fine one.
        columns: Buffer of the scales of the weights.
        size: (m, n, k).
        finish: What becomes of the sums.
    """

    inputs: Inputs
    weights: tuple[str, ...]
    columns: str
    size: tuple[int, int, int]
    finish: GroupFinish

    def emit(self, e: Emitter) -> None:
        """Emit the whole product."""
        m, n, k = self.size
        scratch: dict[str, str] = {}

        def prepare() -> None:
            scratch["acc"] = e.alloc("acc", (HEIGHT, PANEL), "int32")
            scratch["sum"] = e.alloc("sum", (HEIGHT, PANEL), "float32")
            dtype = "int32" if self.finish.raw else "float32"
            scratch["rest"] = e.alloc("rest", (LANES,), dtype)

        def body(row: str, height: int, panel: str, count: int) -> None:
            self._block(e, scratch, row, height, panel, PANEL)

        def last(row: str, height: int, panel: str, count: int) -> None:
            self._block(e, scratch, row, height, panel, self.finish.valid(int(panel)))

        threads = m * n * k / MACS_US > WORTH_US
        blocks = cut(even_rows(m, HEIGHT), ceil_div(n, PANEL), 1, k, threads)
        walk_blocks(e, blocks, prepare, body, last if n % PANEL else None)

    def _block(
        self, e: Emitter, scratch: dict[str, str], row: str, height: int, panel: str, valid: int
    ) -> None:
        """Rows x 16 columns."""
        m, _, k = self.size
        acc, total, rest = scratch["acc"], scratch["sum"], scratch["rest"]
        rows = range(height)
        for i in rows:
            e(f"{total}[{i}, {lanes(0)}] = T.broadcast(T.float32(0), {LANES})")
        with e.loop("k", ceil_div(k, GROUP)) as kb:
            with e.loop("group", PANEL // WIDTH) as group:
                self._dots(e, acc, row, height, panel, kb, group)
            scale = e.let("scale", widen(f"{self.columns}[{panel}, {kb}, {lanes(0)}]", LANES))
            for i in rows:
                value = f"{acc}[{i}, {lanes(0)}]"
                if self.finish.raw:
                    at = f"{kb} * {m} + {row} + {i}"
                    store(e, rest, self.finish.y, at, f"({panel}) * {PANEL}", value, valid)
                else:
                    place = f"{total}[{i}, {lanes(0)}]"
                    e(f'{place} = {place} + T.cast({value}, "float32x{LANES}") * {scale}')
        if not self.finish.raw:
            for i in rows:
                value, at = f"{total}[{i}, {lanes(0)}]", f"{row} + {i}"
                step = f"{self.inputs.scales}[{at}]"
                self.finish.write(e, rest, value, step, at, panel, valid)

    def _dots(
        self, e: Emitter, acc: str, row: str, height: int, panel: str, kb: str, group: str
    ) -> None:
        """Dot products of one group: rows x `WIDTH` columns in one loop over bytes."""
        sums = [[e.alloc("sum", (1,), "int32") for _ in range(WIDTH)] for _ in range(height)]
        for i, line in enumerate(sums):
            for name in line:
                e(f"{name}[0] = {self.inputs.starts}[{row} + {i}, {kb}]")
        first = e.let("first", f"{panel} * {PANEL} + {group} * {WIDTH}")
        with e.loop("b", HALF) as b:
            for i, line in enumerate(sums):
                codes = [
                    f'T.cast({self.inputs.codes}[{row} + {i}, {kb} * {GROUP} + {at}], "int32")'
                    for at in (b, f"{b} + {HALF}")
                ]
                for j, name in enumerate(line):
                    low, high = self._nibbles(f"{first} + {j}, {kb}, {b}")
                    e(f"{name}[0] = {name}[0] + {codes[0]} * {low} + {codes[1]} * {high}")
        for i, line in enumerate(sums):
            for j, name in enumerate(line):
                e(f"{acc}[{i}, {group} * {WIDTH} + {j}] = {name}[0]")

    def _nibbles(self, at: str) -> tuple[str, str]:
        """Weights of the low and the high nibbles of a byte, above their codes by the excess."""
        found = []
        for half in ("& T.uint8(15)", ">> T.uint8(4)"):
            planes = [
                f'T.cast(T.cast({plane}[{at}] {half}, "int8"), "int32")' for plane in self.weights
            ]
            found.append(
                planes[0] if len(planes) == 1 else f"({planes[0]} * {RATIO} + {planes[1]})"
            )
        return found[0], found[1]


@final
class PortableGroups(AbstractGroupedKernels):
    """4-bit kernels over the codes of `PortableLinear`."""

    rank_step: ClassVar[int] = 16

    def pack_dense(self, w: Grouped, bias: F32) -> Packed:
        """Weights [n padded to 16][k/64][32], scales [n/16][k/64][16], bias."""
        return {
            "weight": pack_rows(w.q),
            "scale": pack_scales(w.scale),
            "bias": pack_columns(bias),
        }

    def pack_fine(self, w: Nested) -> Packed:
        """The second plane of nested weights, laid out as the first."""
        return {"weight": pack_rows(w.fine)}

    def dense(self, m: int, n: int, k: int, epilogue: str = "", *, raw: bool = False) -> Kernel:
        """See `AbstractGroupedKernels.dense`."""
        return self._dense(("weight",), (m, n, k), "" if raw else epilogue, raw)

    def nested(self, m: int, n: int, k: int, epilogue: str = "", *, raw: bool = False) -> Kernel:
        """See `AbstractGroupedKernels.nested`."""
        return self._dense(("weight", "fine"), (m, n, k), "" if raw else epilogue, raw)

    def _dense(
        self, planes: tuple[str, ...], size: tuple[int, int, int], epilogue: str, raw: bool
    ) -> Kernel:
        m, n, k = size
        check_sizes("portable", m=m, n=n, k=k)
        steps = epilogue_steps(epilogue)
        depth = ceil_div(k, GROUP)
        nested = len(planes) > 1
        e = Emitter()
        excess = COARSE_EXCESS * (RATIO + 1) if nested else COARSE_EXCESS
        inputs = emit_inputs(e, ROWS, "codes", "scales", (m, k), excess)
        finish = GroupFinish("y", n, "bias", steps, raw, RATIO if nested else 1)
        Product(inputs, planes, "scale", size, finish).emit(e)
        what = "linear4_portable_nested" if nested else "linear4_portable_dense"
        name = kernel_name(what, f"m{m}", f"n{n}", f"k{k}", "raw" if raw else epilogue)
        params = [
            buffer("codes", ROWS.shape(m, k), "int8"),
            buffer("scales", (m,), "float32"),
            *_weights("weight", "scale", n, k),
            buffer("bias", (ceil_div(n, PANEL) * PANEL,), "float32"),
        ]
        if nested:
            params.append(_plane("fine", n, k))
        if "add" in steps:
            params.append(buffer("residual", (m, n), "float32"))
        out = ((depth * m, n), "int32") if raw else ((m, n), "float32")
        params.append(buffer("y", *out))
        return Kernel(name, e.function(name, params), (out,))

    def pack_low_rank(self, low: Grouped, high: Grouped, bias: F32) -> Packed:
        """Both factors row by row: a rank reads a prefix of every row of the second."""
        return {
            "low": pack_rows(low.q),
            "low_scale": pack_scales(low.scale),
            "high": pack_rows(high.q),
            "high_scale": pack_scales(high.scale),
            "bias": pack_columns(bias),
        }

    def low_rank(
        self, m: int, n: int, k: int, rank: int, rank_max: int, epilogue: str = ""
    ) -> Kernel:
        """See `AbstractGroupedKernels.low_rank`."""
        check_sizes("portable", m=m, n=n, k=k)
        check_rank("portable", rank, rank_max, self.rank_step)
        steps = epilogue_steps(epilogue)
        e = Emitter()
        middle = e.alloc("middle", (m, rank), "float32")
        codes = e.alloc("codes", ROWS.shape(m, rank), "int8")
        scales = e.alloc("scales", (m,), "float32")
        inputs = emit_inputs(e, ROWS, "codes", "scales", (m, k))
        thin = GroupFinish(middle, rank, None)
        Product(inputs, ("low",), "low_scale", (m, rank, k), thin).emit(e)
        emit_quantize(e, ROWS, middle, codes, scales, (m, rank))
        between = emit_inputs(e, ROWS, codes, scales, (m, rank))
        wide = GroupFinish("y", n, "bias", steps)
        Product(between, ("high",), "high_scale", (m, n, rank), wide).emit(e)
        sizes = (f"m{m}", f"n{n}", f"k{k}", f"r{rank}of{rank_max}")
        name = kernel_name("linear4_portable_low_rank", *sizes, epilogue)
        params = [
            buffer("codes", ROWS.shape(m, k), "int8"),
            buffer("scales", (m,), "float32"),
            *_weights("low", "low_scale", rank_max, k),
            *_weights("high", "high_scale", n, rank_max),
            buffer("bias", (ceil_div(n, PANEL) * PANEL,), "float32"),
        ]
        if "add" in steps:
            params.append(buffer("residual", (m, n), "float32"))
        params.append(buffer("y", (m, n), "float32"))
        return Kernel(name, e.function(name, params), (((m, n), "float32"),))


def _weights(name: str, scale: str, n: int, k: int) -> list[str]:
    scales = buffer(scale, (scale_panels(n), ceil_div(k, GROUP), PANEL), "uint16")
    return [_plane(name, n, k), scales]


def _plane(name: str, n: int, k: int) -> str:
    return buffer(name, (ceil_div(n, PANEL) * PANEL, ceil_div(k, GROUP), HALF), "uint8")
