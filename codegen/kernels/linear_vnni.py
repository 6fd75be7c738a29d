"""Int8 linear layers on AVX-512 VNNI: blocks of 6 rows x 64 columns in registers.

The instruction multiplies unsigned by signed bytes, so weights are stored plus 128 (the codes
with their sign bit flipped) and every product exceeds the true one by 128 * sum(codes of the row).
The quantization pass writes that excess, negative, behind the scales; accumulators start there.
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
    splat,
)
from t3c.codegen.kernels.family import AbstractLinearKernels, Kernel, Packed
from t3c.codegen.kernels.linear_tiles import (
    DEPTH,
    PANEL,
    CodeLayout,
    Finish,
    check_rank,
    check_sizes,
    cut,
    emit_quantize,
    pack_columns,
    pack_depth_first,
    pack_panels,
    walk_blocks,
)
from t3c.core.codes import F32, Matrix

LAYOUT = CodeLayout(tiled=False, sums=True)
HEIGHT = 6
"""Most rows of a block: 6 x 4 accumulators, 4 weights and 1 activation fit 32 registers."""
WIDE = 4
"""Panels of a block."""
ALONE = 8
"""Panels of a block of one row: enough accumulators to hide the latency of the instruction."""
MACS_US = 2.5e5
"""Multiply-adds in a microsecond on one thread."""
BYTES_US = 2e4
"""Weight bytes read from memory in a microsecond on one thread."""
QUANTIZED_US = 6e3
"""Elements quantized in a microsecond on one thread."""
WORTH_US = 100.0
"""Work above which several threads help."""


def even_rows(m: int) -> tuple[tuple[int, int], ...]:
    """(height, count) of row blocks of at most HEIGHT, as even as possible."""
    count = ceil_div(m, HEIGHT)
    base, more = divmod(m, count)
    return tuple(run for run in ((base + 1, more), (base, count - more)) if run[1])


@dataclass(frozen=True, slots=True)
class Product:
    """One product over row-major activations and packed weights.

    Attributes:
        codes: Activations, [m][k padded to 64].
        weights: Weight buffer.
        depth_first: The weights are [k/64][n/16][16][64].
        offset: The weights are stored plus 128; else that is added here.
        size: (m, n, k).
        finish: What becomes of the accumulators.
    """

    codes: str
    weights: str
    depth_first: bool
    offset: bool
    size: tuple[int, int, int]
    finish: Finish

    def emit(self, e: Emitter) -> None:
        """Emit the whole product."""
        m, n, k = self.size
        threads = m * n * k / MACS_US > WORTH_US or n * k / BYTES_US > WORTH_US
        panels = ceil_div(n, PANEL)
        width = min(ALONE if m == 1 else WIDE, panels)
        rest = {"": ""}

        def prepare() -> None:
            rest[""] = e.alloc("rest", (LANES,), "int32" if self.finish.raw else "float32")

        def body(row: str, height: int, panel: str, count: int) -> None:
            self._block(e, rest[""], row, height, panel, [PANEL] * count)

        def last(row: str, height: int, panel: str, count: int) -> None:
            valid = [self.finish.valid(int(panel) + i) for i in range(count)]
            self._block(e, rest[""], row, height, panel, valid)

        blocks = cut(even_rows(m), panels, width, k, threads)
        walk_blocks(e, blocks, prepare, body, last if n % (width * PANEL) else None)

    def _block(
        self, e: Emitter, rest: str, row: str, height: int, panel: str, valid: list[int]
    ) -> None:
        excess = f"{self.finish.scales}[{{}} + {self.size[0]}]"
        accs = []
        for i in range(height):
            acc = e.alloc("acc", (len(valid) * LANES,), "int32")
            accs.append(acc)
            start = e.let("start", splat(f'T.cast({excess.format(f"{row} + {i}")}, "int32")'))
            for j in range(len(valid)):
                e(f"{acc}[{lanes(j * LANES)}] = {start}")
        lines = ceil_div(self.size[2], 4)
        whole, rest_lines = divmod(lines, PANEL)
        if whole:
            with e.loop("k", whole) as kb, e.loop("line", PANEL) as line:
                self._line(e, accs, row, panel, kb, line, len(valid))
        if rest_lines:
            with e.loop("line", rest_lines) as line:
                self._line(e, accs, row, panel, str(whole), line, len(valid))
        hoisted = [self.finish.hoist(e, f"{panel} + {j}") for j in range(len(valid))]
        for i, acc in enumerate(accs):
            for j, count in enumerate(valid):
                value = f"{acc}[{lanes(j * LANES)}]"
                at = f"{row} + {i}"
                self.finish.write(e, rest, value, at, f"{panel} + {j}", hoisted[j], count)

    def _line(
        self, e: Emitter, accs: list[str], row: str, panel: str, kb: str, line: str, panels: int
    ) -> None:
        """Four inputs of every row times 16 outputs of every panel."""
        weights = []
        for j in range(panels):
            where = f"{kb}, {panel} + {j}" if self.depth_first else f"{panel} + {j}, {kb}"
            value = f"{self.weights}[{where}, {line}, {lanes(0, DEPTH)}]"
            if not self.offset:
                value = f"{value} ^ T.broadcast(T.int8(-128), {DEPTH})"
            weights.append(e.let("w", value))
        for i, acc in enumerate(accs):
            four = f"{self.codes}[{row} + {i}, {lanes(f'{kb} * {DEPTH} + {line} * 4', 4)}]"
            word = splat(f'T.reinterpret({four}, dtype="int32")')
            x = e.let("x", f'T.reinterpret({word}, dtype="int8x{DEPTH}")')
            for j, w in enumerate(weights):
                at = f"{acc}[{lanes(j * LANES)}]"
                call = '"int32x16", "llvm.x86.avx512.vpdpbusd.512"'
                e(f"{at} = T.call_llvm_pure_intrin({call}, {at}, {w}, {x})")


@dataclass(frozen=True, slots=True)
class RowKernels:
    """Kernels over row-major activations.

    Attributes:
        prefix: Begins every kernel's name.
        offset: Weights are stored plus 128; else the kernels add it.
    """

    prefix: str
    offset: bool

    def quantize(self, m: int, k: int) -> Kernel:
        """Codes [m][k padded to 64] int8; scales and, behind them, the excess of each row."""
        e = Emitter()
        threads = m * k / QUANTIZED_US > WORTH_US
        emit_quantize(e, LAYOUT, "x", "codes", "scales", (m, k), threads=threads)
        name = kernel_name("linear", self.prefix, "quantize", f"m{m}", f"k{k}")
        codes, scales = LAYOUT.shape(m, k), (LAYOUT.scales(m),)
        params = [
            buffer("x", (m, k), "float32"),
            buffer("codes", codes, "int8"),
            buffer("scales", scales, "float32"),
        ]
        return Kernel(name, e.function(name, params), ((codes, "int8"), (scales, "float32")))

    def dense(self, m: int, n: int, k: int, epilogue: str, *, raw: bool) -> Kernel:
        """See `AbstractLinearKernels.dense`."""
        steps = epilogue_steps("" if raw else epilogue)
        e = Emitter()
        finish = Finish("y", n, "scales", "scale", "bias", steps, raw)
        Product("codes", "weight", False, self.offset, (m, n, k), finish).emit(e)
        name = kernel_name(
            "linear", self.prefix, "dense", f"m{m}", f"n{n}", f"k{k}", "raw" if raw else epilogue
        )
        padded = ceil_div(n, PANEL)
        params = [
            buffer("codes", LAYOUT.shape(m, k), "int8"),
            buffer("scales", (LAYOUT.scales(m),), "float32"),
            buffer("weight", (padded, ceil_div(k, DEPTH), PANEL, DEPTH), "int8"),
            buffer("scale", (padded * PANEL,), "float32"),
            buffer("bias", (padded * PANEL,), "float32"),
        ]
        if "add" in steps:
            params.append(buffer("residual", (m, n), "float32"))
        dtype = "int32" if raw else "float32"
        params.append(buffer("y", (m, n), dtype))
        return Kernel(name, e.function(name, params), (((m, n), dtype),))

    def low_rank(self, m: int, n: int, k: int, rank: int, rank_max: int, epilogue: str) -> Kernel:
        """See `AbstractLinearKernels.low_rank`."""
        steps = epilogue_steps(epilogue)
        e = Emitter()
        middle = e.alloc("middle", (m, rank), "float32")
        codes = e.alloc("codes", LAYOUT.shape(m, rank), "int8")
        scales = e.alloc("scales", (LAYOUT.scales(m),), "float32")
        thin = Finish(middle, rank, "scales", "low_scale", None)
        Product("codes", "low", False, self.offset, (m, rank, k), thin).emit(e)
        threads = m * rank / QUANTIZED_US > WORTH_US
        emit_quantize(e, LAYOUT, middle, codes, scales, (m, rank), threads=threads)
        wide = Finish("y", n, scales, "high_scale", "bias", steps)
        Product(codes, "high", True, self.offset, (m, n, rank), wide).emit(e)
        ranks = f"r{rank}of{rank_max}"
        name = kernel_name(
            "linear", self.prefix, "low_rank", f"m{m}", f"n{n}", f"k{k}", ranks, epilogue
        )
        padded, padded_rank = ceil_div(n, PANEL), ceil_div(rank_max, PANEL)
        params = [
            buffer("codes", LAYOUT.shape(m, k), "int8"),
            buffer("scales", (LAYOUT.scales(m),), "float32"),
            buffer("low", (padded_rank, ceil_div(k, DEPTH), PANEL, DEPTH), "int8"),
            buffer("low_scale", (padded_rank * PANEL,), "float32"),
            buffer("high", (ceil_div(rank_max, DEPTH), padded, PANEL, DEPTH), "int8"),
            buffer("high_scale", (padded * PANEL,), "float32"),
            buffer("bias", (padded * PANEL,), "float32"),
        ]
        if "add" in steps:
            params.append(buffer("residual", (m, n), "float32"))
        params.append(buffer("y", (m, n), "float32"))
        return Kernel(name, e.function(name, params), (((m, n), "float32"),))


def plus_128(packed: NDArray[np.int8]) -> NDArray[np.int8]:
    """Codes plus 128, kept as the bytes of int8."""
    return (packed.view(np.uint8) ^ np.uint8(128)).view(np.int8)


@final
class VnniLinear(AbstractLinearKernels):
    """AVX-512 VNNI int8 linear kernels."""

    name: ClassVar[str] = "x86-vnni"
    rank_step: ClassVar[int] = 16
    _rows: ClassVar[RowKernels] = RowKernels("x86_vnni", offset=True)

    def quantize(self, m: int, k: int) -> Kernel:
        """See `RowKernels.quantize`."""
        check_sizes(self.name, m=m, k=k)
        return self._rows.quantize(m, k)

    def pack_dense(self, w: Matrix, bias: F32) -> Packed:
        """Weights plus 128 as [n/16][k/64][16][64], then scale and bias padded to 16."""
        return {
            "weight": plus_128(pack_panels(w.q)),
            "scale": pack_columns(w.scale),
            "bias": pack_columns(bias),
        }

    def dense(self, m: int, n: int, k: int, epilogue: str = "", *, raw: bool = False) -> Kernel:
        """See `AbstractLinearKernels.dense`."""
        check_sizes(self.name, m=m, n=n, k=k)
        return self._rows.dense(m, n, k, epilogue, raw=raw)

    def pack_low_rank(self, low: Matrix, high: Matrix, bias: F32) -> Packed:
        """Both factors; the second as [rank/64][n/16][16][64], so that ranks are prefixes."""
        return {
            "low": plus_128(pack_panels(low.q)),
            "low_scale": pack_columns(low.scale),
            "high": plus_128(pack_depth_first(high.q)),
            "high_scale": pack_columns(high.scale),
            "bias": pack_columns(bias),
        }

    def low_rank(
        self, m: int, n: int, k: int, rank: int, rank_max: int, epilogue: str = ""
    ) -> Kernel:
        """See `AbstractLinearKernels.low_rank`."""
        check_sizes(self.name, m=m, n=n, k=k)
        check_rank(self.name, rank, rank_max, self.rank_step)
        return self._rows.low_rank(m, n, k, rank, rank_max, epilogue)
