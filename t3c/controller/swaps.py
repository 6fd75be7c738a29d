"""Exchange levels between two layers of a profile where the whole plan then drifts less, measured.

The chain adds up damages of single layers; what layers do to each other only a whole plan shows.
One layer goes a level up, another one a level down, at no higher cost, between the levels of the
neighbouring profiles, so that the chain stays nested. Source: Sieberling et al., "EvoPress", 2024
(level switches at constant budget), here from the greedy chain and inside it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from t3c.controller.chain import Option, Options, Plan, falling
from t3c.controller.damage import Batch
from t3c.controller.progress import Progress, silent
from t3c.controller.suffix import floats
from t3c.core.formats import Format
from t3c.elastic.model import ElasticModel

SWAP_BATCHES = 8
"""Calibration batches that whole plans are scored on, at most."""

Score = Callable[[Mapping[str, Format]], float]
"""Drift of a whole plan; lower is better."""
_Levels = dict[str, int]
"""Site name -> place of its option."""


@dataclass(frozen=True, slots=True)
class Swapped:
    """A chain after its swaps.

    Attributes:
        plans: Smallest first, as many as before.
        kept: How many swaps made a plan better.
        evaluations: How many plans were scored.
    """

    plans: tuple[Plan, ...]
    kept: int
    evaluations: int


@dataclass(slots=True)
class _Budget:
    """Scores what may still be scored."""

    score: Score
    left: int
    used: int = 0

    def __call__(self, formats: Mapping[str, Format]) -> float | None:
        if self.left <= 0:
            return None
        self.left -= 1
        self.used += 1
        return self.score(formats)


def improve(
    plans: Sequence[Plan],
    options: Options,
    score: Score,
    evaluations: int,
    progress: Progress = silent,
) -> Swapped:
    """Try swaps in each profile, the most promising by the table first; keep what drifts less.

    Every profile has an equal share of the evaluations; one of them scores the plan as it is. What
    a profile leaves over goes to the smaller ones.

    Args:
        plans: A nested chain, smallest first.
        options: Site name -> options, as the chain was searched in.
        score: Measures a whole plan.
        evaluations: Plans to score, at most.
        progress: Told after each profile.
    """
    rows = {site: [row[i] for i in falling(row)] for site, row in options.items()}
    levels = [_levels(plan, rows) for plan in plans]
    kept = used = 0
    for at in reversed(range(len(plans))):  # the largest first: often it cannot be changed
        share = (evaluations - used) // (at + 1)
        above = levels[at + 1] if at + 1 < len(plans) else None
        below = levels[at - 1] if at else None
        budget = _Budget(score, share)
        levels[at], better = _climb(levels[at], below, above, rows, budget)
        kept, used = kept + better, used + budget.used
        progress("swapping levels", len(plans) - at, len(plans))
    made = [
        _plan(mine, rows) if mine != _levels(plan, rows) else plan
        for mine, plan in zip(levels, plans, strict=True)
    ]
    return Swapped(tuple(made), kept, used)


def drift_on(elastic: ElasticModel, batches: Sequence[Batch]) -> Score:
    """Scores plans by the mean over batches of ||y - y_original|| / ||y_original||.

    Args:
        elastic: The model.
        batches: Flat inputs, as the graph takes them.
    """

    def outputs(formats: Mapping[str, Format] | None, batch: Batch) -> torch.Tensor:
        with torch.no_grad(), elastic.using(formats):
            return torch.cat([y.double().flatten() for y in floats(elastic.graph(*batch))])

    before = [outputs(None, batch) for batch in batches]

    def score(formats: Mapping[str, Format]) -> float:
        off = [
            float((outputs(formats, b) - y).norm() / y.norm().clamp_min(1e-30))
            for b, y in zip(batches, before, strict=True)
        ]
        return sum(off) / len(off)

    return score


def _climb(
    mine: _Levels,
    below: _Levels | None,
    above: _Levels | None,
    rows: Mapping[str, Sequence[Option]],
    budget: _Budget,
) -> tuple[_Levels, int]:
    """Swap while something improves and there is budget."""
    tried: set[tuple[tuple[str, int], ...]] = set()
    best: float | None = None
    kept = 0
    while True:
        found = None
        for candidate in _candidates(mine, below, above, rows):
            key = tuple(sorted(candidate.items()))
            if key in tried:
                continue
            tried.add(key)
            if best is None and (best := budget(_formats(mine, rows))) is None:
                return mine, kept
            value = budget(_formats(candidate, rows))
            if value is None:
                return mine, kept
            if value < best:
                found, best = candidate, value
                break
        if found is None:
            return mine, kept
        mine, kept = found, kept + 1


def _candidates(
    mine: _Levels,
    below: _Levels | None,
    above: _Levels | None,
    rows: Mapping[str, Sequence[Option]],
) -> Iterator[_Levels]:
    """Plans one swap away that stay between the neighbours, the least predicted damage first."""

    def change(site: str, step: int) -> tuple[float, float]:
        old, new = rows[site][mine[site]], rows[site][mine[site] + step]
        return new.cost - old.cost, new.damage - old.damage

    up = [s for s, level in mine.items() if level > (0 if above is None else above[s])]
    down = [
        s for s, level in mine.items() if level < (len(rows[s]) - 1 if below is None else below[s])
    ]
    found: list[tuple[float, str, str]] = []
    for rising in up:
        cost, gain = change(rising, -1)
        for sinking in down:
            saved, harm = change(sinking, 1)
            if sinking != rising and cost + saved <= 0:
                found.append((gain + harm, rising, sinking))
    for _, rising, sinking in sorted(found):
        made = mine | {rising: mine[rising] - 1, sinking: mine[sinking] + 1}
        if made not in (below, above):
            yield made


def _levels(plan: Plan, rows: Mapping[str, Sequence[Option]]) -> _Levels:
    return {
        site: [option.format for option in row].index(plan.formats[site])
        for site, row in rows.items()
    }


def _formats(levels: _Levels, rows: Mapping[str, Sequence[Option]]) -> dict[str, Format]:
    return {site: rows[site][level].format for site, level in levels.items()}


def _plan(levels: _Levels, rows: Mapping[str, Sequence[Option]]) -> Plan:
    chosen = [rows[site][level] for site, level in levels.items()]
    return Plan(
        _formats(levels, rows),
        math.fsum(option.cost for option in chosen),
        math.fsum(option.damage for option in chosen),
    )
