"""Profiles that drift more than a smaller one, beyond what the inputs leave uncertain."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST_INPUTS = 5
"""Inputs below which no profile is judged: an interval from fewer says little."""
LEVEL_Z = 1.959964
"""Of the normal distribution: ends of the 95 % interval."""


@dataclass(frozen=True, slots=True)
class Inversion:
    """A profile that costs more than a smaller one and drifts more.

    Attributes:
        larger: Its name; it is dominated.
        smaller: Name of the profile that dominates it most clearly.
        drifts: Mean drift of the larger and of the smaller one, L2 as in `Observed`.
        margin: Half of the 95 % interval of the mean difference on the same inputs.
        inputs: How many.
    """

    larger: str
    smaller: str
    drifts: tuple[float, float]
    margin: float
    inputs: int

    def __str__(self) -> str:
        """What the user is told."""
        more, less = self.drifts
        return (
            f"profile {self.larger!r} was dropped: it drifts more than the smaller "
            f"{self.smaller!r}, {more:.4g} against {less:.4g} on {self.inputs} inputs (the "
            f"difference is {more - less:.2g} +- {self.margin:.2g})"
        )


def inversions(drifts: Mapping[str, NDArray[np.float64]]) -> list[Inversion]:
    """Which profiles to drop so that none is worse than a smaller one beyond the interval.

    Drifts of two profiles on one input rise and fall together, so the interval is that of the mean
    of their differences, with Student's quantile.

    Args:
        drifts: Name -> drift on every input, the same inputs for all; smallest profile first.
    """
    kept: list[str] = []
    found: list[Inversion] = []
    for name, mine in drifts.items():
        worse = [(_excess(mine, drifts[other]), other) for other in kept]
        (excess, margin), other = max(
            worse, key=lambda w: w[0][0] - w[0][1], default=((0.0, math.inf), name)
        )
        if len(mine) < LEAST_INPUTS or excess <= margin or excess <= 0:
            kept.append(name)
            continue
        means = float(mine.mean()), float(drifts[other].mean())
        found.append(Inversion(name, other, means, margin, len(mine)))
    return found


def _excess(larger: NDArray[np.float64], smaller: NDArray[np.float64]) -> tuple[float, float]:
    """Mean of the paired differences and half of its 95 % interval."""
    off = larger - smaller
    if len(off) < 2:
        return float(off.mean()), math.inf
    error = float(off.std(ddof=1)) / math.sqrt(len(off))
    return float(off.mean()), student(len(off) - 1) * error


def student(freedom: int) -> float:
    """Quantile of Student's t at .975, to 1 % from 4 degrees of freedom on.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z = LEVEL_Z
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
