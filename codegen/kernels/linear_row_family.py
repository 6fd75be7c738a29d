"""A linear kernel family that is one `Dot`: packing and kernels over lines of weights."""

from abc import abstractmethod
from dataclasses import replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.kernels.family import AbstractLinearKernels, Kernel, Packed
from t3c.codegen.kernels.linear_rows import RowKernels, RowPair, RowTile
from t3c.codegen.kernels.linear_tiles import (
    CodeLayout,
    check_rank,
    check_sizes,
    pack_columns,
    pack_lines,
)
from t3c.codegen.kernels.schedule import Op, Schedule, Scheduled, epilogue_class
from t3c.core.codes import F32, I8, Matrix


class AbstractRowFamily(AbstractLinearKernels, Scheduled):
    """A family whose kernels all come from one `RowKernels`."""

    def schedules(self, op: Op) -> tuple[Schedule, ...]:
        """See `Scheduled.schedules`."""
        match op.kind:
            case "dense":
                return self.rows.tiles(op["m"], op["n"], op["k"])
            case "low_rank":
                return self.rows.pairs(op["m"], op["n"], op["r"])
            case _:
                raise self.unknown(op)

    def default(self, op: Op) -> Schedule:
        """See `Scheduled.default`."""
        match op.kind:
            case "dense":
                return self.rows.tile(op["m"], op["n"])
            case "low_rank":
                return self.rows.pair(op["m"], op["n"], op["r"])
            case _:
                raise self.unknown(op)

    def kernel(self, op: Op) -> Kernel:
        """See `Scheduled.kernel`."""
        match op.kind:
            case "dense":
                return self.dense(op["m"], op["n"], op["k"], op.epilogue)
            case "low_rank":
                return self.low_rank(op["m"], op["n"], op["k"], op["r"], op["r"], op.epilogue)
            case _:
                raise self.unknown(op)

    @property
    @abstractmethod
    def rows(self) -> RowKernels:
        """The kernels."""

    @abstractmethod
    def stored(self, packed: I8) -> I8:
        """Packed codes as the kernels want them in memory."""

    def quantize(self, m: int, k: int) -> Kernel:
        """See `RowKernels.quantize`."""
        check_sizes(self.name, m=m, k=k)
        return self.rows.quantize(m, k)

    def rows_layout(self, m: int) -> CodeLayout | None:
        """Row-major codes, where they are bytes."""
        layout = self.rows.dot.layout
        return layout if layout.dtype == "int8" else None

    def pack_dense(self, w: Matrix, bias: F32) -> Packed:
        """Weights [n/16][k/64][lines][bytes], then scale and bias padded to 16."""
        return {
            "weight": self._lines(w.q),
            "scale": pack_columns(w.scale),
            "bias": pack_columns(bias),
        }

    def dense(self, m: int, n: int, k: int, epilogue: str = "", *, raw: bool = False) -> Kernel:
        """See `AbstractLinearKernels.dense`."""
        check_sizes(self.name, m=m, n=n, k=k)
        op = Op.of("dense", epilogue_class(epilogue), m=m, n=n, k=k)
        tile = cast(RowTile, self.pick(op))
        suffix = self.suffix(op, tile)
        kernel = self.rows.dense(m, n, k, epilogue, tile, raw=raw, suffix=suffix)
        return replace(kernel, op=op, schedule=tile)

    def pack_low_rank(self, low: Matrix, high: Matrix, bias: F32) -> Packed:
        """Both factors; the second with k outermost, so that ranks are prefixes."""
        return {
            "low": self._lines(low.q),
            "low_scale": pack_columns(low.scale),
            "high": np.ascontiguousarray(self._lines(high.q).transpose(1, 0, 2, 3)),
            "high_scale": pack_columns(high.scale),
            "bias": pack_columns(bias),
        }

    def low_rank(
        self, m: int, n: int, k: int, rank: int, rank_max: int, epilogue: str = ""
    ) -> Kernel:
        """See `AbstractLinearKernels.low_rank`."""
        check_sizes(self.name, m=m, n=n, k=k)
        check_rank(self.name, rank, rank_max, self.rank_step)
        op = Op.of("low_rank", epilogue_class(epilogue), m=m, n=n, k=k, r=rank)
        pair = cast(RowPair, self.pick(op))
        suffix = self.suffix(op, pair)
        kernel = self.rows.low_rank(m, n, k, (rank, rank_max), epilogue, pair, suffix)
        return replace(kernel, op=op, schedule=pair)

    def _lines(self, q: I8) -> NDArray[np.int8]:
        return self.stored(pack_lines(q, self.rows.dot.depth))
