"""What attention kernels share: the walk over heads and query tiles, masks, the order of phases.

For each head keys and values are packed into register panels once; then for each group of query
tiles the scores of all keys, their softmax, and the product with the values follow at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from t3c.codegen.kernels.emit import Emitter, buffer, kernel_name
from t3c.codegen.kernels.family import Kernel
from t3c.codegen.kernels.vectors import MINUS_INFINITY, Panels, Vectors, panels, scope, tile

GROUP = 4
"""Query tiles whose scores are made together, then their softmax, then their product: one by one,
each phase would wait for the last stores of the phase before. Source: 12 heads of 128 x 32 took 257
us one by one, 183 by two or four (AVX-512, one thread)."""
NEAR = 256 * 1024
"""Bytes of scores that a group may have, to stay in the second-level cache."""
UNITS = 16
"""Parallel units to offer; the queries of a head are split where there are fewer heads."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of one attention: q [batch, q_len, heads * head_dim], v [.., kv_heads * value_dim]."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        """Refuse heads that do not share keys evenly."""
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")

    def check(self, mask: tuple[int, ...] | None) -> None:
        """Refuse a mask that does not broadcast to the scores.

        Raises:
            ValueError: It does not.
        """
        full = (self.batch, self.heads, self.q_len, self.kv_len)
        sizes = mask or ()
        if len(sizes) > 4 or any(
            a not in (1, b) for a, b in zip(sizes[::-1], full[::-1], strict=False)
        ):
            raise ValueError(f"mask {mask} does not broadcast to {full}")


