"""A linear kernel family that is one `Dot`: packing and kernels over lines of weights."""

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.kernels.family import AbstractLinearKernels, Kernel, Packed
from t3c.codegen.kernels.linear_rows import RowKernels
from t3c.codegen.kernels.linear_tiles import (
    CodeLayout,
    check_rank,
    check_sizes,
    pack_columns,
    pack_lines,
)
from t3c.core.codes import F32, I8, Matrix


class AbstractRowFamily(AbstractLinearKernels):
    """A family whose kernels all come from one `RowKernels`."""

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
        return self.rows.dense(m, n, k, epilogue, raw=raw)

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
        return self.rows.low_rank(m, n, k, rank, rank_max, epilogue)

    def _lines(self, q: I8) -> NDArray[np.int8]:
        return self.stored(pack_lines(q, self.rows.dot.depth))
