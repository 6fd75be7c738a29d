"""Integer weights of one site, as the factorizers make them and the kernels pack them.

Codes of 8 bits are symmetric, in [-127, 127], with one float32 scale per output row:
w ~ q * scale[:, None]. Codes of 4 bits are in [-8, 7] with one scale per output row and group of
64 input columns.
The codes of the first components equal those of an export at that rank: a profile only slices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from t3c.core.grid import Grid

I8 = NDArray[np.int8]
F32 = NDArray[np.float32]
GROUP = 64
"""Input columns that share the scale of a 4-bit code."""
RATIO = 8
"""Steps of the fine codes of a nested matrix in one of the coarse codes; a power of two, so that
both scales are bfloat16 numbers. With 16 the planes would not overlap, and a coarse code could be
nothing but the rounded weight: no room for error feedback (docs/decisions.md)."""
SHRINKS = (1.0, 0.9)
"""Scales tried for each group of 4-bit codes, as shares of the one that clips nothing: on normal,
Laplace and t-distributed weights more choices gained less than 2 % of the error."""


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
class Grouped:
    """One matrix of 4-bit codes: w[i, j] ~ q[i, j] * scale[i, j // 64].

    Attributes:
        q: [rows, cols] int8 in [-8, 7].
        scale: [rows, ceil(cols / 64)] float32 of either sign, the lower 16 bits zero (bfloat16), so
            that kernels store the upper half.
    """

    q: I8
    scale: F32

    def __post_init__(self) -> None:
        """Refuse other dtypes and scales of the wrong shape or precision."""
        if self.q.dtype != np.int8 or self.scale.dtype != np.float32:
            raise TypeError(
                f"need int8 codes and float32 scales, got {self.q.dtype}, {self.scale.dtype}"
            )
        rows, cols = self.q.shape
        if self.scale.shape != (rows, -(-cols // GROUP)):
            raise ValueError(f"scale {self.scale.shape} does not fit codes {self.q.shape}")
        if np.any(np.ascontiguousarray(self.scale).view(np.uint32) & 0xFFFF):
            raise ValueError("scales of 4-bit codes must be bfloat16 numbers; round them first")

    def prefix(self, rows: int | None = None, cols: int | None = None) -> "Grouped":
        """The first `rows` output rows and first `cols` input columns (None: all)."""
        groups = None if cols is None else -(-cols // GROUP)
        return Grouped(self.q[:rows, :cols], self.scale[:rows, :groups])

    def dequantize(self) -> F32:
        """The float32 weight that the codes stand for."""
        columns = np.repeat(self.scale, GROUP, axis=1)[:, : self.q.shape[1]]
        return self.q.astype(np.float32) * columns


@dataclass(frozen=True, slots=True, eq=False)
class Nested:
    """One matrix in two widths: coarse codes are its 4-bit weights, with the fine ones its 8-bit.

    w[i, j] ~ q * S in 4 bits and (RATIO * q + fine) * S / RATIO in 8, S the scale of a group.

    Attributes:
        coarse: Codes q in [-8, 7] and scales S.
        fine: [rows, cols] int8 in [-8, 7].
    """

    coarse: Grouped
    fine: I8

    def __post_init__(self) -> None:
        """Refuse other dtypes, shapes that differ and codes out of range."""
        if self.fine.dtype != np.int8 or self.fine.shape != self.coarse.q.shape:
            raise ValueError(
                f"fine codes are {self.fine.dtype} {self.fine.shape}, need int8 "
                f"{self.coarse.q.shape}"
            )
        for q in (self.coarse.q, self.fine):
            if q.size and (q.min() < -8 or q.max() > 7):
                raise ValueError(f"codes reach from {q.min()} to {q.max()}; allowed are -8 to 7")

    @property
    def whole(self) -> Grouped:
        """The 8-bit weights: codes from -8 * RATIO - 8 to 7 * RATIO + 7, scales S / RATIO."""
        q = (RATIO * self.coarse.q + self.fine).astype(np.int8)
        return Grouped(q, self.coarse.scale / np.float32(RATIO))

    @classmethod
    def of(cls, whole: Grouped, coarse: Grouped) -> Self:
        """The planes of 8-bit weights whose coarse codes are known.

        Raises:
            ValueError: They are not nested.
        """
        if not np.array_equal(whole.scale * np.float32(RATIO), coarse.scale):
            raise ValueError("scales of nested codes must differ by RATIO")
        fine = whole.q.astype(np.int16) - RATIO * coarse.q.astype(np.int16)
        return cls(coarse, np.clip(fine, -128, 127).astype(np.int8))


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
        dense4: As `dense`, in 4 bits; linear sites only.
        nested: In place of `dense`, where `dense4` is its coarse codes.
        low4: As `low`, in 4 bits.
        high4: As `high`, in 4 bits.
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
    dense4: Grouped | None = None
    nested: Nested | None = None
    low4: Grouped | None = None
    high4: Grouped | None = None
    cp_in: Matrix | None = None
    cp_tall: F32 | None = None
    cp_wide: F32 | None = None
    cp_out: Matrix | None = None
    grids: Mapping[str, Grid] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """What one choice of formats changes of a site's outputs: gain * y + shift, by channel.

    Attributes:
        gain: [out] float32; the kernels multiply it into the scales of the last factor.
        bias: [out] float32, in place of the site's own: gain * bias + shift.
    """

    gain: F32
    bias: F32

    def __post_init__(self) -> None:
        """Refuse other dtypes, shapes that differ, and values that are not finite."""
        if self.gain.dtype != np.float32 or self.bias.dtype != np.float32:
            raise TypeError(f"need float32, got {self.gain.dtype} and {self.bias.dtype}")
        if self.gain.ndim != 1 or self.gain.shape != self.bias.shape:
            raise ValueError(
                f"need one gain and bias a channel, got {self.gain.shape} and {self.bias.shape}"
            )
        if not (np.isfinite(self.gain).all() and np.isfinite(self.bias).all()):
            raise ValueError("gain or bias is not finite; check the calibration data")

    def scaled(self, last: Matrix) -> Matrix:
        """The last factor with the gain in its scales."""
        return Matrix(last.q, last.scale * self.gain)


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


def quantize_groups(w: NDArray[np.floating]) -> Grouped:
    """4-bit codes in groups of 64 columns, to the nearest code.

    The largest magnitude of a group becomes -8, so the scale has the other sign; of `SHRINKS` the
    one with the least squared error is taken. Scale of a group of zeros: 1.

    Args:
        w: [rows, cols] weight.
    """
    rows, cols = w.shape
    groups = np.zeros((rows, -(-cols // GROUP) * GROUP), np.float32)
    groups[:, :cols] = w
    groups = groups.reshape(rows, -1, GROUP)
    at = np.abs(groups).argmax(2)[:, :, None]
    peak = np.take_along_axis(groups, at, 2)[:, :, 0]
    q = np.zeros(groups.shape, np.int8)
    scale = np.ones(peak.shape, np.float32)
    least = np.full(peak.shape, np.inf, np.float32)
    for shrink in SHRINKS:
        step = _bfloat16(peak * np.float32(-shrink / 8))
        step[step == 0] = 1
        codes = np.clip(np.rint(groups / step[:, :, None]), -8, 7)
        error = np.square(codes * step[:, :, None] - groups).sum(2)
        better = error < least
        least[better], scale[better], q[better] = error[better], step[better], codes[better]
    return Grouped(np.ascontiguousarray(q.reshape(rows, -1)[:, :cols]), scale)


def _bfloat16(x: F32) -> F32:
    """Rounded to the numbers whose lower 16 bits are zero, half away from zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)
