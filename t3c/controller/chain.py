"""Order all steps down from dense by damage per unit of cost saved; cut the path into profiles."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from t3c.core.formats import Dense, Format

SHARE_OF_MAX = 0.6
"""Tiny takes at most this share of Max's cost in elastic layers, if any ranks allow it."""
DRIFT_MAX = 0.3
"""Below `SHARE_OF_MAX` Tiny goes on only while the predicted relative drift stays under this."""

DRIFT_WEIGHT = 0.5
"""Of drift against cost in the spacing of profiles."""


@dataclass(frozen=True, slots=True)
class Option:
    """One format of one site.

    Attributes:
        format: The format.
        cost: Of the site, in units of the objective (seconds, multiply-adds, bytes, joules).
        damage: Relative squared drift that it causes.
    """

    format: Format
    cost: float
    damage: float


Options = Mapping[str, Sequence[Option]]
"""Site name -> options: dense first, then falling in rank."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One choice for every site, on the path from dense down.

    Attributes:
        formats: Site name -> format.
        cost: Of all elastic sites, in units of the objective.
        damage: Predicted relative squared drift.
    """

    formats: Mapping[str, Format]
    cost: float
    damage: float

    @property
    def drift(self) -> float:
        """Predicted relative drift of the outputs: the root of the damage."""
        return math.sqrt(self.damage)


@dataclass(frozen=True, slots=True)
class _Step:
    site: str
    to: int
    cost: float
    damage: float

    @property
    def price(self) -> float:
        return self.damage / self.cost


def path(options: Options, *, dense_first: bool = False) -> list[Plan]:
    """Plans from the largest down; each lowers one site, the cheapest in damage per cost first.

    Each site walks down its lower convex hull (of damage over cost), so its own prices rise and
    the order of all steps by price is the optimal one for every prefix. Nested by construction.

    Args:
        options: What each site may become.
        dense_first: Whether every site goes to its last dense format before any is factorized. The
            path then passes dense quantization at the fewest bits itself, so that no plan loses to
            it at the same cost, whatever the table says.
    """
    if not dense_first:
        steps = [step for site, row in options.items() for step in _steps(site, row, hull(row))]
        return _walk(options, sorted(steps, key=lambda step: step.price))
    phases: tuple[list[_Step], list[_Step]] = ([], [])
    for site, row in options.items():
        count = sum(isinstance(option.format, Dense) for option in row)
        dense = falling(row[:count])
        lower = [dense[-1], *(i for i in falling(row) if i >= count)]
        for phase, places in zip(phases, (dense, lower), strict=True):
            corners = [places[i] for i in hull([row[j] for j in places])]
            phase += _steps(site, row, corners)
    return _walk(options, [s for phase in phases for s in sorted(phase, key=lambda s: s.price)])


def together(options: Options, groups: Sequence[Sequence[str]]) -> Options:
    """One entry for each group of sites, in the formats that all of them may have: costs add up.

    Args:
        options: What each site may become.
        groups: Every site in one of them; the first names the group.
    """
    found: dict[str, list[Option]] = {}
    for names in groups:
        by_format = [{option.format: option for option in options[name]} for name in names]
        found[names[0]] = [
            Option(
                fmt,
                math.fsum(row[fmt].cost for row in by_format),
                math.fsum(row[fmt].damage for row in by_format),
            )
            for fmt in by_format[0]
            if all(fmt in row for row in by_format)
        ]
    return found


def apart(plan: Plan, groups: Sequence[Sequence[str]]) -> Plan:
    """A plan of groups as one of their sites."""
    formats = {name: plan.formats[names[0]] for names in groups for name in names}
    return Plan(formats, plan.cost, plan.damage)


def last_dense(plans: Sequence[Plan]) -> int:
    """Place of the smallest plan whose sites are all dense."""
    return max(
        i for i, p in enumerate(plans) if all(isinstance(f, Dense) for f in p.formats.values())
    )


