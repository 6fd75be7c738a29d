"""Attention of a single query position, as in decoding: keys and values are read where they lie.

All query heads of one key-value head go together, so its keys and values are read once. Packing,
which the kernels for many queries begin with, would take longer than the products.
"""

from dataclasses import dataclass
from typing import final

from t3c.codegen.kernels.attention_frame import AttentionShape
from t3c.codegen.kernels.emit import Emitter, buffer, kernel_name
from t3c.codegen.kernels.family import Kernel
from t3c.codegen.kernels.vectors import MINUS_INFINITY, Vectors, fma_tile, panels, scope, tile

WORTH = 1 << 19
"""Multiply-adds above which several threads help."""
HEADS = 4
"""Most query heads of a register tile of the second product."""


@final
@dataclass(frozen=True, slots=True)
class RowAttention:
    """Writes one kernel for one query position.

    Attributes:
        shape: Sizes; q_len is 1.
        scale: Factor of the scores.
        mask: Shape of the additive mask, broadcastable to [B, heads, 1, T]; None: no mask.
        v: Vector width.
    """

    shape: AttentionShape
    scale: float
    mask: tuple[int, ...] | None
    v: Vectors

    @staticmethod
    def fits(shape: AttentionShape, mask: tuple[int, ...] | None, causal: bool, lanes: int) -> bool:
        """Whether there is one query of whole vectors, and whole vectors of the mask."""
        sizes = [shape.head_dim, shape.value_dim]
        if mask is not None and mask[-1] != 1:
            sizes.append(shape.kv_len)
        return shape.q_len == 1 and not causal and all(size % lanes == 0 for size in sizes)

    @property
    def group(self) -> int:
        """Query heads of a key-value head."""
        return self.shape.heads // self.shape.kv_heads

    @property
    def blocks(self) -> int:
        """Vectors of keys."""
        return -(-self.shape.kv_len // self.v.lanes)

    def kernel(self) -> Kernel:
        """The whole function."""
        s, e, n = self.shape, Emitter(), self.v.lanes
        work = s.batch * s.heads * s.kv_len * (s.head_dim + s.value_dim)
        with e.parallel("unit", s.batch * s.kv_heads, work >= WORTH) as unit, scope(e):
            e(f"b: T.let = {unit} // {s.kv_heads}")
            e(f"kv: T.let = {unit} % {s.kv_heads}")
            e(f'scores = T.alloc_buffer(({self.group}, {self.blocks * n}), "float32")')
            e(f'inverse = T.alloc_buffer(({self.group},), "float32")')
            with e.block(f"for block in range({self.blocks}):"):
                with e.block(f"for g in range({self.group}):"), scope(e):
                    self.score(e)
            with e.block(f"for g in range({self.group}):"), scope(e):
                self.softmax(e)
            self.product(e)
        out = (s.batch, 1, s.heads * s.value_dim)
        arguments = [
            buffer("q", (s.batch, 1, s.heads * s.head_dim), "float32"),
            buffer("k", (s.batch, s.kv_len, s.kv_heads * s.head_dim), "float32"),
            buffer("v", (s.batch, s.kv_len, s.kv_heads * s.value_dim), "float32"),
            *([buffer("mask", self.mask, "float32")] if self.mask is not None else []),
            buffer("o", out, "float32"),
        ]
        sizes = (s.batch, s.heads, s.kv_heads, s.kv_len, s.head_dim, s.value_dim)
        mask: tuple[str | int, ...] = () if self.mask is None else ("mask", *self.mask)
        scale = f"{self.scale:.9g}".replace(".", "p").replace("+", "")
        name = kernel_name("attention_row", *sizes, "s", scale, *mask, f"v{n}")
        return Kernel(name, e.function(name, arguments), ((out, "float32"),))

    def score(self, e: Emitter) -> None:
        """One vector of scores: the products of each key summed lane by lane, then across."""
        s, v, n = self.shape, self.v, self.v.lanes
        head = f"(kv * {self.group} + g) * {s.head_dim}"
        starts = range(0, s.head_dim, n)
        factor = v.const(self.scale)
        query = [e.let("q", f"q[b, 0, {v.at(f'{head} + {j}')}] * {factor}") for j in starts]
        sums = []
        for i in range(n):
            key = e.let("key", f"T.min(block * {n} + {i}, {s.kv_len - 1})")
            total = ""
            for j, part in zip(starts, query, strict=True):
                line = f"k[b, {key}, {v.at(f'kv * {s.head_dim} + {j}')}]"
                total = e.let("t", v.fma(line, part, total) if total else f"{line} * {part}")
            sums.append(total)
        x = self.across(e, sums)
        if (bias := self.bias()) is not None:
            x = e.let("x", f"{x} + {bias}")
        if s.kv_len % n:
            seen = f"T.ramp(block * {n}, 1, {n}) < T.broadcast({s.kv_len}, {n})"
            x = e.let("x", f"T.Select({seen}, {x}, {v.splat(MINUS_INFINITY)})")
        e(f"scores[g, {v.at(f'block * {n}')}] = {x}")

    def across(self, e: Emitter, vectors: list[str]) -> str:
        """One vector of the sums of as many vectors as it has lanes, by halving."""
        if len(vectors) == 1:
            return vectors[0]
        half = len(vectors) // 2
        both = f"{self.across(e, vectors[:half])}, {self.across(e, vectors[half:])}"
        n = self.v.lanes
        size = n // half  # lanes of one sum
        first = [i for start in range(0, 2 * n, size) for i in range(start, start + size // 2)]
        second = [i + size // 2 for i in first]
        return e.let("sum", f"T.Shuffle([{both}], {first}) + T.Shuffle([{both}], {second})")

    def bias(self) -> str | None:
        """The mask of one vector of keys; None: no mask."""
        if self.mask is None:
            return None
        *lead, last = self.mask
        where = ("b", f"kv * {self.group} + g", "0")[3 - len(lead) :]
        at = ["0" if size == 1 else place for size, place in zip(lead, where, strict=True)]
        if last == 1:
            return self.v.splat(f"mask[{', '.join([*at, '0'])}]")
        return f"mask[{', '.join([*at, self.v.at(f'block * {self.v.lanes}')])}]"

    def softmax(self, e: Emitter) -> None:
        """Make scores = exp(scores - max) in place; `inverse` = 1 / sum."""
        v, n = self.v, self.v.lanes
        peak = f"{e.alloc('peak', (n,), 'float32')}[{v.at(0)}]"
        total = f"{e.alloc('total', (n,), 'float32')}[{v.at(0)}]"
        e(f"{peak} = {v.splat(MINUS_INFINITY)}")
        e(f"{total} = {v.const(0.0)}")
        with e.block(f"for t in range({self.blocks}):"):
            e(f"{peak} = T.max({peak}, scores[g, {v.at(f't * {n}')}])")
        top = e.let("top", v.splat(v.largest(e, e.let("most", peak))))
        with e.block(f"for t in range({self.blocks}):"):
            at = f"scores[g, {v.at(f't * {n}')}]"
            x = v.exp(e, e.let("x", f"{at} - {top}"))
            e(f"{at} = {x}")
            e(f"{total} = {total} + {x}")
        e(f"inverse[g] = T.float32(1) / {v.total(e, e.let('sums', total))}")

    def product(self, e: Emitter) -> None:
        """Output = scores v * inverse, some heads at a time."""
        s, v, n = self.shape, self.v, self.v.lanes
        _, widest = tile(n)
        for first in range(0, self.group, HEADS):
            rows = min(HEADS, self.group - first)
            for run in panels(s.value_dim // n, widest):
                with e.block(f"for p in range({run.count}):"), scope(e):
                    column = e.let("column", f"({run.first} + p * {run.width}) * {n}")
                    held = fma_tile(
                        e,
                        v,
                        rows,
                        run.width,
                        s.kv_len,
                        lambda i, t, first=first: f"scores[{first + i}, {t}]",  # type: ignore[misc]
                        lambda j, t, column=column: (  # type: ignore[misc]
                            f"v[b, {t}, {v.at(f'kv * {s.value_dim} + {column} + {j * n}')}]"
                        ),
                    )
                    for i, row in enumerate(held):
                        head = f"(kv * {self.group} + {first + i}) * {s.value_dim}"
                        for j, cell in enumerate(row):
                            at = v.at(f"{head} + {column} + {j * n}")
                            e(f"o[b, 0, {at}] = {cell} * {v.splat(f'inverse[{first + i}]')}")
