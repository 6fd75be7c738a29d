"""What becomes of labels: flips, confidence and its calibration, by the original's margin.

If ||dz||_2 <= D, no difference of two scores changes by more than sqrt(2) D: an input whose top two
scores lie further apart keeps its label. Expected calibration error is the mean over 15 bins of
confidence of |share right - mean confidence|, weighed by their inputs. Source: Guo, Pleiss, Sun,
Weinberger, On Calibration of Modern Neural Networks, 2017, section 2.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from t3c.certificate.calibrated import PARTS, conformal_bound, parts_of
from t3c.certificate.outputs import F64
from t3c.core.certificate import Checked, Labels, Margin, Sound
from t3c.core.errors import CertificateError

I64 = NDArray[np.int64]
ECE_BINS = 15
MARGINS = 4
"""Ranges of the margin, with equally many inputs."""
SUMS_TO_ONE = 1e-3
"""Rows of outputs that are no further from 1 in sum, and not negative, are probabilities."""


@dataclass(frozen=True, slots=True)
class Classes:
    """Labels of n inputs, before and after.

    Attributes:
        margin: [n] distance of the original's two largest outputs.
        label: [n] arg-max of the original.
        confidence: [n] largest probability of the original.
        labels: Profile name -> [n] arg-max, smallest profile first.
        confidences: Profile name -> [n] largest probability.
        count: Number of classes.
        truth: [n] right answers; None where nobody told.
    """

    margin: F64
    label: I64
    confidence: F64
    labels: dict[str, I64]
    confidences: dict[str, F64]
    count: int
    truth: I64 | None = None

    @classmethod
    def of(cls, original: Tensor, outputs: Mapping[str, Tensor]) -> "Classes":
        """Of outputs [n, classes]."""
        top = original.double().topk(2, 1).values
        rows = original.double()
        given = bool((rows >= 0).all() and ((rows.sum(1) - 1).abs() <= SUMS_TO_ONE).all())
        return cls(
            (top[:, 0] - top[:, 1]).numpy(),
            original.argmax(1).numpy(),
            _confidence(original, given),
            {name: y.argmax(1).numpy() for name, y in outputs.items()},
            {name: _confidence(y, given) for name, y in outputs.items()},
            original.shape[1],
        )

    @classmethod
    def joined(cls, parts: Sequence["Classes"]) -> "Classes":
        """One behind the other."""
        names = list(parts[0].labels)
        return cls(
            np.concatenate([p.margin for p in parts]),
            np.concatenate([p.label for p in parts]),
            np.concatenate([p.confidence for p in parts]),
            {n: np.concatenate([p.labels[n] for p in parts]) for n in names},
            {n: np.concatenate([p.confidences[n] for p in parts]) for n in names},
            parts[0].count,
        )

    def told(self, truth: Any) -> "Classes":
        """With the right answers.

        Args:
            truth: [n] whole numbers, one for each input in order; anything numpy reads.

        Raises:
            ValueError: As many are not given, or they are no classes.
        """
        found = np.asarray(truth)
        if found.shape != self.label.shape:
            raise ValueError(
                f"labels have the shape {list(found.shape)}; give one for each of the "
                f"{len(self.label)} inputs, in order"
            )
        if found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= self.count:
            raise ValueError(
                f"labels are {found.dtype} from {found.min()} to {found.max()}; whole numbers from "
                f"0 to {self.count - 1} are allowed"
            )
        return replace(self, truth=found.astype(np.int64))


def _confidence(outputs: Tensor, given: bool) -> F64:
    """Largest probability of each row; softmax unless rows are probabilities already."""
    rows = outputs.double() if given else torch.softmax(outputs.double(), 1)
    found: F64 = rows.amax(1).numpy()
    return found


def label_effects(
    classes: Classes,
    drift: Mapping[str, F64],
    levels: Sequence[float],
    sound: Mapping[str, Sound | None],
) -> dict[str, Labels]:
    """What each profile does to labels.

    Args:
        classes: Labels before and after.
        drift: Profile name -> [n] distances from the original, smallest profile first.
        levels: Of calibrated bounds.
        sound: Profile name -> its proven bound.

    Raises:
        CertificateError: Outputs that were compared are not finite.
    """
    if not np.isfinite(classes.margin).all():
        raise CertificateError("margins of the original's outputs are not finite; check the inputs")
    crossed = _crossed(drift, levels)
    bins = np.array_split(np.argsort(classes.margin, kind="stable"), MARGINS)
    most = list(classes.labels)[-1]
    found = {}
    for name, label in classes.labels.items():
        flipped = label != classes.label
        checks = [_checked(classes, flipped, v, crossed[v][name]) for v in levels]
        proven = sound[name]
        if proven is not None and proven.status == "bound":
            checks.append(_checked(classes, flipped, None, np.full(len(label), proven.value)))
        truth = classes.truth
        found[name] = Labels(
            inputs=len(label),
            flips=float(flipped.mean()),
            teacher=float((label != classes.labels[most]).mean()),
            confidence=float((classes.confidences[name] - classes.confidence).mean()),
            accuracy=None if truth is None else float((label == truth).mean()),
            original_accuracy=None if truth is None else float((classes.label == truth).mean()),
            ece=_ece(classes, name, None),
            original_ece=_ece(classes, None, None),
            margins=tuple(_margin(classes, name, flipped, b) for b in bins if len(b)),
            checked=tuple(checks),
        )
    return found


def _crossed(drift: Mapping[str, F64], levels: Sequence[float]) -> dict[float, dict[str, F64]]:
    """Level -> profile -> [n] bound for each input from the draws without it, raised."""
    found: dict[float, dict[str, F64]] = {level: {} for level in levels}
    for level in levels:
        part = parts_of(len(next(iter(drift.values()))))
        reached: F64 = np.zeros(len(part))
        for name in reversed(list(drift)):
            folds = np.array([conformal_bound(drift[name][part != p], level) for p in range(PARTS)])
            reached = np.maximum(reached, folds[part])
            found[level][name] = reached
    return found


def _checked(
    classes: Classes, flipped: NDArray[np.bool_], level: float | None, bound: F64
) -> Checked:
    certified = math.sqrt(2) * bound < classes.margin
    return Checked(level, float(certified.mean()), float((certified & flipped).mean()))


def _margin(classes: Classes, name: str, flipped: NDArray[np.bool_], inside: I64) -> Margin:
    """One range of margins; `inside` are the places of its inputs, by rising margin."""
    change = classes.confidences[name][inside] - classes.confidence[inside]
    after, before = _ece(classes, name, inside), _ece(classes, None, inside)
    return Margin(
        float(classes.margin[inside[0]]),
        float(classes.margin[inside[-1]]),
        len(inside),
        float(flipped[inside].mean()),
        float(change.mean()),
        None if after is None or before is None else after - before,
    )


def _ece(classes: Classes, name: str | None, inside: I64 | None) -> float | None:
    """Of a profile, None: of the original; on all inputs, or some."""
    if classes.truth is None:
        return None
    where = slice(None) if inside is None else inside
    label = classes.label if name is None else classes.labels[name]
    sure = classes.confidence if name is None else classes.confidences[name]
    return expected_calibration_error(sure[where], (label == classes.truth)[where])


def expected_calibration_error(confidence: F64, right: NDArray[np.bool_]) -> float:
    """Mean |share right - mean confidence| over bins of confidence, weighed by their inputs.

    Args:
        confidence: [n] in [0, 1].
        right: [n].
    """
    place = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    gap = np.bincount(place, weights=right - confidence, minlength=ECE_BINS)
    return float(np.abs(gap).sum() / len(confidence))
