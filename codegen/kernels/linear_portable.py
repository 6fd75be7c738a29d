"""Int8 linear layers in plain loops that LLVM turns into vector code on any CPU.

Activations and weights both lie along k, so that a block of 2 x 4 outputs is eight dot products in
one loop: SDOT where the processor has it, widening multiplies elsewhere. Epilogues are written in
vectors of 16, which LLVM splits.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from t3c.codegen.kernels.emit import (
    LANES,
    Emitter,
    buffer,
    ceil_div,
    epilogue_steps,
    kernel_name,
    lanes,
)
from t3c.codegen.kernels.family import AbstractGroupedKernels, AbstractLinearKernels, Kernel, Packed
from t3c.codegen.kernels.gemv_portable import PortableGroups
from t3c.codegen.kernels.linear_tiles import (
    DEPTH,
    PANEL,
    CodeLayout,
    Finish,
    check_rank,
    check_sizes,
    cut,
    emit_quantize,
    even_rows,
    pack_columns,
    pad_to,
    walk_blocks,
)
from t3c.core.codes import F32, I8, Matrix

LAYOUT = CodeLayout(tiled=False, sums=False)
HEIGHT = 2
"""Rows of a block."""
WIDTH = 4
"""Columns whose dot products share one loop."""
VECTOR = 16
"""Bytes that one step of the vectorized loop may take; k is padded to a multiple with zeros."""
MACS_US = 2e4
"""Multiply-adds in a microsecond on one thread."""
QUANTIZED_US = 1e3
"""Elements quantized in a microsecond on one thread."""
WORTH_US = 100.0
"""Work above which several threads help."""


def pack_rows(q: I8) -> I8:
    """Codes [n, k] with n padded to 16 and k to 64."""
    return np.ascontiguousarray(pad_to(q, PANEL, DEPTH)).astype(np.int8)


@dataclass(frozen=True, slots=True)
class Product:
    """One product of row-major codes and row-major weights.

    Attributes:
        codes: Activations, [m][k padded to 64].
        weights: Weight buffer, [n padded to 16][at least k, padded to 64].
        size: (m, n, k).
        finish: What becomes of the accumulators.
    """

    codes: str
    weights: str
    size: tuple[int, int, int]
    finish: Finish

    def emit(self, e: Emitter) -> None:
        """Emit the whole product."""
        m, n, k = self.size
        threads = m * n * k / MACS_US > WORTH_US
        scratch = {"acc": "", "rest": ""}

        def prepare() -> None:
            scratch["acc"] = e.alloc("acc", (HEIGHT, PANEL), "int32")
            dtype = "int32" if self.finish.raw else "float32"
            scratch["rest"] = e.alloc("rest", (LANES,), dtype)

        def body(row: str, height: int, panel: str, count: int) -> None:
            self._block(e, scratch["acc"], scratch["rest"], row, height, panel, PANEL)

        def last(row: str, height: int, panel: str, count: int) -> None:
            valid = self.finish.valid(int(panel))
            self._block(e, scratch["acc"], scratch["rest"], row, height, panel, valid)

        blocks = cut(even_rows(m, HEIGHT), ceil_div(n, PANEL), 1, k, threads)
        walk_blocks(e, blocks, prepare, body, last if n % PANEL else None)

    def _block(
        self, e: Emitter, acc: str, rest: str, row: str, height: int, panel: str, valid: int
    ) -> None:
        """Rows x 16 columns: the dot products in groups of WIDTH columns, then the epilogue."""
        steps = ceil_div(self.size[2], VECTOR) * VECTOR
        with e.loop("group", PANEL // WIDTH) as group:
            sums = [[e.alloc("sum", (1,), "int32") for _ in range(WIDTH)] for _ in range(height)]
            for line in sums:
                for name in line:
                    e(f"{name}[0] = 0")
            first = e.let("first", f"{panel} * {PANEL} + {group} * {WIDTH}")
            with e.loop("k", steps) as k:
                for i in range(height):
                    for j in range(WIDTH):
                        x = f'T.cast({self.codes}[{row} + {i}, {k}], "int32")'
                        w = f'T.cast({self.weights}[{first} + {j}, {k}], "int32")'
                        e(f"{sums[i][j]}[0] = {sums[i][j]}[0] + {x} * {w}")
            for i in range(height):
                for j in range(WIDTH):
                    e(f"{acc}[{i}, {group} * {WIDTH} + {j}] = {sums[i][j]}[0]")
        hoisted = self.finish.hoist(e, panel)
        for i in range(height):
            value = f"{acc}[{i}, {lanes(0)}]"
            self.finish.write(e, rest, value, f"{row} + {i}", panel, hoisted, valid)


@final
class PortableLinear(AbstractLinearKernels):
    """Int8 linear kernels of plain loops."""

    name: ClassVar[str] = "portable"
    rank_step: ClassVar[int] = 16
    grouped: ClassVar[AbstractGroupedKernels | None] = PortableGroups()

    def quantize(self, m: int, k: int) -> Kernel:
        """Codes [m][k padded to 64] int8 and scales [m]."""
        check_sizes(self.name, m=m, k=k)
        e = Emitter()
        threads = m * k / QUANTIZED_US > WORTH_US
        emit_quantize(e, LAYOUT, "x", "codes", "scales", (m, k), threads=threads)
        name = kernel_name("linear_portable_quantize", f"m{m}", f"k{k}")
        codes, scales = LAYOUT.shape(m, k), (LAYOUT.scales(m),)
        params = [
            buffer("x", (m, k), "float32"),
            buffer("codes", codes, "int8"),
            buffer("scales", scales, "float32"),
        ]
        return Kernel(name, e.function(name, params), ((codes, "int8"), (scales, "float32")))

    def pack_dense(self, w: Matrix, bias: F32) -> Packed:
        """Weights [n padded to 16][k padded to 64], scale and bias padded to 16."""
        return {
            "weight": pack_rows(w.q),
            "scale": pack_columns(w.scale),
            "bias": pack_columns(bias),
        }

    def dense(self, m: int, n: int, k: int, epilogue: str = "", *, raw: bool = False) -> Kernel:
        """See `AbstractLinearKernels.dense`."""
        check_sizes(self.name, m=m, n=n, k=k)
        steps = epilogue_steps("" if raw else epilogue)
        e = Emitter()
        finish = Finish("y", n, "scales", "scale", "bias", steps, raw)
        Product("codes", "weight", (m, n, k), finish).emit(e)
        name = kernel_name(
            "linear_portable_dense", f"m{m}", f"n{n}", f"k{k}", "raw" if raw else epilogue
        )
        padded = ceil_div(n, PANEL) * PANEL
        params = [
            buffer("codes", LAYOUT.shape(m, k), "int8"),
            buffer("scales", (LAYOUT.scales(m),), "float32"),
            buffer("weight", (padded, ceil_div(k, DEPTH) * DEPTH), "int8"),
            buffer("scale", (padded,), "float32"),
            buffer("bias", (padded,), "float32"),
        ]
        if "add" in steps:
            params.append(buffer("residual", (m, n), "float32"))
        dtype = "int32" if raw else "float32"
        params.append(buffer("y", (m, n), dtype))
        return Kernel(name, e.function(name, params), (((m, n), dtype),))

    def pack_low_rank(self, low: Matrix, high: Matrix, bias: F32) -> Packed:
        """Both factors row by row: a rank reads a prefix of every row of the second."""
        return {
            "low": pack_rows(low.q),
            "low_scale": pack_columns(low.scale),
            "high": pack_rows(high.q),
            "high_scale": pack_columns(high.scale),
            "bias": pack_columns(bias),
        }

    def low_rank(
        self, m: int, n: int, k: int, rank: int, rank_max: int, epilogue: str = ""
    ) -> Kernel:
        """See `AbstractLinearKernels.low_rank`."""
        check_sizes(self.name, m=m, n=n, k=k)
        check_rank(self.name, rank, rank_max, self.rank_step)
        steps = epilogue_steps(epilogue)
        e = Emitter()
        middle = e.alloc("middle", (m, rank), "float32")
        codes = e.alloc("codes", LAYOUT.shape(m, rank), "int8")
        scales = e.alloc("scales", (LAYOUT.scales(m),), "float32")
        thin = Finish(middle, rank, "scales", "low_scale", None)
        Product("codes", "low", (m, rank, k), thin).emit(e)
        threads = m * rank / QUANTIZED_US > WORTH_US
        emit_quantize(e, LAYOUT, middle, codes, scales, (m, rank), threads=threads)
        wide = Finish("y", n, scales, "high_scale", "bias", steps)
        Product(codes, "high", (m, n, rank), wide).emit(e)
        ranks = f"r{rank}of{rank_max}"
        name = kernel_name("linear_portable_low_rank", f"m{m}", f"n{n}", f"k{k}", ranks, epilogue)
        padded = ceil_div(n, PANEL) * PANEL
        padded_rank = ceil_div(rank_max, PANEL) * PANEL
        params = [
            buffer("codes", LAYOUT.shape(m, k), "int8"),
            buffer("scales", (LAYOUT.scales(m),), "float32"),
            buffer("low", (padded_rank, ceil_div(k, DEPTH) * DEPTH), "int8"),
            buffer("low_scale", (padded_rank,), "float32"),
            buffer("high", (padded, ceil_div(rank_max, DEPTH) * DEPTH), "int8"),
            buffer("high_scale", (padded,), "float32"),
            buffer("bias", (padded,), "float32"),
        ]
        if "add" in steps:
            params.append(buffer("residual", (m, n), "float32"))
        params.append(buffer("y", (m, n), "float32"))
        return Kernel(name, e.function(name, params), (((m, n), "float32"),))
