"""Int8 linear layers on AMX: 32 x 32 outputs in four tiles, weights in panels of 16 columns.

A kernel asks the kernel of the operating system for the tile registers itself, and each of its
tasks loads the tile configuration and releases it; so the library needs no help from its loader.
One row (m = 1) runs on VNNI instead: a tile would be 15/16 empty.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from t3c.codegen.kernels.emit import (
    LANES,
    Emitter,
    buffer,
    ceil_div,
    epilogue_steps,
    i32,
    kernel_name,
    lanes,
)
from t3c.codegen.kernels.family import AbstractGroupedKernels, AbstractLinearKernels, Kernel, Packed
from t3c.codegen.kernels.gemv_amx import AmxGroups
from t3c.codegen.kernels.linear_rows import RowKernels
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
from t3c.codegen.kernels.linear_vnni import VnniDot
from t3c.core.codes import F32, Matrix

LAYOUT = CodeLayout(tiled=True, sums=False)
HEIGHT = 32
"""Rows of a full block: two tiles."""
MACS_US = 1.2e6
"""Multiply-adds in a microsecond on one thread. Source: TVM.md section 2."""
QUANTIZED_US = 6e3
"""Elements quantized in a microsecond on one thread."""
WORTH_US = 100.0
"""Work above which several threads help."""
NEAR = 8
"""Depth in tiles from which fetching the next weights ahead pays."""


def request(e: Emitter) -> None:
    """Ask for permission to use the tiles: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)."""
    args = "T.int64(158), T.int64(0x1023), T.int64(18)"
    e(f'T.evaluate(T.call_extern("int64", "syscall", {args}))')


def configure(e: Emitter) -> None:
    """Load palette 1 with eight tiles of 16 rows x 64 bytes."""
    cfg = e.alloc("cfg", (LANES,), "int32", "local")
    e(f"{cfg}[{lanes(0)}] = {i32(0)}")
    e(f"{cfg}[0] = 1")
    e(f"{cfg}[{lanes(4, 4)}] = T.broadcast(T.int32(0x00400040), 4)")
    e(f"{cfg}[{lanes(12, 2)}] = T.broadcast(T.int32(0x10101010), 2)")
    e.intrinsic("llvm.x86.ldtilecfg", f"T.address_of({cfg}[0])")


RELEASE = 'T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilerelease"))'


@dataclass(frozen=True, slots=True)
class Product:
    """One product over packed tiles.

    Attributes:
        codes: Activation tiles, [m/16][k/64][16][64].
        weights: Weight buffer.
        depth_first: The weights are [k/64][n/16][16][64].
        size: (m, n, k).
        finish: What becomes of the accumulators.
        fetch_output: Fetch the lines of the output ahead of their stores.
    """

    codes: str
    weights: str
    depth_first: bool
    size: tuple[int, int, int]
    finish: Finish
    fetch_output: bool

    def weight(self, panel: str, k: str, line: str = "0") -> str:
        """One line of a weight panel."""
        where = f"{k}, {panel}" if self.depth_first else f"{panel}, {k}"
        return f"{self.weights}[{where}, {line}, 0]"

    def emit(self, e: Emitter) -> None:
        """Emit the whole product."""
        m, n, k = self.size
        full, rest = divmod(m, HEIGHT)
        rows = tuple(run for run in ((HEIGHT, full), (rest, 1 if rest else 0)) if run[1])
        threads = m * n * k / MACS_US > WORTH_US
        panels = ceil_div(n, PANEL)
        names = {"acc": "", "rest": ""}

        def prepare() -> None:
            names["acc"] = e.alloc("acc", (HEIGHT, 2 * PANEL), "int32", "local")
            e.pin(names["acc"], (HEIGHT, 2 * PANEL), "int32")
            names["rest"] = e.alloc(
                "rest", (LANES,), "int32" if self.finish.raw else "float32", "local"
            )
            configure(e)

        def body(row: str, height: int, panel: str, count: int) -> None:
            self._block(e, names["acc"], names["rest"], row, height, panel, [PANEL] * count)

        def last(row: str, height: int, panel: str, count: int) -> None:
            valid = [self.finish.valid(int(panel) + i) for i in range(count)]
            self._block(e, names["acc"], names["rest"], row, height, panel, valid)

        blocks = cut(rows, panels, 2, k, threads)
        walk_blocks(e, blocks, prepare, body, last if n % (2 * PANEL) else None, RELEASE)

    def _block(
        self,
        e: Emitter,
        acc: str,
        rest: str,
        row: str,
        height: int,
        panel: str,
        valid: list[int],
    ) -> None:
        depth = ceil_div(self.size[2], DEPTH)
        two_rows, two_cols = height > 16, len(valid) > 1
        tile_row = f"{row} // 16"
        used = [0, *([1] if two_rows else []), *([2] if two_cols else [])]
        used += [3] if two_rows and two_cols else []
        for tile in used:
            e.intrinsic("llvm.x86.tilezero", f"T.int8({tile})")
        with e.loop("k", depth) as kb:
            self._load(e, 4, f"{self.codes}[{tile_row}, {kb}, 0, 0]")
            self._load(e, 6, self.weight(panel, kb))
            self._dot(e, 0, 4, 6)
            if height == HEIGHT and len(valid) == 2:
                self._fetch(e, row, panel, kb, depth)
            if two_rows:
                self._load(e, 5, f"{self.codes}[{tile_row} + 1, {kb}, 0, 0]")
                self._dot(e, 1, 5, 6)
            if two_cols:
                self._load(e, 7, self.weight(f"{panel} + 1", kb))
                self._dot(e, 2, 4, 7)
                if two_rows:
                    self._dot(e, 3, 5, 7)
        for tile in used:
            at = f"T.address_of({acc}[{16 * (tile % 2)}, {16 * (tile // 2)}])"
            e.intrinsic("llvm.x86.tilestored64", f"T.int8({tile})", at, "T.int64(128)")
        hoisted = [self.finish.hoist(e, f"{panel} + {i}") for i in range(len(valid))]
        with e.loop("i", height) as i:
            for j, count in enumerate(valid):
                value = e.let("acc", f"{acc}[{i}, {lanes(j * PANEL)}]")
                at = e.let("at", f"{row} + {i}")
                self.finish.write(e, rest, value, at, f"{panel} + {j}", hoisted[j], count)

    def _fetch(self, e: Emitter, row: str, panel: str, kb: str, depth: int) -> None:
        m, n, _ = self.size
        if depth >= NEAR:
            # the next two panels, a share of their 32 lines at each k in each block of rows
            each = ceil_div(32, m // HEIGHT)
            final = ceil_div(n, PANEL) - 1
            for u in range(each):
                line = f"({row} // 32 * {each} + {u})"
                e.prefetch(
                    self.weight(
                        f"T.min({panel} + 2 + {line} // 16 % 2, {final})", kb, f"{line} % 16"
                    ),
                    write=False,
                    locality=2,
                )
        if self.fetch_output:
            each = ceil_div(HEIGHT, depth)
            for u in range(each):
                at = f"{row} + T.min({kb} * {each} + {u}, {HEIGHT - 1})"
                for half in range(2):
                    e.prefetch(
                        f"{self.finish.y}[{at}, ({panel} + {half}) * {PANEL}]",
                        write=True,
                        locality=3,
                    )

    @staticmethod
    def _load(e: Emitter, tile: int, element: str) -> None:
        address = f"T.address_of({element})"
        e.intrinsic("llvm.x86.tileloadd64", f"T.int8({tile})", address, f"T.int64({DEPTH})")

    @staticmethod
    def _dot(e: Emitter, acc: int, left: int, right: int) -> None:
        tiles = ", ".join(f"T.int8({t})" for t in (acc, left, right))
        e.intrinsic("llvm.x86.tdpbssd", tiles)


@final
class AmxLinear(AbstractLinearKernels):
    """AMX int8 linear kernels; VNNI for a single row."""

    name: ClassVar[str] = "x86-amx"
    rank_step: ClassVar[int] = 32
    grouped: ClassVar[AbstractGroupedKernels | None] = AmxGroups()
    _row: ClassVar[RowKernels] = RowKernels("x86_amx_row", VnniDot(offset=False))

    def quantize(self, m: int, k: int) -> Kernel:
        """Codes [m/16][k/64][16][64] int8, zero padded ([1][k padded to 64] for m = 1)."""
        check_sizes(self.name, m=m, k=k)
        if m == 1:
            return self._row.quantize(m, k)
        e = Emitter()
        threads = m * k / QUANTIZED_US > WORTH_US
        emit_quantize(e, LAYOUT, "x", "codes", "scales", (m, k), threads=threads)
        name = kernel_name("linear_x86_amx_quantize", f"m{m}", f"k{k}")
        codes, scales = LAYOUT.shape(m, k), (LAYOUT.scales(m),)
        params = [
            buffer("x", (m, k), "float32"),
            buffer("codes", codes, "int8"),
            buffer("scales", scales, "float32"),
        ]
        return Kernel(name, e.function(name, params), ((codes, "int8"), (scales, "float32")))

    def rows_layout(self, m: int) -> CodeLayout | None:
        """Tiles; a single row goes another way."""
        return LAYOUT if m > 1 else None

    def pack_dense(self, w: Matrix, bias: F32) -> Packed:
        """Weights [n/16][k/64][16][64], then scale and bias padded to 16."""
        return {
            "weight": pack_panels(w.q),
            "scale": pack_columns(w.scale),
            "bias": pack_columns(bias),
        }

    def dense(self, m: int, n: int, k: int, epilogue: str = "", *, raw: bool = False) -> Kernel:
        """See `AbstractLinearKernels.dense`."""
        check_sizes(self.name, m=m, n=n, k=k)
        if m == 1:
            return self._row.dense(m, n, k, epilogue, self._row.tile(m, n), raw=raw)
        steps = epilogue_steps("" if raw else epilogue)
        e = Emitter()
        request(e)
        finish = Finish("y", n, "scales", "scale", "bias", steps, raw, tables=True)
        Product("codes", "weight", False, (m, n, k), finish, True).emit(e)
        name = kernel_name(
            "linear_x86_amx_dense", f"m{m}", f"n{n}", f"k{k}", "raw" if raw else epilogue
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

    def pack_low_rank(self, low: Matrix, high: Matrix, bias: F32) -> Packed:
        """Both factors; the second as [rank/64][n/16][16][64], so that ranks are prefixes."""
        return {
            "low": pack_panels(low.q),
            "low_scale": pack_columns(low.scale),
            "high": pack_depth_first(high.q),
            "high_scale": pack_columns(high.scale),
            "bias": pack_columns(bias),
        }

    def low_rank(
        self, m: int, n: int, k: int, rank: int, rank_max: int, epilogue: str = ""
    ) -> Kernel:
        """See `AbstractLinearKernels.low_rank`."""
        check_sizes(self.name, m=m, n=n, k=k)
        check_rank(self.name, rank, rank_max, self.rank_step)
        if m == 1:
            pair = self._row.pair(m, n, rank)
            return self._row.low_rank(m, n, k, (rank, rank_max), epilogue, pair)
        steps = epilogue_steps(epilogue)
        e = Emitter()
        rows = LAYOUT.scales(m)
        middle = e.alloc("middle", (rows, rank), "float32")
        codes = e.alloc("codes", LAYOUT.shape(m, rank), "int8")
        e.pin(codes, LAYOUT.shape(m, rank), "int8")
        scales = e.alloc("scales", (rows,), "float32")
        request(e)
        thin = Finish(middle, rank, "scales", "low_scale", None)
        Product("codes", "low", False, (m, rank, k), thin, False).emit(e)
        threads = m * rank / QUANTIZED_US > WORTH_US
        emit_quantize(e, LAYOUT, middle, codes, scales, (m, rank), pad_rows=False, threads=threads)
        wide = Finish("y", n, scales, "high_scale", "bias", steps, tables=True)
        Product(codes, "high", True, (m, n, rank), wide, True).emit(e)
        name = kernel_name(
            "linear_x86_amx_low_rank", f"m{m}", f"n{n}", f"k{k}", f"r{rank}of{rank_max}", epilogue
        )
        padded = ceil_div(n, PANEL)
        params = [
            buffer("codes", LAYOUT.shape(m, k), "int8"),
            buffer("scales", (rows,), "float32"),
            buffer("low", (ceil_div(rank_max, PANEL), ceil_div(k, DEPTH), PANEL, DEPTH), "int8"),
            buffer("low_scale", (ceil_div(rank_max, PANEL) * PANEL,), "float32"),
            buffer("high", (ceil_div(rank_max, DEPTH), padded, PANEL, DEPTH), "int8"),
            buffer("high_scale", (padded * PANEL,), "float32"),
            buffer("bias", (padded * PANEL,), "float32"),
        ]
        if "add" in steps:
            params.append(buffer("residual", (m, n), "float32"))
        params.append(buffer("y", (m, n), "float32"))
        return Kernel(name, e.function(name, params), (((m, n), "float32"),))