class AbstractAttention(ABC):
    """Writes one kernel."""

    kind: ClassVar[str]
    """Begins the kernel's name."""

    def __init__(
        self,
        shape: AttentionShape,
        scale: float,
        mask: tuple[int, ...] | None,
        causal: bool,
        v: Vectors,
    ) -> None:
        """See `t3c.codegen.kernels.attention.attention`."""
        self.shape, self.scale, self.mask, self.causal, self.v = shape, scale, mask, causal, v
        self.e = Emitter()
        rows, self.widest = tile(v.lanes)
        self.rows = min(rows, shape.q_len)
        self.blocks = -(-shape.q_len // self.rows)
        self.key_vectors = -(-shape.kv_len // v.lanes)
        self.value_vectors = -(-shape.value_dim // v.lanes)
        units = shape.batch * shape.heads
        self.chunks = max(1, min(-(-UNITS // units), self.blocks // 4))
        self.per_chunk = -(-self.blocks // self.chunks)

    @abstractmethod
    def pack_keys(self) -> None:
        """Put the keys of a head into panels."""

    @abstractmethod
    def pack_values(self) -> None:
        """Put the values of a head into panels."""

    @abstractmethod
    def stage(self, lines: int) -> None:
        """Scratch of a group of queries besides scores, peaks and inverse."""

    @abstractmethod
    def phases(self) -> tuple[Callable[[], None], ...]:
        """What is done with each query tile of a group, in order; `score` is one of them."""

    @abstractmethod
    def score_tile(self, run: Panels, first: str) -> list[list[str]]:
        """Float scores of the rows and the key panel that begins at vector `first`."""

    def name(self) -> str:
        """All parameters."""
        s = self.shape
        sizes = (s.batch, s.heads, s.kv_heads, s.q_len, s.kv_len, s.head_dim, s.value_dim)
        mask: tuple[str | int, ...] = () if self.mask is None else ("mask", *self.mask)
        scale = f"{self.scale:.9g}".replace(".", "p").replace("+", "")
        causal = "causal" if self.causal else ""
        return kernel_name(self.kind, *sizes, "s", scale, *mask, causal, f"v{self.v.lanes}")

    def kernel(self) -> Kernel:
        """The whole function."""
        s, e = self.shape, self.e
        chunks, per_chunk = self.chunks, self.per_chunk
        units = s.batch * s.heads * chunks
        with e.block(f"for unit in T.parallel({units}):"), scope(e):
            e(f"b: T.let = unit // {s.heads * chunks}")
            e(f"h: T.let = unit // {chunks} % {s.heads}")
            e(f"kv: T.let = h // {s.heads // s.kv_heads}")
            e(f"first: T.let = unit % {chunks} * {per_chunk}")
            self.pack_keys()
            self.pack_values()
            self.stage_mask()
            keys = self.key_vectors * self.v.lanes
            group = max(1, min(GROUP, NEAR // (4 * keys * self.rows)))
            lines = group * self.rows
            e(f'scores = T.alloc_buffer(({lines}, {keys}), "float32")')
            e(f'peaks = T.alloc_buffer(({lines}, {self.v.lanes}), "float32")')
            e(f'inverse = T.alloc_buffer(({lines},), "float32")')
            self.stage(lines)
            e(f"own: T.let = T.min({per_chunk}, {self.blocks} - first)")
            with e.block(f"for group in range((own + {group - 1}) // {group}):"):
                for phase in self.phases():
                    with e.block(f"for g in range(T.min({group}, own - group * {group})):"):
                        # The last tile is moved up to end at the last row: some rows twice.
                        tile_ = f"(first + group * {group} + g)"
                        e(f"s0: T.let = T.min({tile_} * {self.rows}, {s.q_len - self.rows})")
                        e(f"z: T.let = g * {self.rows}")
                        phase()
        out = (s.batch, s.q_len, s.heads * s.value_dim)
        arguments = [
            buffer("q", (s.batch, s.q_len, s.heads * s.head_dim), "float32"),
            buffer("k", (s.batch, s.kv_len, s.kv_heads * s.head_dim), "float32"),
            buffer("v", (s.batch, s.kv_len, s.kv_heads * s.value_dim), "float32"),
            *([buffer("mask", self.mask, "float32")] if self.mask is not None else []),
            buffer("o", out, "float32"),
        ]
        name = self.name()
        return Kernel(name, e.function(name, arguments), ((out, "float32"),))

    def mask_at(self, row: str, column: str) -> str:
        """The mask element (or vector) at a query row and key column."""
        assert self.mask is not None
        where = ("b", "h", row, column)[4 - len(self.mask) :]
        return (
            "mask["
            + ", ".join("0" if n == 1 else w for n, w in zip(self.mask, where, strict=True))
            + "]"
        )

    @property
    def one_row(self) -> bool:
        """Whether all queries of a head share one row of the mask."""
        return self.mask is None or len(self.mask) == 1 or self.mask[-2] == 1

    @property
    def one_column(self) -> bool:
        """Whether all keys share one mask element."""
        return self.mask is not None and self.mask[-1] == 1

    def stage_mask(self) -> None:
        """`shared`: mask row of the head (zeros if none) with minus infinity past the last key."""
        s, e, n = self.shape, self.e, self.v.lanes
        whole = self.mask is not None and self.one_row
        if not whole and s.kv_len % n == 0:
            return
        first = 0 if whole else s.kv_len // n * n
        count = self.key_vectors * n - first
        e(f'shared = T.alloc_buffer(({count},), "float32")')
        with e.block(f"for t in range({s.kv_len - first}):"):
            e(f"shared[t] = {self.mask_at('0', 't') if whole else 'T.float32(0)'}")
        if self.key_vectors * n > s.kv_len:
            with e.block(f"for t in range({self.key_vectors * n - s.kv_len}):"):
                e(f"shared[{s.kv_len - first} + t] = {MINUS_INFINITY}")

    def stage_mask_tail(self) -> None:
        """`tails`: of a mask with many rows, the last, incomplete vector of each row."""
        s, e, n = self.shape, self.e, self.v.lanes
        if self.mask is None or self.one_row or self.one_column or s.kv_len % n == 0:
            return
        e(f'tails = T.alloc_buffer(({self.rows}, {n}), "float32")')
        start = s.kv_len // n * n
        with e.block(f"for i in range({self.rows}):"):
            with e.block(f"for t in range({s.kv_len - start}):"):
                e(f"tails[i, t] = {self.mask_at('s0 + i', f'{start} + t')}")
            with e.block(f"for t in range({n - s.kv_len + start}):"):
                e(f"tails[i, {s.kv_len - start} + t] = {MINUS_INFINITY}")

    def bias(self, row: int, vector: str, is_last: bool) -> str | None:
        """What to add to the scores of one row and key vector; None: nothing."""
        s, v, n = self.shape, self.v, self.v.lanes
        partial = is_last and s.kv_len % n != 0
        if self.mask is None:
            return f"shared[{v.at(0)}]" if partial else None
        if self.one_row:
            return f"shared[{v.at(f'{vector} * {n}')}]"
        if self.one_column:
            one = v.splat(self.mask_at(f"s0 + {row}", "0"))
            return f"{one} + shared[{v.at(0)}]" if partial else one
        if partial:
            return f"tails[{row}, {v.at(0)}]"
        return self.mask_at(f"s0 + {row}", v.at(f"{vector} * {n}"))

    def live(self) -> str | int:
        """Key vectors that the rows of this block can see."""
        if not self.causal:
            return self.key_vectors
        return f"T.min({self.key_vectors}, (s0 + {self.rows - 1}) // {self.v.lanes} + 1)"

    def score(self) -> None:
        """Make scores = q kt + mask of the block's rows; `peaks`: the maximum for each lane."""
        e, v = self.e, self.v
        self.stage_mask_tail()
        for i in range(self.rows):
            e(f"peaks[z + {i}, {v.at(0)}] = {v.splat(MINUS_INFINITY)}")
        for run in panels(self.key_vectors, self.widest):
            ends = run.first + run.count * run.width == self.key_vectors
            needs_end = ends and self.shape.kv_len % v.lanes != 0 and not self.uniform_bias
            whole = run.count - 1 if needs_end else run.count
            if whole:
                count: str | int = whole
                if self.causal:
                    need = f"({self.live()} - {run.first} + {run.width - 1}) // {run.width}"
                    count = f"T.max(0, T.min({whole}, {need}))"
                with e.block(f"for p in range({count}):"):
                    self.score_panel(run, "p", False)
            if needs_end:
                first = run.first + whole * run.width
                if self.causal:
                    with e.block(f"if {self.live()} > {first}:"):
                        self.score_panel(run, str(whole), True)
                else:
                    self.score_panel(run, str(whole), True)

    @property
    def uniform_bias(self) -> bool:
        """Whether the last panel adds its bias as all others do."""
        return self.mask is not None and self.one_row

    def score_panel(self, run: Panels, p: str, last: bool) -> None:
        """One register tile of scores."""
        e, v, n = self.e, self.v, self.v.lanes
        first = f"({run.first} + {p} * {run.width})"
        with scope(e):
            for i, row in enumerate(self.score_tile(run, first)):
                peak = f"peaks[z + {i}, {v.at(0)}]"
                for j, cell in enumerate(row):
                    bias = self.bias(i, f"({first} + {j})", last and j == run.width - 1)
                    x = e.let("s", cell if bias is None else f"{cell} + {bias}")
                    if self.causal:
                        seen = (
                            f"T.ramp(({first} + {j}) * {n}, 1, {n}) <= T.broadcast(s0 + {i}, {n})"
                        )
                        x = e.let("s", f"T.Select({seen}, {x}, {v.splat(MINUS_INFINITY)})")
                    e(f"scores[z + {i}, {v.at(f'({first} + {j}) * {n}')}] = {x}")
                    e(f"{peak} = T.max({peak}, {x})")

    def store(self, run: Panels, i: int, j: int, value: str) -> None:
        """Write one output vector; the columns past the end are dropped."""
        s, e, v = self.shape, self.e, self.v
        n, full = v.lanes, s.value_dim // v.lanes
        vector = f"({run.first} + p * {run.width} + {j})"
        column = f"h * {s.value_dim} + {vector} * {n}"
        whole = f"o[b, s0 + {i}, {v.at(column)}] = {value}"
        if run.first + (run.count - 1) * run.width + j < full:
            e(whole)
            return
        with e.block(f"if {vector} < {full}:"):
            e(whole)
        with e.block("else:"), scope(e):
            part = e.alloc("part", (n,), "float32")
            e(f"{part}[{v.at(0)}] = {value}")
            with e.block(f"for l in range({s.value_dim % n}):"):
                e(f"o[b, s0 + {i}, {column} + l] = {part}[l]")
