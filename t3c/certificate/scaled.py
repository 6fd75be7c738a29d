"""Bounds for each input: some data teaches what outputs say of drift, other data makes it hold."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from t3c.certificate.calibrated import conformal_bound
from t3c.certificate.library import Scores
from t3c.certificate.outputs import F64
from t3c.core.errors import CertificateError
from t3c.core.per_input import DIRECTIONS, PerInput, widened

LEAST = 200
"""Inputs below which nothing is learned, of both parts together."""
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 1e4)
"""Of squared weights, for standardized features; the one of least left-out error is taken."""
FLOOR = 1e-6
"""Least drift, of the median, whose logarithm is learned from."""


def each_input(
    held: Scores, levels: Sequence[float], taught: Scores | None = None
) -> dict[str, PerInput | None]:
    """Profile name -> what bounds each input; see `per_input`.

    Args:
        held: Of inputs that were used neither for calibration nor for training.
        levels: Levels, rising.
        taught: Of other inputs, which may have been used for them; None: half of `held` teaches.

    Raises:
        CertificateError: Inputs that teach are too few, or held out too.
    """
    if taught is not None:
        if (count := len(taught.digests)) < LEAST // 2:
            raise CertificateError(
                f"{count} inputs teach; give {LEAST // 2} or more, or none: then half of the "
                "held-out inputs teach"
            )
        if common := len(set(taught.digests) & set(held.digests)):
            raise CertificateError(
                f"{common} inputs teach and are held out; bounds would be too small: give each "
                "input to one of both"
            )
    return {
        name: per_input(
            held.features[name],
            drift,
            levels,
            scores=held.classes is not None,
            taught=None if taught is None else (taught.features[name], taught.original[name]),
        )
        for name, drift in held.original.items()
    }


def per_input(
    seen: F64,
    drift: F64,
    levels: Sequence[float],
    *,
    scores: bool = False,
    taught: tuple[F64, F64] | None = None,
) -> PerInput | None:
    """A bound for each input of one profile; None where there are too few, or nothing drifts.

    The weights come from other inputs than the factors, so that drift over prediction is
    exchangeable between the inputs behind the factors and new ones, whatever the weights are.

    Args:
        seen: [n, f] features of the profile's outputs.
        drift: [n] distances from the original.
        levels: Levels, rising.
        scores: Whether the profile has one output [inputs, classes]; its features are widened.
        taught: The same two of other inputs, which give the weights, and all n the factors; None:
            inputs at even places give the weights, those at odd places the factors.
    """
    apart = taught is not None
    told, off = (seen[::2], drift[::2]) if taught is None else taught
    rest, left = (seen, drift) if apart else (seen[1::2], drift[1::2])
    middle = float(np.median(off))
    if min(len(off), len(left)) < LEAST // 2 or middle <= 0.0:
        return None
    directions = DIRECTIONS if scores else 0
    if scores:
        told, rest = widened(told, directions), widened(rest, directions)
    weights, offset = ridge(told, np.log(np.maximum(off, FLOOR * middle)))
    fitted = told @ weights + offset
    made = PerInput(
        weights=tuple(map(float, weights)),
        offset=offset,
        low=float(fitted.min()),
        high=float(fitted.max()),
        levels=tuple(levels),
        factors=(),
        ratios=(),
        inputs=len(left),
        taught=len(off) if apart else 0,
        directions=directions,
    )
    predicted = made.predicted(rest)
    factors = tuple(conformal_bound(left / predicted, level) for level in levels)
    positive = np.maximum(left, FLOOR * middle)
    ratios = tuple(float(np.median(f * predicted / positive)) for f in factors)
    return replace(made, factors=factors, ratios=ratios)


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
    x, centered = (x - mean) / scale, y - y.mean()
    squares, axes = _axes(x)
    along = x @ axes
    target = along.T @ centered
    best, weights = math.inf, np.zeros(x.shape[1])
    for penalty in PENALTIES:
        bend = target / (squares + penalty)
        leverage = np.minimum(np.square(along) @ (1 / (squares + penalty)) + 1 / len(y), 1 - 1e-9)
        left_out = (centered - along @ bend) / (1 - leverage)
        error = float(np.square(left_out).mean())
        if error < best:
            best = error
            weights = axes @ bend / scale
    return weights, float(y.mean() - mean @ weights)


def _axes(x: F64) -> tuple[F64, F64]:
    """Squares of singular values [k] and right singular vectors [f, k], by the shorter side."""
    if len(x) > x.shape[1]:
        squares, axes = np.linalg.eigh(x.T @ x)
        return np.maximum(squares, 0.0), axes
    _, values, axes = np.linalg.svd(x, full_matrices=False)
    return np.square(values), axes.T
