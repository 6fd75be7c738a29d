"""How much the outputs of the whole model move when one site changes its format: the damage table.

Damage is relative and squared: sum ||y - y_original||^2 / sum ||y_original||^2 over all float
outputs, with fake-quantized weights and activations at that site and the float original elsewhere.
Damages of several sites add up well (their sum predicts whole plans to about 5 %).
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from t3c.controller.gradients import look
from t3c.controller.progress import Progress, silent
from t3c.controller.suffix import Suffix
from t3c.core.errors import T3CError
from t3c.core.formats import Dense, Format
from t3c.core.profile import Label
from t3c.elastic.model import ElasticModel

Batch = tuple[Tensor, ...]
PROBES = 4
"""Random projections of the outputs behind the estimates."""
Menu = Mapping[str, Sequence[Format]]
"""Site name -> formats on its menu, dense first, then falling."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Damage of one format at one site.

    Attributes:
        damage: Relative squared drift of the outputs, never less than that of a larger format.
        label: Measured, or estimated: the error of the site's own outputs, weighed by gradients,
            times a gain measured with other formats of the site (or, if there was no time for
            any, at the nearest site that was measured).
        batches: Batches behind it; 0 when estimated.
    """

    damage: float
    label: Label
    batches: int


@dataclass(frozen=True, slots=True)
class DamageTable:
    """Damage of every format on the menu.

    Attributes:
        entries: Site name -> format -> entry.
        seconds: What measuring took.
    """

    entries: Mapping[str, Mapping[Format, Entry]]
    seconds: float

    def damage(self, formats: Mapping[str, Format]) -> float:
        """Predicted relative squared drift of a whole plan: the sum over its sites."""
        return sum(self.entries[site][fmt].damage for site, fmt in formats.items())

    def count(self, label: Label) -> int:
        """Entries with that label."""
        return sum(e.label is label for row in self.entries.values() for e in row.values())


@dataclass(slots=True)
class _Sums:
    """What was measured of one entry so far."""

    drift: float = 0.0
    energy: float = 0.0
    batches: int = 0


@dataclass(slots=True)
class _Bench:
    """Measures entries until a deadline."""

    suffix: Suffix
    deadline: float
    sums: dict[tuple[str, Format], _Sums] = field(default_factory=dict)

    def over(self) -> bool:
        return time.monotonic() >= self.deadline

    def measure(self, site: str, fmt: Format) -> None:
        with self.suffix.elastic.using({site: fmt}):
            drift = self.suffix.drift(site)
        seen = self.sums.setdefault((site, fmt), _Sums())
        seen.drift += drift
        seen.energy += self.suffix.energy()
        seen.batches += 1


def measure(
    elastic: ElasticModel,
    batches: Sequence[Batch],
    menu: Menu,
    *,
    seconds: float = math.inf,
    progress: Progress = silent,
) -> DamageTable:
    """Measure as many entries on as many batches as fit in `seconds`; estimate the rest.

    First one format of every site on the first batch; its time decides how many formats and
    batches follow: at least two formats on one batch before more batches, up to four batches
    before every format.

    Args:
        elastic: The calibrated model.
        batches: Flat inputs, as the graph takes them.
        menu: What may become of each site.
        seconds: Time to spend; it is overrun by one entry, and by the local errors if too short.
        progress: Told after each entry.

    Raises:
        T3CError: No batches, or the original outputs are all zero.
    """
    if not batches:
        raise T3CError("the damage table needs at least one batch of inputs; got none")
    start = time.monotonic()
    bench = _Bench(Suffix(elastic), start + seconds)
    bench.suffix.load(batches[0])
    if not bench.suffix.energy() > 0:
        raise T3CError(
            "the model's outputs are all zero or not finite on the first calibration batch; "
            "drift relative to them means nothing"
        )
    seen = look(elastic, batches[0], list(menu), range(PROBES))
    bench.suffix.weigh({call.node: call.slopes for call in seen})
    local = _local_errors(bench.suffix, menu, progress)
    bench.suffix.weigh({})
    levels = list(_levels(menu))
    begin = time.monotonic()
    for done, (site, fmt) in enumerate(levels[0] if levels else []):
        if bench.over():
            break
        progress("measuring damage", done, len(levels[0]))
        bench.measure(site, fmt)
    depth, width = _extent(len(levels), len(batches), time.monotonic() - begin, bench.deadline)
    jobs = [job for level in levels[:depth] for job in level]
    for number, batch in enumerate(batches[:width]):
        todo = jobs[len(levels[0]) :] if number == 0 else jobs
        if number and not bench.over():
            bench.suffix.load(batch)
        for done, (site, fmt) in enumerate(todo):
            if bench.over():
                break
            progress("measuring damage", number * len(jobs) + done, width * len(jobs))
            bench.measure(site, fmt)
    progress("measuring damage", 1, 1)
    return DamageTable(_entries(menu, local, bench.sums), time.monotonic() - start)


def _extent(levels: int, batches: int, one: float, deadline: float) -> tuple[int, int]:
    """How many levels to measure on how many batches, when one level of one batch takes `one`."""
    left = deadline - time.monotonic()
    if not math.isfinite(left):
        return levels, batches
    passes = max(0.0, left) / max(one, 1e-9) + 1
    depth = min(levels, max(2, int(passes / min(batches, 4))))
    return depth, max(1, min(batches, int(passes / max(1, depth))))


def _levels(menu: Menu) -> Iterator[list[tuple[str, Format]]]:
    """Entries in the order of their worth: a middle format of each site, its smallest, the others.

    Within a level, sites come in strides, so that a level cut short still covers the whole depth.
    """
    names = list(menu)
    stride = max(1, math.isqrt(len(names)))
    spread = [name for first in range(stride) for name in names[first::stride]]
    ranked = {name: _ranked(menu[name]) for name in names}
    for level in range(max((len(r) for r in ranked.values()), default=0)):
        yield [(name, ranked[name][level]) for name in spread if level < len(ranked[name])]


def _ranked(formats: Sequence[Format]) -> list[Format]:
    """The formats of one site, most telling first."""
    low = [fmt for fmt in formats if not isinstance(fmt, Dense)]
    if not low:
        return list(formats)
    middle = low[len(low) // 2]
    first = [middle] + [fmt for fmt in (low[-1], low[0]) if fmt != middle]
    first = list(dict.fromkeys(first))
    rest = [fmt for fmt in formats if fmt not in first]
    return [*first, *rest]


def _local_errors(
    suffix: Suffix, menu: Menu, progress: Progress
) -> dict[tuple[str, Format], float]:
    """`Suffix.local` of every entry, on the loaded batch."""
    found: dict[tuple[str, Format], float] = {}
    for done, (site, formats) in enumerate(menu.items()):
        progress("measuring layers", done, len(menu))
        for fmt in formats:
            with suffix.elastic.using({site: fmt}):
                found[site, fmt] = suffix.local(site)
    return found


def _entries(
    menu: Menu, local: Mapping[tuple[str, Format], float], sums: Mapping[tuple[str, Format], _Sums]
) -> dict[str, dict[Format, Entry]]:
    """Measured entries, estimates for the others, and no damage that falls with rank."""
    known = {
        site: [(local[site, f], _damage(sums[site, f])) for f in formats if (site, f) in sums]
        for site, formats in menu.items()
    }
    names = list(menu)
    out: dict[str, dict[Format, Entry]] = {}
    for place, site in enumerate(names):
        points = known[site]
        if not points:  # no time for this site: the nearest measured one stands in
            near = sorted(names, key=lambda n: abs(names.index(n) - place))
            points = next((known[n] for n in near if known[n]), [])
        row: dict[Format, Entry] = {}
        floor = 0.0
        for fmt in menu[site]:
            seen = sums.get((site, fmt))
            value = _scaled(local[site, fmt], points) if seen is None else _damage(seen)
            floor = max(floor, value)
            label = Label.ESTIMATED if seen is None else Label.MEASURED
            row[fmt] = Entry(floor, label, 0 if seen is None else seen.batches)
        out[site] = row
    return out


def _damage(sums: _Sums) -> float:
    return sums.drift / sums.energy


def _scaled(error: float, points: Sequence[tuple[float, float]]) -> float:
    """Damage at a local error, from measured (local error, damage) pairs.

    Straight lines between them in log-log, constant gain outside; without any, the error itself.
    """
    usable = sorted((e, d) for e, d in points if 0 < e < math.inf and 0 < d < math.inf)
    if error <= 0.0:
        return 0.0
    if not usable or not error < math.inf:
        return error
    errors, damages = [e for e, _ in usable], [d for _, d in usable]
    if error <= errors[0]:
        return damages[0] / errors[0] * error
    if error >= errors[-1]:
        return damages[-1] / errors[-1] * error
    return float(np.exp(np.interp(np.log(error), np.log(errors), np.log(damages))))
