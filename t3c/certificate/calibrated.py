"""Split-conformal bounds on the drift of each profile's library, from held-out inputs.

The score of an input is ||dz||_2, the distance of the library's outputs from the original model's.
With n scores the bound of level 1 - a is the ceil((n + 1)(1 - a))-th smallest: a new input that is
exchangeable with the n has a larger score with probability at most a. Nothing is promised for other
data, nor for each profile of a chain at once. Source: Vovk, Gammerman, Shafer, Algorithmic Learning
in a Random World, chapter 4.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from t3c.core.certificate import Bound, Calibrated, Draw, Shifted
from t3c.core.errors import CertificateError

F64 = NDArray[np.float64]
LEVELS = (0.9, 0.95, 0.99)
PARTS = 3
"""Disjoint parts of the inputs; each tests the bound from the others."""


def conformal_bound(scores: F64, level: float) -> float:
    """The bound of a level; infinite where there are too few scores for it.

    Args:
        scores: [n] of exchangeable inputs.
        level: Share of new inputs to cover, above 0 and below 1.

    Raises:
        ValueError: The level is none.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}; need a share above 0 and below 1, for example 0.9")
    place = math.ceil((len(scores) + 1) * level - 1e-9)
    return math.inf if place > len(scores) else float(np.sort(scores)[max(place, 1) - 1])


def parts_of(count: int) -> NDArray[np.int64]:
    """Which of `PARTS` disjoint draws each input belongs to, in turns: [count]."""
    return np.arange(count) % PARTS


def coverage(scores: F64, level: float) -> tuple[float, ...]:
    """Share of each of `PARTS` parts that the bound from the other parts covers."""
    part = parts_of(len(scores))
    if len(scores) < 2 * PARTS:
        return ()
    return tuple(
        float((scores[part == p] <= conformal_bound(scores[part != p], level)).mean())
        for p in range(PARTS)
    )


def calibrate(
    original: Mapping[str, F64],
    teacher: Mapping[str, F64],
    sha256: str,
    levels: Sequence[float] = LEVELS,
) -> dict[str, Calibrated]:
    """Bounds of every profile, non-increasing along the chain.

    Args:
        original: Profile name -> scores against the original model, smallest profile first.
        teacher: Profile name -> scores against the largest profile.
        sha256: Hash of the inputs.
        levels: Levels, rising.

    Raises:
        CertificateError: No scores, or scores that are not finite.
    """
    _check_finite(original)
    found: dict[str, Calibrated] = {}
    reached = dict.fromkeys(levels, 0.0)
    for name in reversed(list(original)):
        bounds = []
        for level in levels:
            raw = conformal_bound(original[name], level)
            reached[level] = max(reached[level], raw)
            bounds.append(
                Bound(
                    level,
                    reached[level],
                    raw,
                    conformal_bound(teacher[name], level),
                    coverage(original[name], level),
                )
            )
        found[name] = Calibrated(tuple(bounds), len(original[name]), sha256)
    return {name: found[name] for name in original}


def _check_finite(scores: Mapping[str, F64]) -> None:
    for name, found in scores.items():
        if not len(found) or not np.isfinite(found).all():
            raise CertificateError(
                f"profile {name!r}: {len(found)} scores, not all finite; give held-out inputs "
                "on which model and library give finite outputs"
            )


def draws(
    scores: F64,
    digests: Sequence[str],
    levels: Sequence[float],
    kept: NDArray[np.bool_] | None = None,
    right: NDArray[np.bool_] | None = None,
) -> tuple[Draw, ...]:
    """What each of `PARTS` disjoint draws of the inputs says alone; none where inputs are few.

    Args:
        scores: [n] of one profile.
        digests: Hash of each input.
        levels: Levels, rising.
        kept: [n] whether the label is the original's; None where outputs are not class scores.
        right: [n] whether the label is right; None without labels.
    """
    if len(scores) < 2 * PARTS:
        return ()
    part = parts_of(len(scores))
    found = []
    for p in range(PARTS):
        mine = part == p
        bounds = tuple(conformal_bound(scores[mine], level) for level in levels)
        own = [digest for digest, inside in zip(digests, mine, strict=True) if inside]
        found.append(
            Draw(
                len(own),
                hashlib.sha256("".join(own).encode()).hexdigest(),
                bounds,
                tuple(float((scores[~mine] <= bound).mean()) for bound in bounds),
                float(scores[mine].mean()),
                None if kept is None else float(kept[mine].mean()),
                None if right is None else float(right[mine].mean()),
            )
        )
    return tuple(found)


def with_shifted(
    found: Mapping[str, Calibrated], scores: Mapping[str, F64], sha256: str
) -> dict[str, Calibrated]:
    """The same with measured coverage of its bounds on other data.

    Args:
        found: Profile name -> bounds.
        scores: Profile name -> scores of the other data against the original.
        sha256: Hash of the other data.

    Raises:
        CertificateError: Scores that are not finite.
    """
    _check_finite(scores)
    return {
        name: replace(
            one,
            shifted=Shifted(
                len(scores[name]),
                sha256,
                tuple(float((scores[name] <= b.value).mean()) for b in one.bounds),
                float(scores[name].mean()),
            ),
        )
        for name, one in found.items()
    }
