"""Attention whose two products multiply 16-bit codes: twice the speed of float32 on x86.

Queries, keys and values of a head share one scale each (codes of 12 to 15 bits), softmax gives
codes of 12 bits, and sums are exact in int32. The output is off by about 8e-4 of its norm, less
than bfloat16 would be and a tenth of what int8 activations cost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isqrt, log2
from typing import ClassVar, final

from t3c.codegen.kernels.attention_frame import AbstractAttention, AttentionShape
from t3c.codegen.kernels.emit import ROUND, ROUND_BITS
from t3c.codegen.kernels.vectors import (
    LOG2_E,
    MINUS_INFINITY,
    ROUNDER,
    Panels,
    Vectors,
    panels,
    scope,
)

SPAN = 256
"""Keys whose products are summed in int32."""
SHARE = 4095
"""Largest code of a softmax."""
VALUE = 2047
"""Largest code of a value: SPAN * SHARE * VALUE < 2**31."""
EXP2 = (
    0.9999992847442627,
    0.6931217908859253,
    0.240247443318367,
    0.05591785907745361,
    0.009570102207362652,
)
"""2**f on [-0.5, 0.5], relative error 2.7e-6. Source: as `vectors.EXP2_POLYNOMIAL`."""
FAINT = -100.0
"""A power of two that has the code 0 however it is scaled."""
_PRODUCTS = (
    (16, "avx512_vnni", "llvm.x86.avx512.vpdpwssd.512"),
    (8, "avx_vnni", "llvm.x86.avx512.vpdpwssd.256"),
    (8, "avx2", "llvm.x86.avx2.pmadd.wd"),
)


@dataclass(frozen=True, slots=True)
class WordProduct:
    """An instruction that multiplies pairs of int16 and adds the two products.

    Attributes:
        lanes: Int32 lanes of its result.
        intrinsic: LLVM's name.
    """

    lanes: int
    intrinsic: str

    def add(self, acc: str, left: str, right: str) -> str:
        """The accumulators plus the products."""
        call = f'T.call_llvm_pure_intrin("int32x{self.lanes}", "{self.intrinsic}", '
        if "vpdpwssd" in self.intrinsic:
            return f"{call}{acc}, {left}, {right})"
        return f"{acc} + {call}{left}, {right})"


def word_product(features: frozenset[str], lanes: int) -> WordProduct | None:
    """The instruction of a processor with vectors of `lanes` float32; None: it has none."""
    for width, feature, intrinsic in _PRODUCTS:
        if width == lanes and feature in features:
            return WordProduct(lanes, intrinsic)
    return None


@final
class WordAttention(AbstractAttention):
    """Keys as [panel][head_dim / 2][keys][2], values as [panel][kv_len / 2][columns][2]."""

    kind: ClassVar[str] = "attention_words"

    def __init__(
        self,
        shape: AttentionShape,
        scale: float,
        mask: tuple[int, ...] | None,
        causal: bool,
        v: Vectors,
        words: WordProduct,
    ) -> None:
        """See `t3c.codegen.kernels.attention.attention`."""
        super().__init__(shape, scale, mask, causal, v)
        self.words = words

    @staticmethod
    def fits(head_dim: int, value_dim: int, lanes: int) -> bool:
        """Whether the sizes are whole vectors of pairs."""
        return head_dim % (2 * lanes) == 0 and value_dim % lanes == 0

    @property
    def score_code(self) -> int:
        """Largest code of queries and keys: head_dim products fit in int32."""
        return min(32767, isqrt((2**31 - 1) // self.shape.head_dim))

    def stage(self, lines: int) -> None:
        """Codes of queries and of their softmax."""
        s, e = self.shape, self.e
        keys = self.key_vectors * self.v.lanes
        e(f'qw = T.alloc_buffer(({lines}, {s.head_dim}), "int16")')
        e(f'shares = T.alloc_buffer(({lines}, {keys}), "int16")')
        last = s.q_len - self.rows
        start = e.let("own_row", f"T.min(first * {self.rows}, {last})")
        count = f"T.min({self.per_chunk * self.rows}, {s.q_len} - {start})"
        column = f"h * {s.head_dim}"
        up = self.factor("q", (start, count), column, s.head_dim, self.score_code)
        e(f"q_up: T.let = {up}")
        e(f"step: T.let = T.float32({self.scale!r}) / (q_up * k_up)")

    def phases(self) -> tuple[Callable[[], None], ...]:
        """Codes of the queries, scores, their softmax, the product."""
        return (self.code_queries, self.score, self.softmax, self.product)

    def factor(
        self, array: str, rows: tuple[str, str], column: str, width: int, largest: int
    ) -> str:
        """Largest code over the largest magnitude of array[b, rows, column:column + width]."""
        e, v = self.e, self.v
        cells = [f"{e.alloc('top', (v.lanes,), 'float32')}[{v.at(0)}]" for _ in range(4)]
        for cell in cells:
            e(f"{cell} = {v.const(1e-30)}")
        row = e.fresh("row")
        with e.block(f"for {row} in range({rows[1]}):"):
            for j in range(width // v.lanes):
                value = f"{array}[b, {rows[0]} + {row}, {v.at(f'{column} + {j * v.lanes}')}]"
                cell = cells[j % len(cells)]
                e(f"{cell} = T.max({cell}, T.abs({value}))")
        a, b, c, d = cells
        most = v.largest(e, e.let("most", f"T.max(T.max({a}, {b}), T.max({c}, {d}))"))
        return f"T.float32({largest}) / {most}"

    def coded(self, value: str, factor: str) -> str:
        """Bits of a float32 vector whose low 16 are the codes."""
        v = self.v
        shifted = v.fma(value, v.splat(factor), v.const(ROUND))
        return f'T.reinterpret("int32x{v.lanes}", {shifted})'

    def code_queries(self) -> None:
        """Codes of the rows of one tile."""
        s, e, v = self.shape, self.e, self.v
        n = v.lanes
        with e.block(f"for i in range({self.rows}):"):
            for j in range(s.head_dim // n):
                value = f"q[b, s0 + i, {v.at(f'h * {s.head_dim} + {j * n}')}]"
                code = f'T.cast({self.coded(value, "q_up")}, "int16x{n}")'
                e(f"qw[z + i, {v.at(j * n)}] = {code}")

    def pack_keys(self) -> None:
        """Kt, for each panel: [head_dim / 2][width * lanes][2]; past the end the last key."""
        s, e, v = self.shape, self.e, self.v
        n, d = v.lanes, s.head_dim
        e(f'kt = T.alloc_buffer(({self.key_vectors * d * n},), "int16")')
        e(f'kw = T.alloc_buffer(({n}, {d}), "int16")')
        column = f"kv * {d}"
        e(f"k_up: T.let = {self.factor('k', ('0', str(s.kv_len)), column, d, self.score_code)}")
        for run in panels(self.key_vectors, self.widest):
            with (
                e.block(f"for p in range({run.count}):"),
                e.block(f"for j in range({run.width}):"),
            ):
                base = e.let("base", f"({run.first} + p * {run.width}) * {d * n} + j * {2 * n}")
                key = f"({run.first} + p * {run.width} + j) * {n}"
                with e.block(f"for i in range({n}):"):
                    for c in range(d // n):
                        row = f"T.min({key} + i, {s.kv_len - 1})"
                        value = f"k[b, {row}, {v.at(f'{column} + {c * n}')}]"
                        code = f'T.cast({self.coded(value, "k_up")}, "int16x{n}")'
                        e(f"kw[i, {v.at(c * n)}] = {code}")
                with e.block(f"for dd in range({d // (2 * n)}):"):
                    pairs = [
                        e.let("row", self.pairs(f"kw[{i}, {self.wide(f'dd * {2 * n}')}]"))
                        for i in range(n)
                    ]
                    for i, line in enumerate(v.transpose(e, pairs)):
                        at = f"{base} + (dd * {n} + {i}) * {run.width * 2 * n}"
                        e(f'kt[{self.wide(at)}] = T.reinterpret("int16x{2 * n}", {line})')

    def wide(self, start: str) -> str:
        """Index of the 16-bit codes of one vector."""
        return f"T.ramp({start}, 1, {2 * self.v.lanes})"

    def pairs(self, codes: str) -> str:
        """A vector of codes as int32 lanes."""
        return f'T.reinterpret("int32x{self.v.lanes}", {codes})'

    def pack_values(self) -> None:
        """Vp, for each panel: [kv_len / 2][width * lanes][2]; past the end zero."""
        s, e, v = self.shape, self.e, self.v
        n, half = v.lanes, -(-s.kv_len // 2)
        e(f'vp = T.alloc_buffer(({self.value_vectors * half * 2 * n},), "int16")')
        column = f"kv * {s.value_dim}"
        values = ("0", str(s.kv_len))
        e(f"v_up: T.let = {self.factor('v', values, column, s.value_dim, VALUE)}")
        for run in panels(self.value_vectors, self.widest):
            for count, odd in ((s.kv_len // 2, False), (1, True)):
                if odd and s.kv_len % 2 == 0:
                    continue
                with (
                    e.block(f"for p in range({run.count}):"),
                    e.block(f"for t in range({count}):"),
                ):
                    pair = e.let("pair", str(s.kv_len // 2) if odd else "t")
                    first = f"({run.first} + p * {run.width})"
                    base = e.let("base", f"{first} * {half * 2 * n} + {pair} * {run.width * 2 * n}")
                    for j in range(run.width):
                        at = v.at(f"{column} + ({first} + {j}) * {n}")
                        low = self.coded(f"v[b, 2 * {pair}, {at}]", "v_up")
                        word = f"T.bitwise_and({low}, T.broadcast(T.int32(65535), {n}))"
                        if not odd:
                            high = self.coded(f"v[b, 2 * {pair} + 1, {at}]", "v_up")
                            up = f"T.shift_left({high}, T.broadcast(T.int32(16), {n}))"
                            word = f"T.bitwise_or({word}, {up})"
                        place = self.wide(f"{base} + {j * 2 * n}")
                        e(f'vp[{place}] = T.reinterpret("int16x{2 * n}", {word})')

    def word_tile(
        self,
        width: int,
        extent: str | int,
        left: Callable[[int, str], str],
        right: Callable[[int, str], str],
    ) -> list[list[str]]:
        """tile[i][j] = sum over k of the products of pairs, int32 in registers."""
        e, v, n = self.e, self.v, self.v.lanes
        held = [e.alloc("acc", (width * n,), "int32") for _ in range(self.rows)]
        cells = [[f"{held[i]}[{v.at(j * n)}]" for j in range(width)] for i in range(self.rows)]
        for row in cells:
            for cell in row:
                e(f"{cell} = T.broadcast(T.int32(0), {n})")
        k = e.fresh("k")
        with e.block(f"for {k} in range({extent}):"):
            rights = [e.let("b", right(j, k)) for j in range(width)]
            for i, row in enumerate(cells):
                pair = f'T.reinterpret("int32", {left(i, k)})'
                a = e.let("a", f'T.reinterpret("int16x{2 * n}", T.broadcast({pair}, {n}))')
                for cell, b in zip(row, rights, strict=True):
                    e(f"{cell} = {self.words.add(cell, a, b)}")
        return cells

    def score_tile(self, run: Panels, first: str) -> list[list[str]]:
        """See `AbstractAttention.score_tile`."""
        e, v, n, d = self.e, self.v, self.v.lanes, self.shape.head_dim
        base = e.let("base", f"{first} * {d * n}")
        tile = self.word_tile(
            run.width,
            d // 2,
            lambda i, k: f"qw[z + {i}, T.ramp({k} * 2, 1, 2)]",
            lambda j, k: f"kt[{self.wide(f'{base} + {k} * {run.width * 2 * n} + {j * 2 * n}')}]",
        )
        return [[f'T.cast({cell}, "float32x{n}") * {v.splat("step")}' for cell in r] for r in tile]

    def softmax(self) -> None:
        """Shares = SHARE * exp(scores - max) as codes; `inverse` = 1 / (their sum * scale of v)."""
        e, v, n = self.e, self.v, self.v.lanes
        with e.block(f"for i in range({self.rows}):"), scope(e):
            total = f"{e.alloc('total', (n,), 'int32')}[{v.at(0)}]"
            e(f"{total} = T.broadcast(T.int32(0), {n})")
            peak = e.let("peak", f"peaks[z + i, {v.at(0)}]")
            top = e.let("top", v.largest(e, peak))
            peaks = e.let("peaks", v.splat(top))
            live = self.live()
            with e.block(f"for t in range({live}):"):
                at = v.at(f"t * {n}")
                below = f"scores[z + i, {at}] - {peaks}"
                x = e.let("x", v.fma(below, v.const(LOG2_E), v.const(log2(SHARE))))
                x = e.let("x", f"T.max({x}, {v.const(FAINT)})")
                # as fma, because TVM would cancel x + ROUNDER - ROUNDER
                shifted = e.let("shifted", v.fma(x, v.const(1.0), v.const(ROUNDER)))
                part = e.let("part", f"{x} + ({v.const(ROUNDER)} - {shifted})")
                power = v.polynomial(e, part, EXP2)
                bits = f'T.reinterpret("int32x{n}", {power})'
                step = f'T.shift_left(T.reinterpret("int32x{n}", {shifted}), T.broadcast(23, {n}))'
                share = f'T.reinterpret("float32x{n}", {bits} + {step}) + {v.const(ROUND)}'
                number = f"T.broadcast(T.int32({ROUND_BITS}), {n})"
                code = e.let("code", f'T.reinterpret("int32x{n}", {share}) - {number}')
                e(f"{total} = {total} + {code}")
                e(f'shares[z + i, {at}] = T.cast({code}, "int16x{n}")')
            sums = v.total(e, e.let("sums", total))
            whole = f'T.cast({sums}, "float32")'
            value = f"T.float32(1) / ({whole} * v_up)"
            nothing = f'T.Select({top} == {MINUS_INFINITY}, T.float32("nan"), {value})'
            e(f"inverse[z + i] = {nothing}")

    def share(self, start: int, row: int, k: str) -> str:
        """Two shares of a row."""
        return f"shares[z + {row}, T.ramp(({k} + {start}) * 2, 1, 2)]"

    def value_line(self, base: str, width: int, column: int, k: str) -> str:
        """One vector of pairs of values."""
        n = 2 * self.v.lanes
        return f"vp[{self.wide(f'{base} + {k} * {width * n} + {column * n}')}]"

    def product(self) -> None:
        """Output = shares vp * inverse, SPAN keys at a time."""
        s, e, v = self.shape, self.e, self.v
        n, half = v.lanes, -(-s.kv_len // 2)
        spans = -(-s.kv_len // SPAN)
        for run in panels(self.value_vectors, self.widest):
            with e.block(f"for p in range({run.count}):"):
                for span in range(spans):
                    start = span * SPAN // 2
                    keys = min(SPAN // 2, half - start)
                    count: str | int = keys
                    if self.causal:
                        count = f"T.min({keys}, T.max(0, (s0 + {self.rows + 1}) // 2 - {start}))"
                    with scope(e):
                        first = f"({run.first} + p * {run.width})"
                        at = e.let(
                            "base", f"{first} * {half * 2 * n} + {start * run.width * 2 * n}"
                        )
                        tile = self.word_tile(
                            run.width,
                            count,
                            partial(self.share, start),
                            partial(self.value_line, at, run.width),
                        )
                        for i, row in enumerate(tile):
                            factor = e.let("factor", v.splat(f"inverse[z + {i}]"))
                            for j, cell in enumerate(row):
                                value = f'T.cast({cell}, "float32x{n}") * {factor}'
                                if span:
                                    vector = f"({first} + {j}) * {n}"
                                    at = v.at(f"h * {s.value_dim} + {vector}")
                                    value = f"o[b, s0 + {i}, {at}] + {value}"
                                self.store(run, i, j, value)
