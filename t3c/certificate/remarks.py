"""Warnings that belong to a certificate: what its numbers do not say by themselves."""

import math
from collections.abc import Mapping, Sequence

from t3c.core.certificate import Calibrated, Labels

MANY_FLIPS = 0.02
"""Share of changed labels that is worth a word..."""
FLAT = 0.25
"""...if the average moves by less than this part of it."""


def on_bounds(found: Mapping[str, Calibrated], levels: Sequence[float]) -> list[str]:
    """What the bounds promise, to whom, and where they promise nothing."""
    first = next(iter(found.values()))
    count = first.inputs
    lines = [
        f"bounds from {count} inputs cover new inputs that are drawn like them, on average over "
        "such draws; on other data they promise nothing"
    ]
    for level in levels:
        if math.ceil((count + 1) * level - 1e-9) > count:
            least = math.ceil(level / (1 - level) - 1e-9)
            lines.append(f"no finite bound at {level:g}: it needs at least {least} inputs")
    if first.shifted is None:
        return lines
    for i, level in enumerate(levels):
        shares = [one.shifted.coverage[i] for one in found.values() if one.shifted is not None]
        error = 3 * math.sqrt(level * (1 - level) * (1 / first.shifted.inputs + 1 / count))
        verdict = "they do not hold there" if min(shares) < level - error else "within error"
        lines.append(
            f"on the {first.shifted.inputs} shifted inputs the bounds of {level:.0%} cover "
            f"{min(shares):.1%} to {max(shares):.1%}, by profile: {verdict}"
        )
    return lines


def on_labels(found: Mapping[str, Labels], classes: int) -> list[str]:
    """Profiles that change many answers while the average stays."""
    lines = [f"outputs are read as scores of {classes} classes"]
    for name, one in found.items():
        if one.accuracy is None or one.original_accuracy is None:
            what, moved = "mean confidence", one.confidence
        else:
            what, moved = "accuracy", one.accuracy - one.original_accuracy
        if one.flips >= MANY_FLIPS and abs(moved) < FLAT * one.flips:
            lines.append(
                f"profile {name!r} changes {one.flips:.1%} of labels while {what} moves by "
                f"{100 * moved:+.2f} points: equal averages hide changed answers"
            )
    return lines
