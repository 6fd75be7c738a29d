"""Attention in float32: softmax(q k^T * scale + mask) v, scores never leave the cache."""

from collections.abc import Callable
from typing import ClassVar, final

from t3c.codegen.kernels.attention_frame import AbstractAttention
from t3c.codegen.kernels.vectors import Panels, fma_tile, panels, scope


@final
class FloatAttention(AbstractAttention):
    """Keys transposed and scaled, values row by row."""

    kind: ClassVar[str] = "attention"

    def stage(self, lines: int) -> None:
        """Nothing more."""

    def phases(self) -> tuple[Callable[[], None], ...]:
        """Scores, their softmax, the product."""
        return (self.score, self.softmax, self.product)

    def pack_keys(self) -> None:
        """Kt, for each panel: [head_dim][width * lanes], scaled; past the end the last key."""
        s, e, v = self.shape, self.e, self.v
        n, d = v.lanes, s.head_dim
        e(f'kt = T.alloc_buffer(({self.key_vectors * d * n},), "float32")')
        factor = e.let("factor", v.const(self.scale))
        for run in panels(self.key_vectors, self.widest):
            with e.block(f"for p in range({run.count}):"):
                base = e.let("base", f"({run.first} + p * {run.width}) * {d * n}")
                with e.block(f"for j in range({run.width}):"):
                    key = f"({run.first} + p * {run.width} + j) * {n}"
                    if d >= n:
                        with e.block(f"for dd in range({d // n}):"):
                            rows = [
                                e.let(
                                    "row",
                                    f"k[b, T.min({key} + {i}, {s.kv_len - 1}),"
                                    f" {v.at(f'kv * {d} + dd * {n}')}]",
                                )
                                for i in range(n)
                            ]
                            for i, column in enumerate(v.transpose(e, rows)):
                                at = f"{base} + (dd * {n} + {i}) * {run.width * n} + j * {n}"
                                e(f"kt[{v.at(at)}] = {column} * {factor}")
                    if d % n:
                        with (
                            e.block(f"for dd in range({d % n}):"),
                            e.block(f"for i in range({n}):"),
                        ):
                            at = f"{base} + ({d // n * n} + dd) * {run.width * n} + j * {n} + i"
                            source = (
                                f"T.min({key} + i, {s.kv_len - 1}), kv * {d} + {d // n * n} + dd"
                            )
                            e(f"kt[{at}] = k[b, {source}] * T.float32({self.scale!r})")

    def pack_values(self) -> None:
        """Vp, for each panel: [kv_len][width * lanes], columns past the end zero."""
        s, e, v = self.shape, self.e, self.v
        n, full = v.lanes, s.value_dim // v.lanes
        e(f'vp = T.alloc_buffer(({self.value_vectors * s.kv_len * n},), "float32")')
        for run in panels(self.value_vectors, self.widest):
            with (
                e.block(f"for p in range({run.count}):"),
                e.block(f"for t in range({s.kv_len}):"),
            ):
                base = e.let(
                    "base",
                    f"({run.first} + p * {run.width}) * {s.kv_len * n} + t * {run.width * n}",
                )
                for j in range(run.width):
                    vector = f"({run.first} + p * {run.width} + {j})"
                    source = f"kv * {s.value_dim} + {vector} * {n}"
                    copy = f"vp[{v.at(f'{base} + {j * n}')}] = v[b, t, {v.at(source)}]"
                    if run.first + (run.count - 1) * run.width + j < full:
                        e(copy)
                        continue
                    with e.block(f"if {vector} < {full}:"):
                        e(copy)
                    with e.block("else:"), e.block(f"for i in range({n}):"):
                        e(
                            f"vp[{base} + {j * n} + i] = T.if_then_else({vector} * {n} + i"
                            f" < {s.value_dim}, v[b, t, {source} + i], T.float32(0))"
                        )

    def score_tile(self, run: Panels, first: str) -> list[list[str]]:
        """See `AbstractAttention.score_tile`."""
        s, e, v = self.shape, self.e, self.v
        n, d = v.lanes, s.head_dim
        base = e.let("base", f"{first} * {d * n}")
        return fma_tile(
            e,
            v,
            self.rows,
            run.width,
            d,
            lambda i, k: f"q[b, s0 + {i}, h * {d} + {k}]",
            lambda j, k: f"kt[{v.at(f'{base} + {k} * {run.width * n} + {j * n}')}]",
        )

    def softmax(self) -> None:
        """Make scores = exp(scores - max) in place; `inverse` = 1 / sum."""
        e, v = self.e, self.v
        with e.block(f"for i in range({self.rows}):"), scope(e):
            total = e.alloc("total", (v.lanes,), "float32")
            e(f"{total}[{v.at(0)}] = {v.const(0.0)}")
            peak = e.let("peak", f"peaks[z + i, {v.at(0)}]")
            top = e.let("top", v.splat(v.largest(e, peak)))
            with e.block(f"for t in range({self.live()}):"):
                at = f"scores[z + i, {v.at(f't * {v.lanes}')}]"
                x = v.exp(e, e.let("x", f"{at} - {top}"))
                e(f"{at} = {x}")
                e(f"{total}[{v.at(0)}] = {total}[{v.at(0)}] + {x}")
            sums = e.let("sums", f"{total}[{v.at(0)}]")
            e(f"inverse[z + i] = T.float32(1) / {v.total(e, sums)}")

    def product(self) -> None:
        """Output = scores vp * inverse."""
        s, e, v = self.shape, self.e, self.v
        n = v.lanes
        keys: str | int = s.kv_len
        if self.causal:
            keys = f"T.min({s.kv_len}, s0 + {self.rows})"
        for run in panels(self.value_vectors, self.widest):
            with e.block(f"for p in range({run.count}):"), scope(e):
                base = e.let("base", f"({run.first} + p * {run.width}) * {s.kv_len * n}")
                tile_of = fma_tile(
                    e,
                    v,
                    self.rows,
                    run.width,
                    keys,
                    lambda i, k: f"scores[z + {i}, {k}]",
                    lambda j, k, base=base, run=run: (  # type: ignore[misc]
                        f"vp[{v.at(f'{base} + {k} * {run.width * n} + {j * n}')}]"
                    ),
                )
                for i, row in enumerate(tile_of):
                    factor = e.let("factor", v.splat(f"inverse[z + {i}]"))
                    for j, cell in enumerate(row):
                        self.store(run, i, j, f"{cell} * {factor}")
