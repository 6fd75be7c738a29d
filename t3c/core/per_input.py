"""A bound on drift for each input, from what a profile's own outputs say of it.

Some inputs drift more than others, and outputs tell in part which: a linear form of their features
predicts the logarithm of the drift. Class scores are seen through random directions too, so that
the form need not be linear in them. Source: Rahimi, Recht, Weighted Sums of Random Kitchen Sinks,
2008. The bound is a conformal quantile of drift over prediction,
times the prediction. Source: Lei, G'Sell, Rinaldo, Tibshirani, Wasserman, Distribution-Free
Predictive Inference for Regression, 2018, section 5.2 (locally weighted split conformal).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t3c.core.errors import CertificateError

F64 = NDArray[np.float64]
WIDEST = 512
"""Values of a last axis beyond which an output counts by its norm alone."""
TINY = 1e-3
"""Added to what a logarithm is taken of, so that equal scores give a number."""
DIRECTIONS = 400
"""Random directions that class scores are seen through; 800 more are worth nothing (measured)."""
SHIFT = 1.2
"""Largest shift of a direction, in deviations of the scores; it decides where the bends lie."""


@dataclass(frozen=True, slots=True)
class PerInput:
    """What bounds the drift ||dz||_2 of one input of one profile, once its outputs are there.

    Holds like the calibrated bound: marginally, for exchangeable inputs. Not raised along the
    chain, since that would take the outputs of every larger profile.

    Attributes:
        weights: Of the features; their sum and `offset` predict the logarithm of the drift.
        offset: Added to it.
        low: Least prediction, that of the inputs it was fitted to.
        high: Largest prediction, likewise.
        levels: Shares of new inputs, rising.
        factors: Quantile of drift over prediction at each level; infinite with too few inputs.
        ratios: Median over inputs of bound over drift, at each level.
        inputs: Inputs behind the factors.
        taught: Other inputs behind the weights, which may have been used for training; 0: as many
            of the held-out ones as are behind the factors.
        directions: Random directions that class scores are seen through; 0: none.
    """

    weights: tuple[float, ...]
    offset: float
    low: float
    high: float
    levels: tuple[float, ...]
    factors: tuple[float, ...]
    ratios: tuple[float, ...]
    inputs: int
    taught: int = 0
    directions: int = 0

    def bound(self, outputs: Sequence[Any], level: float = 0.9, inputs: int = 1) -> F64:
        """The bound of each input of a call.

        Args:
            outputs: The floating-point outputs of the profile, in order; what numpy reads.
            level: One of `levels`.
            inputs: How many inputs the call has, along the first axis of every output.

        Returns:
            [inputs].

        Raises:
            CertificateError: Another level, or other outputs than those that it was made from.
        """
        if level not in self.levels:
            known = ", ".join(f"{v:g}" for v in self.levels)
            raise CertificateError(f"no bound at level {level:g}; there are {known}: certify at it")
        found = features(outputs, inputs)
        if found.shape[1] != self._seen:
            raise CertificateError(
                f"outputs give {found.shape[1]} features, the bound was made from "
                f"{self._seen}; give the profile's floating-point outputs, all in order"
            )
        found = widened(found, self.directions) if self.directions else found
        return self.factors[self.levels.index(level)] * self.predicted(found)

    @property
    def _seen(self) -> int:
        """Features before `widened`."""
        count = len(self.weights)
        return 2 * ((count - self.directions - 7) // 3) + 5 if self.directions else count

    def predicted(self, found: F64) -> F64:
        """The drift to expect from features [n, f], widened if there are directions: [n]."""
        exponent = np.clip(found @ np.array(self.weights) + self.offset, self.low, self.high)
        return np.asarray(np.exp(exponent))


def features(outputs: Sequence[Any], inputs: int) -> F64:
    """What a linear form sees of outputs: [inputs, features].

    The logarithm of each output's norm; the mean and the mean square along its last axis over all
    axes between; of an output [inputs, classes] the top two, their distance and its logarithm.

    Args:
        outputs: Arrays with `inputs` as first axis, or any if there is one input.
        inputs: How many.
    """
    parts: list[F64] = []
    for output in outputs:
        y = np.asarray(output, np.float64)
        y = y.reshape(inputs, -1, y.shape[-1] if y.ndim > 1 else y.size // inputs)
        parts.append(np.log(TINY + np.sqrt(np.square(y).sum((1, 2))))[:, None])
        if y.shape[2] > WIDEST:
            continue
        parts += [y.mean(1), np.square(y).mean(1)]
        if y.shape[1] == 1 and y.shape[2] > 1:
            top = np.sort(y[:, 0], 1)[:, :-3:-1]
            margin = top[:, :1] - top[:, 1:]
            parts += [top, margin, np.log(TINY + margin)]
    return np.concatenate(parts, 1)


def widened(found: F64, directions: int) -> F64:
    """Features of one output [inputs, classes], and what is not linear in its scores.

    The logarithms of the entropy and of one minus the confidence, the probabilities, and the
    positive part of random directions of the scores with their mean and their size taken out.

    Args:
        found: [n, 2 * classes + 5], what `features` gives.
        directions: How many; the same ones each time.

    Returns:
        [n, 3 * classes + 7 + directions].
    """
    classes = (found.shape[1] - 5) // 2
    z = found[:, 1 : classes + 1]
    shares = np.exp(z - z.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum(1, keepdims=True)
    doubt = 1 - shares.max(1, keepdims=True)
    inner = z - z.mean(1, keepdims=True)
    inner /= TINY + inner.std(1, keepdims=True)
    slopes, shifts = _random(classes, directions)
    bent = np.maximum(inner @ slopes + shifts, 0.0)
    return np.concatenate([found, np.log(TINY + entropy), np.log(TINY + doubt), shares, bent], 1)


@cache
def _random(classes: int, directions: int) -> tuple[F64, F64]:
    """Slopes [classes, directions] and shifts [directions]; drawing them takes longest."""
    slopes = np.sqrt(3 / classes) * _even(classes * directions, 0).reshape(classes, directions)
    shifts = SHIFT * _even(directions, 1)
    for each in (slopes, shifts):
        each.flags.writeable = False
    return slopes, shifts


def _even(count: int, seed: int) -> F64:
    """Numbers between -1 and 1, the same on every machine and with every numpy.

    Bits of numpy's generators stay the same between its versions; what distributions make of them
    may not.
    """
    bits = np.random.PCG64(seed).random_raw(count)
    return 2.0 * ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53) - 1.0
