"""The no-slower gate with measured times: a factorized layer stays only where it wins beyond noise.

Every profile of a library was timed kernel by kernel, the profiles in turn; times of one turn
belong together, so that a slow moment of the machine meets both sides of a comparison.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from t3c.core.formats import Dense, Format

Seconds = NDArray[np.float64]
"""Of one layer, in turns."""
Times = Mapping[str, Mapping[str, Seconds]]
"""Profile name -> site name -> seconds in turns."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One format of one site, measured against the dense form in the same library.

    Attributes:
        site: Name of the site.
        format: The format.
        seconds: Median time of the layer.
        dense_seconds: Median time of its dense form.
        ratio: Median of the ratios of all turns.
        high: Upper end of the interval that holds that median (95 %).
    """

    site: str
    format: Format
    seconds: float
    dense_seconds: float
    ratio: float
    high: float

    @property
    def kept(self) -> bool:
        """Whether it wins beyond noise."""
        return isinstance(self.format, Dense) or self.high < 1.0


def judge(
    profiles: Sequence[tuple[str, Mapping[str, Format]]], times: Times
) -> tuple[Verdict, ...]:
    """Every format that some profile uses, by site, from dense down.

    Args:
        profiles: (name, formats) from the smallest to the largest, which is dense where a format
            can be judged; other sites are left out.
        times: What was measured.
    """
    last, largest = profiles[-1]
    verdicts = []
    for site, whole in largest.items():
        if not isinstance(whole, Dense):
            continue
        base = times[last][site]
        turns: dict[Format, list[Seconds]] = {}
        for name, formats in reversed(profiles):
            turns.setdefault(formats[site], []).append(times[name][site])
        for fmt, seen in turns.items():
            ratios = np.sort(np.concatenate([mine / base for mine in seen]))
            verdicts.append(
                Verdict(
                    site,
                    fmt,
                    float(np.median(np.concatenate(seen))),
                    float(np.median(base)),
                    float(np.median(ratios)),
                    _upper(ratios),
                )
            )
    return tuple(verdicts)


def _upper(sorted_ratios: Seconds) -> float:
    """Upper end of the 95 % interval of the median: an order statistic, normal approximation."""
    count = len(sorted_ratios)
    at = math.ceil(count / 2 + 0.98 * math.sqrt(count)) - 1
    return float(sorted_ratios[min(count - 1, at)])


def settle(
    profiles: Sequence[tuple[str, Mapping[str, Format]]], verdicts: Sequence[Verdict]
) -> list[tuple[str, dict[str, Format]]]:
    """The profiles with the dense form wherever a format does not win; still nested.

    Where a site turns dense in one profile it does in all larger ones; profiles that become equal
    are one, under the larger one's name.

    Args:
        profiles: (name, formats) from the smallest to the largest.
        verdicts: Of the formats.
    """
    lost = {(v.site, v.format) for v in verdicts if not v.kept}
    dense: set[str] = set()
    made: list[tuple[str, dict[str, Format]]] = []
    for name, formats in profiles:
        dense |= {site for site, fmt in formats.items() if (site, fmt) in lost}
        mine = {s: Dense(8) if s in dense else fmt for s, fmt in formats.items()}
        if made and made[-1][1] == mine:
            made.pop()
        made.append((name, mine))
    return made
