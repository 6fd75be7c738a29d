"""Integer weights of one site, as the factorizers make them and the kernels pack them.

All codes are symmetric int8 in [-127, 127] with one float32 scale per output row:
w ~ q * scale[:, None].
The codes of the first components equal those of an export at that rank: a profile only slices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from t3c.core.grid import Grid

I8 = NDArray[np.int8]
F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """One quantized matrix: q [rows, cols] int8 and scale [rows] float32 (w ~ q * scale[:, None]).

    A k x k convolution core is [out, in, kh, kw]; its scale is per output channel.
    """

    q: I8
    scale: F32

    def __post_init__(self) -> None:
        """Refuse other dtypes and a scale of the wrong length."""
        if self.q.dtype != np.int8 or self.scale.dtype != np.float32:
            raise TypeError(
                f"need int8 codes and float32 scales, got {self.q.dtype}, {self.scale.dtype}"
            )
        if self.scale.shape != self.q.shape[:1]:
            raise ValueError(f"scale {self.scale.shape} does not fit codes {self.q.shape}")

    def prefix(self, rows: int | None = None, cols: int | None = None) -> "Matrix":
        """The first `rows` output rows and first `cols` input columns (None: all)."""
        return Matrix(self.q[:rows, :cols], self.scale[:rows])

    def dequantize(self) -> F32:
        """The float32 weight that the codes stand for."""
        return self.q.astype(np.float32) * self.scale.reshape(-1, *[1] * (self.q.ndim - 1))


@dataclass(frozen=True, slots=True, eq=False)
class SiteCodes:
    """Everything the kernels need of one site. Factors are None where no profile uses them.

    Attributes:
        bias: [out] float32, zeros where the layer has none.
        dense: Linear [n, k] or convolution [out, in, kh, kw].
        low: [rank_max, k] input-side factor V (reduce), for LowRank.
        high: [n, rank_max] output-side factor U (expand), for LowRank.
        reduce: [rank_in_max, in] of Tucker-2.
        core: [rank_out_max, rank_in_max, kh, kw] of Tucker-2.
        expand: [out, rank_out_max] of Tucker-2.
        cp_in: [rank_max, in] of CP.
        cp_tall: [rank_max, kh] float32 of CP, depthwise over height.
        cp_wide: [rank_max, kw] float32 of CP, depthwise over width.
        cp_out: [out, rank_max] of CP.
        grids: Fixed grids of inner activations, by the factor whose output they round.
    """

    bias: F32
    dense: Matrix | None = None
    low: Matrix | None = None
    high: Matrix | None = None
    reduce: Matrix | None = None
    core: Matrix | None = None
    expand: Matrix | None = None
    cp_in: Matrix | None = None
    cp_tall: F32 | None = None
    cp_wide: F32 | None = None
    cp_out: Matrix | None = None
    grids: Mapping[str, Grid] = field(default_factory=dict)


def quantize_weight(w: NDArray[np.floating]) -> Matrix:
    """Symmetric int8 per output row, to the nearest code: scale = max|w| / 127, of a zero row 1.

    Args:
        w: [rows, ...] weight.
    """
    flat = np.asarray(w, np.float32).reshape(len(w), -1)
    peak = np.abs(flat).max(1) if flat.shape[1] else np.zeros(len(w), np.float32)
    scale = np.where(peak > 0, peak / 127, 1).astype(np.float32)
    q = np.clip(np.rint(flat / scale[:, None]), -127, 127).astype(np.int8)
    return Matrix(np.ascontiguousarray(q.reshape(w.shape)), scale)
