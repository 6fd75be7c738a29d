"""Static activation quantization: a tensor's fixed grid, chosen at calibration."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TINY = 1e-12
"""Smallest peak: a tensor that was zero on all calibration data still has a grid."""


def ends_of(bits: int, *, signed: bool) -> tuple[int, int]:
    """Smallest and largest code."""
    top = (1 << (bits - signed)) - 1
    return (-top if signed else 0), top


@dataclass(frozen=True, slots=True)
class Grid:
    """The values ``scale * q`` with q in [-127, 127], or in [0, 255] where nothing is negative.

    Of 7 bits: [-63, 63] or [0, 127], for kernels that would saturate on more.

    In float32: q = rint(x * inverse), to the nearest even, cut off at the ends.

    Attributes:
        scale: Distance between neighbours, a float32 number.
        signed: Whether negative values occur.
        bits: Of a code: 7 or 8.
    """

    scale: float
    signed: bool
    bits: int = 8

    def __post_init__(self) -> None:
        """Refuse other widths."""
        if self.bits not in (7, 8):
            raise ValueError(f"codes of {self.bits} bits; grids have 7 or 8")

    @classmethod
    def up_to(cls, peak: float, *, signed: bool, bits: int = 8) -> "Grid":
        """The grid whose last value is `peak`.

        Args:
            peak: Largest magnitude that must not be cut off.
            signed: Whether negative values occur.
            bits: Of a code.

        Raises:
            ValueError: `peak` is not finite, or negative.
        """
        if not 0 <= peak < float("inf"):
            raise ValueError(f"largest activation is {peak}; need a finite number, 0 or above")
        top = np.float32(max(peak, TINY))
        return cls(float(top * np.float32(1 / ends_of(bits, signed=signed)[1])), signed, bits)

    @property
    def inverse(self) -> float:
        """1 / scale in float32."""
        return float(np.float32(1) / np.float32(self.scale))

    @property
    def ends(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return ends_of(self.bits, signed=self.signed)

    def codes(self, x: NDArray[np.float32]) -> NDArray[np.int16]:
        """Codes of x."""
        low, high = self.ends
        q: NDArray[np.int16] = np.clip(np.rint(x * np.float32(self.inverse)), low, high).astype(
            np.int16
        )
        return q

    def array(self) -> NDArray[np.float32]:
        """What kernels read: scale, inverse, and zeros up to 64 bytes."""
        return np.array([self.scale, self.inverse, *[0.0] * 14], np.float32)