def fine_path(options: Options) -> list[Plan]:
    """As `path`, but through every option that is cheaper than all larger ones, hull or not.

    For models with so few layers that the hull has fewer corners than profiles are wanted.
    """
    queues = {site: _steps(site, row, falling(row)) for site, row in options.items()}
    steps: list[_Step] = []
    while any(queues.values()):
        site = min((s for s, q in queues.items() if q), key=lambda s: queues[s][0].price)
        steps.append(queues[site].pop(0))
    return _walk(options, steps)


def falling(row: Sequence[Option]) -> list[int]:
    """Places of the options that are cheaper than every larger one."""
    kept = [0]
    for i, option in enumerate(row):
        if option.cost < row[kept[-1]].cost:
            kept.append(i)
    return kept


def hull(row: Sequence[Option]) -> list[int]:
    """Places of the corners of the lower convex hull of (cost, damage), dense first."""
    kept: list[int] = []
    for i in falling(row):
        while len(kept) >= 2 and _price(row, kept[-2], kept[-1]) >= _price(row, kept[-1], i):
            kept.pop()
        kept.append(i)
    return kept


def cut(plans: Sequence[Plan], count: int, *, through: int = 0) -> list[Plan]:
    """At most `count` distinct plans, smallest first, evenly spaced from Tiny to Max.

    Distance is the share of the cost between them and half the share of the drift up to
    `DRIFT_MAX`: even in cost, but denser where drift rises and still is worth having.

    Args:
        plans: A path, largest first.
        count: How many profiles are wanted.
        through: Place of a plan that is taken in place of the nearest one, if three or more are
            wanted and it lies between the first and the last; 0: none.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"{count} profiles wanted; a chain has at least 1")
    last = max(tiny(plans), min(count, len(plans)) - 1)
    steps = min(count, last + 1) - 1
    at = _positions(plans[: last + 1])
    picked = [0]
    for i in range(1, steps + 1):
        want = at[-1] * i / steps
        room = range(picked[-1] + 1, last - (steps - i) + 1)
        picked.append(min(room, key=lambda j: abs(at[j] - want)))
    if len(picked) > 2 and 0 < through < last and through not in picked:
        picked.remove(min(picked[1:-1], key=lambda i: abs(at[i] - at[through])))
        picked = sorted([*picked, through])
    return [plans[i] for i in reversed(picked)]


def _positions(plans: Sequence[Plan]) -> list[float]:
    """How far each plan is down the path: see `cut`."""
    whole = plans[0].cost - plans[-1].cost
    drifts = [min(plan.drift, DRIFT_MAX) for plan in plans]
    rise = drifts[-1] - drifts[0]
    return [
        (plans[0].cost - plan.cost) / (whole or 1.0)
        + DRIFT_WEIGHT * (drift - drifts[0]) / (rise or 1.0)
        for plan, drift in zip(plans, drifts, strict=True)
    ]


def tiny(plans: Sequence[Plan]) -> int:
    """Place of the smallest plan worth having: see `SHARE_OF_MAX` and `DRIFT_MAX`."""
    limit = SHARE_OF_MAX * plans[0].cost
    for i, plan in enumerate(plans):
        if plan.cost <= limit:
            beyond = [j for j in range(i, len(plans)) if plans[j].drift <= DRIFT_MAX]
            return max(i, max(beyond, default=i))
    return len(plans) - 1


def _steps(site: str, row: Sequence[Option], corners: Sequence[int]) -> list[_Step]:
    return [
        _Step(site, j, row[i].cost - row[j].cost, row[j].damage - row[i].damage)
        for i, j in pairwise(corners)
    ]


def _price(row: Sequence[Option], i: int, j: int) -> float:
    """Damage per unit of cost saved from option i to the cheaper option j."""
    return (row[j].damage - row[i].damage) / (row[i].cost - row[j].cost)


def _walk(options: Options, steps: Sequence[_Step]) -> list[Plan]:
    """Take the steps one after another, from all sites dense."""
    at = dict.fromkeys(options, 0)

    def plan() -> Plan:
        chosen = {site: row[at[site]] for site, row in options.items()}
        return Plan(
            {site: option.format for site, option in chosen.items()},
            math.fsum(option.cost for option in chosen.values()),
            math.fsum(option.damage for option in chosen.values()),
        )

    plans = [plan()]
    for step in steps:
        at[step.site] = step.to
        plans.append(plan())
    return plans
