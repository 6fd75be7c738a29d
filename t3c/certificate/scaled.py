"""Bounds for each input: half of the data learns what outputs say of drift, half makes it hold."""

import math
from collections.abc import Sequence

import numpy as np

from t3c.certificate.calibrated import conformal_bound
from t3c.certificate.outputs import F64
from t3c.core.per_input import PerInput

LEAST = 200
"""Inputs below which nothing is learned."""
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 1e4)
"""Of squared weights, for standardized features; the one of least left-out error is taken."""
FLOOR = 1e-6
"""Least drift, of the median, whose logarithm is learned from."""


def per_input(seen: F64, drift: F64, levels: Sequence[float]) -> PerInput | None:
    """A bound for each input of one profile; None where there are too few, or nothing drifts.

    Inputs at even places give the weights, those at odd places the factors.

    Args:
        seen: [n, f] features of the profile's outputs.
        drift: [n] distances from the original.
        levels: Levels, rising.
    """
    middle = float(np.median(drift))
    if len(drift) < LEAST or middle <= 0.0:
        return None
    weights, offset = ridge(seen[::2], np.log(np.maximum(drift[::2], FLOOR * middle)))
    fitted = seen[::2] @ weights + offset
    made = PerInput(
        tuple(map(float, weights)), offset, float(fitted.min()), float(fitted.max()), (), (), (), 0
    )
    rest = drift[1::2]
    predicted = made.predicted(seen[1::2])
    factors = tuple(conformal_bound(rest / predicted, level) for level in levels)
    off = np.maximum(rest, FLOOR * middle)
    ratios = tuple(float(np.median(f * predicted / off)) for f in factors)
    return PerInput(
        made.weights, offset, made.low, made.high, tuple(levels), factors, ratios, len(rest)
    )


def ridge(x: F64, y: F64) -> tuple[F64, float]:
    """Weights and offset of a linear form, its penalty chosen by leaving each row out.

    Source: Golub, Heath, Wahba, Generalized Cross-Validation, 1979 (left-out residuals of ridge
    regression are those of the fit over one minus the leverage).

    Args:
        x: [n, f].
        y: [n].
    """
    mean, deviation = x.mean(0), x.std(0)
    scale = np.where(deviation > 0, deviation, 1.0)
    u, s, vt = np.linalg.svd((x - mean) / scale, full_matrices=False)
    target = u.T @ (y - y.mean())
    best, weights = math.inf, np.zeros(x.shape[1])
    for penalty in PENALTIES:
        shrink = s**2 / (s**2 + penalty)
        leverage = np.minimum(np.square(u) @ shrink + 1 / len(y), 1 - 1e-9)
        left_out = (y - y.mean() - u @ (shrink * target)) / (1 - leverage)
        error = float(np.square(left_out).mean())
        if error < best:
            best = error
            weights = vt.T @ (target * s / (s**2 + penalty)) / scale
    return weights, float(y.mean() - mean @ weights)
