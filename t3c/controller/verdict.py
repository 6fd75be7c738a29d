"""The no-slower gate with measured times: a factorized layer stays only where it wins beyond noise.

Every profile of a library was timed kernel by kernel, the profiles in turn; times of one turn
belong together, so that a slow moment of the machine meets both sides of a comparison.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from t3c.core.formats import Dense, Format
from t3c.core.gate import Measured

Seconds = NDArray[np.float64]
"""Of one layer, in turns."""
Times = Mapping[str, Mapping[str, Seconds]]
"""Profile name -> site name -> seconds in turns."""


Verdicts = Mapping[tuple[str, Format], Measured]
"""(site name, format) -> what was measured."""


def judge(profiles: Sequence[tuple[str, Mapping[str, Format]]], times: Times) -> Verdicts:
    """Every format that some profile uses at a site that the largest one has dense.

    Args:
        profiles: (name, formats) from the smallest to the largest.
        times: What was measured; sites that were not are not judged.
    """
    last, largest = profiles[-1]
    verdicts: dict[tuple[str, Format], Measured] = {}
    for site, whole in largest.items():
        if not isinstance(whole, Dense) or site not in times[last]:
            continue
        base = times[last][site]
        turns: dict[Format, list[Seconds]] = {}
        for name, formats in reversed(profiles):
            turns.setdefault(formats[site], []).append(times[name][site])
        for fmt, seen in turns.items():
            ratios = np.sort(np.concatenate([mine / base for mine in seen]))
            verdicts[site, fmt] = Measured(
                seconds=float(np.median(np.concatenate(seen))),
                dense_seconds=float(np.median(base)),
                ratio=float(np.median(ratios)),
                high=_upper(ratios),
            )
    return verdicts


def _upper(sorted_ratios: Seconds) -> float:
    """Upper end of the 95 % interval of the median: an order statistic, normal approximation."""
    count = len(sorted_ratios)
    at = math.ceil(count / 2 + 0.98 * math.sqrt(count)) - 1
    return float(sorted_ratios[min(count - 1, at)])


def settle(
    profiles: Sequence[tuple[str, Mapping[str, Format]]], verdicts: Verdicts
) -> list[tuple[str, dict[str, Format]]]:
    """The profiles with the largest one's dense form wherever a format does not win; still nested.

    Where a site turns dense in one profile it does in all larger ones; profiles that become equal
    are one, under the larger one's name.

    Args:
        profiles: (name, formats) from the smallest to the largest.
        verdicts: Of the formats.
    """
    dense: set[str] = set()
    largest = profiles[-1][1]
    made: list[tuple[str, dict[str, Format]]] = []
    for name, formats in profiles:
        dense |= {site for site, fmt in formats.items() if _lost(verdicts, site, fmt)}
        mine = {s: largest[s] if s in dense else fmt for s, fmt in formats.items()}
        if made and made[-1][1] == mine:
            made.pop()
        made.append((name, mine))
    return made


def _lost(verdicts: Verdicts, site: str, fmt: Format) -> bool:
    found = verdicts.get((site, fmt))
    return found is not None and not isinstance(fmt, Dense) and not found.wins
