"""Why a budget picks the profile it picks: what each limit leaves, and which one binds."""

import math
from dataclasses import dataclass
from typing import Any

from t3c.core.budget import COSTS, DRIFT, LEVEL, Budget, Selector, costs, drift_bound
from t3c.core.errors import InfeasibleBudget
from t3c.core.profile import Label, Profile


@dataclass(frozen=True, slots=True)
class Limit:
    """One component of a budget.

    Attributes:
        component: Its name, with the unit.
        limit: What the budget allows.
        cost: What the profile picked costs; of an infeasible budget, the smallest feasible value;
            None where nothing states it.
        next_cost: What the next profile would cost (see `Explanation.next`); None without one.
        binding: Whether this limit keeps the next profile from being picked; of an infeasible
            budget, whether this component fails.
    """

    component: str
    limit: float
    cost: float | None
    next_cost: float | None
    binding: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a budget picks, and why.

    Attributes:
        budget: The budget.
        profile: Name of the profile picked; None: infeasible.
        next: The next larger profile, which is not picked (with a limit of drift alone: the next
            smaller one); None where there is none, so that nothing binds.
        limits: One row for each component.
        message: The error of an infeasible budget; else empty.
        doubts: What the profile picked states without a measurement, a sentence each.
    """

    budget: Budget
    profile: str | None
    next: str | None
    limits: tuple[Limit, ...]
    message: str = ""
    doubts: tuple[str, ...] = ()

    @property
    def binding(self) -> tuple[str, ...]:
        """Names of the limits that bind; of an infeasible budget those that fail."""
        return tuple(row.component for row in self.limits if row.binding)

    def __str__(self) -> str:
        """A sentence."""
        if self.profile is None:
            return self.message
        if self.next is None:
            return f"{self.profile!r} is the last profile of the chain: no limit binds"
        reasons = ", ".join(
            f"{row.component}={row.limit:g} (it has {row.next_cost:g})"
            for row in self.limits
            if row.binding and row.next_cost is not None
        )
        return f"{self.profile!r}, not {self.next!r}, because of {reasons}"

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs; null where nothing states a value."""
        return {
            "profile": self.profile,
            "next": self.next,
            "binding": list(self.binding),
            "limits": [
                {
                    "component": row.component,
                    "limit": row.limit,
                    "cost": _finite(row.cost),
                    "next_cost": _finite(row.next_cost),
                    "binding": row.binding,
                }
                for row in self.limits
            ],
            "message": self.message,
            "doubts": list(self.doubts),
        }


def explain(selector: Selector, budget: Budget) -> Explanation:
    """Why `selector` picks what it picks for `budget`; infeasible ones are explained, too."""
    limits = budget.components
    try:
        index = selector.index(budget)
    except InfeasibleBudget as error:
        rows = tuple(
            Limit(name, limit, error.minimum.get(name), None, name in error.failing)
            for name, limit in limits.items()
        )
        return Explanation(budget, None, None, rows, str(error))
    profiles = selector.chain.profiles
    beside = index + 1 if any(name in COSTS for name in limits) else index - 1
    beyond = profiles[beside] if 0 <= beside < len(profiles) else None
    here = _stated(profiles[index], budget)
    there = None if beyond is None else _stated(beyond, budget)
    rows = tuple(
        Limit(
            name,
            limit,
            here[name],
            None if there is None else there[name],
            there is not None and there[name] > limit,
        )
        for name, limit in limits.items()
    )
    name = None if beyond is None else beyond.name
    found = doubts(profiles[index], budget)
    return Explanation(budget, profiles[index].name, name, rows, doubts=found)


def doubts(profile: Profile, budget: Budget) -> tuple[str, ...]:
    """What a budget compares of a profile that nobody has measured, a sentence each."""
    found = []
    timing, energy = profile.latency, profile.energy
    if budget.latency_ms is not None and timing is not None and timing.label is not Label.MEASURED:
        used = timing.limit_s(budget.percentile) * 1e3
        how = "with no interval known"
        if timing.low_s is not None:
            how = f"the upper end of its 90 % interval from {timing.low_s * 1e3:.4g} ms"
        found.append(
            f"the latency of {profile.name!r} is {timing.label}, not measured: the budget compares "
            f"{used:.4g} ms, {how}; `t3c bench --record` on the device measures it"
        )
    if budget.energy_mj is not None and energy is not None and energy.label is not Label.MEASURED:
        found.append(f"the energy of {profile.name!r} is {energy.label}, not measured")
    return tuple(found)


def _finite(value: float | None) -> float | None:
    return value if value is not None and value < math.inf else None


def _stated(profile: Profile, budget: Budget) -> dict[str, float]:
    """Component -> what the budget compares."""
    level = LEVEL if budget.level is None else budget.level
    drift = drift_bound(profile, budget.drift, level)
    return {**costs(profile, budget.percentile), DRIFT: drift}
