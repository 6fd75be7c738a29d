"""A bound on drift for each input, from what a profile's own outputs say of it.

Some inputs drift more than others, and outputs tell in part which: a linear form of their features
predicts the logarithm of the drift. The bound is a conformal quantile of drift over prediction,
times the prediction. Source: Lei, G'Sell, Rinaldo, Tibshirani, Wasserman, Distribution-Free
Predictive Inference for Regression, 2018, section 5.2 (locally weighted split conformal).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t3c.core.errors import CertificateError

F64 = NDArray[np.float64]
WIDEST = 512
"""Values of a last axis beyond which an output counts by its norm alone."""
TINY = 1e-3
"""Added to what a logarithm is taken of, so that equal scores give a number."""


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
        inputs: Inputs behind the factors; others, as many, are behind the weights.
    """

    weights: tuple[float, ...]
    offset: float
    low: float
    high: float
    levels: tuple[float, ...]
    factors: tuple[float, ...]
    ratios: tuple[float, ...]
    inputs: int

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
        if found.shape[1] != len(self.weights):
            raise CertificateError(
                f"outputs give {found.shape[1]} features, the bound was made from "
                f"{len(self.weights)}; give the profile's floating-point outputs, all in order"
            )
        return self.factors[self.levels.index(level)] * self.predicted(found)

    def predicted(self, found: F64) -> F64:
        """The drift to expect from features [n, f]: [n]."""
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
