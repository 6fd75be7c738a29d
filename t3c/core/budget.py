"""Budgets, and the largest profile of a chain that keeps one: exact, monotone, in microseconds."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from t3c.core.errors import InfeasibleBudget
from t3c.core.profile import Profile, ProfileChain

Percentile = Literal["p50", "p95"]
PERCENTILES: tuple[Percentile, ...] = ("p50", "p95")
COMPONENTS = ("latency_ms", "energy_mj", "size_mb", "ram_mb")
"""What a budget can limit, in the order of messages."""
_WHY_UNSTATED = {
    "latency_ms": "measure the artifact on its device, or lower with a cost model",
    "energy_mj": "no energy meter was found when the profiles were measured",
}


@final
@dataclass(frozen=True, slots=True)
class Budget:
    """A ceiling on one inference; any non-empty subset of the components. None: not limited.

    Attributes:
        latency_ms: Time of one call at `percentile`, milliseconds.
        energy_mj: Energy of one call, millijoules.
        size_mb: Stored bytes of the weights that the profile reads, megabytes (10^6 bytes).
        ram_mb: Weights, activations and workspace while it runs, megabytes (10^6 bytes).
        percentile: Which percentile of the latency counts: "p95" or "p50".
    """

    latency_ms: float | None = None
    energy_mj: float | None = None
    size_mb: float | None = None
    ram_mb: float | None = None
    percentile: Percentile = "p95"

    def __post_init__(self) -> None:
        """Refuse an empty budget, and values that are not positive finite numbers."""
        for name in COMPONENTS:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} is {value!r}; give a positive number of {name[-2:]}")
            if not 0.0 < value < math.inf:
                raise ValueError(
                    f"{name} is {value}; give a positive, finite number of {name[-2:]}"
                )
        if not self.components:
            raise ValueError(f"an empty budget limits nothing; give one of {', '.join(COMPONENTS)}")
        if self.percentile not in PERCENTILES:
            raise ValueError(
                f"percentile is {self.percentile!r}; allowed are {', '.join(PERCENTILES)}"
            )

    @property
    def components(self) -> dict[str, float]:
        """The limits that are set: name (with its unit) -> value."""
        values = ((name, getattr(self, name)) for name in COMPONENTS)
        return {name: float(value) for name, value in values if value is not None}

    def __str__(self) -> str:
        """The spelled form, for example ``latency_ms=2, size_mb=40``."""
        text = ", ".join(f"{name}={value:g}" for name, value in self.components.items())
        return text if self.percentile == "p95" else f"{text}, percentile={self.percentile}"


def costs(profile: Profile, percentile: Percentile = "p95") -> dict[str, float]:
    """What a budget compares: component -> cost; infinite where nothing states it.

    Args:
        profile: The profile.
        percentile: Which latency.
    """
    latency = math.inf
    if profile.latency is not None:
        timing = profile.latency
        latency = (timing.p95_s if percentile == "p95" else timing.p50_s) * 1e3
    energy = profile.energy_mj
    return {
        "latency_ms": latency,
        "energy_mj": math.inf if energy is None else energy,
        "size_mb": profile.storage_bytes / 1e6,
        "ram_mb": profile.ram_bytes / 1e6,
    }


@final
class Selector:
    """Picks profiles of one chain; everything that does not depend on the budget is precomputed.

    For each component it holds the running minimum of the costs from the largest profile down: the
    last entry that is at most the limit is the largest profile that keeps this component, even if a
    measured cost falls somewhere along the chain.
    """

    def __init__(self, chain: ProfileChain) -> None:
        """Build the tables.

        Args:
            chain: Profiles, smallest first.
        """
        self.chain = chain
        self._costs: dict[str, dict[str, tuple[float, ...]]] = {}
        self._floor: dict[str, dict[str, tuple[float, ...]]] = {}
        for percentile in PERCENTILES:
            table = [costs(profile, percentile) for profile in chain]
            columns = {name: tuple(row[name] for row in table) for name in COMPONENTS}
            self._costs[percentile] = columns
            self._floor[percentile] = {name: _suffix_min(c) for name, c in columns.items()}

    def index(self, budget: Budget) -> int:
        """Position of the largest profile that satisfies every component.

        Raises:
            InfeasibleBudget: No profile does, or a component is limited that no profile states.
        """
        limits = budget.components
        floor, column = self._floor[budget.percentile], self._costs[budget.percentile]
        found = min(bisect_right(floor[name], limit) for name, limit in limits.items()) - 1
        while found >= 0 and any(column[name][found] > limit for name, limit in limits.items()):
            found -= 1
        if found < 0:
            raise self._infeasible(budget, limits)
        return found

    def select(self, budget: Budget) -> Profile:
        """The largest profile that satisfies every component.

        Raises:
            InfeasibleBudget: As `index`.
        """
        return self.chain.profiles[self.index(budget)]

    def _infeasible(self, budget: Budget, limits: Mapping[str, float]) -> InfeasibleBudget:
        """The error, with the profile that needs the least stretch of the budget as the minimum."""
        column = self._costs[budget.percentile]
        unstated = tuple(name for name in limits if min(column[name]) == math.inf)
        stated = {name: limit for name, limit in limits.items() if name not in unstated}

        def stretch(i: int) -> float:
            return max((column[name][i] / limit for name, limit in stated.items()), default=0.0)

        nearest = min(range(len(self.chain)), key=stretch)
        minimum = {name: column[name][nearest] for name in stated}
        if unstated:
            why = "; ".join(f"{name}: {_WHY_UNSTATED[name]}" for name in unstated)
            return InfeasibleBudget(
                f"no profile of this chain states {', '.join(unstated)}, so the budget ({budget}) "
                f"cannot be kept; leave it out ({why})",
                unstated,
                minimum,
            )
        failing = tuple(name for name in stated if min(column[name]) > limits[name])
        failing = failing or tuple(n for n in stated if column[n][nearest] > limits[n])
        wanted = ", ".join(f"{name}={limits[name]:g}" for name in failing)
        smallest = ", ".join(f"{name}={value!r}" for name, value in minimum.items())
        return InfeasibleBudget(
            f"no profile satisfies {wanted}; the smallest feasible budget is {smallest} "
            f"(profile {self.chain.profiles[nearest].name!r})",
            failing,
            minimum,
        )


def select(chain: ProfileChain, budget: Budget) -> Profile:
    """The largest profile of `chain` that satisfies `budget`; keep a `Selector` for many calls.

    Raises:
        InfeasibleBudget: No profile does; names the failing components and the smallest budget
            that would do.
    """
    return Selector(chain).select(budget)


def _suffix_min(values: tuple[float, ...]) -> tuple[float, ...]:
    """Entry i is the least of values[i:]; non-decreasing."""
    out = list(values)
    for i in range(len(out) - 2, -1, -1):
        out[i] = min(out[i], out[i + 1])
    return tuple(out)
