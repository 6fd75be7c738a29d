"""Budgets, and the profile of a chain that keeps one: exact, monotone, in microseconds.

Costs rise along a chain and drift falls. Under limits of costs the largest profile that keeps them
all is picked, so more budget never picks a smaller one. A limit of drift beside them picks no other
profile: it refuses the one found where that one's bound is above. A limit of drift alone picks the
smallest profile whose bound keeps it, so more drift never picks a larger one.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, final, get_args

from t3c.core.errors import InfeasibleBudget
from t3c.core.profile import Percentile, Profile, ProfileChain

PERCENTILES: tuple[Percentile, ...] = ("p50", "p95")
DriftKind = Literal["calibrated", "sound"]
DRIFT_KINDS: tuple[DriftKind, ...] = get_args(DriftKind)
LEVEL = 0.9
"""The level of calibrated bounds that a budget compares unless it names another."""
COSTS = ("latency_ms", "energy_mj", "size_mb", "ram_mb")
"""Costs that a budget can limit, in the order of messages."""
DRIFT = "max_drift"
COMPONENTS = (*COSTS, DRIFT)
"""What a budget can limit."""
_WHY_UNSTATED = {
    "latency_ms": "measure the artifact on its device, or lower with a cost model",
    "energy_mj": "no energy meter was found when the profiles were measured",
}


@final
@dataclass(frozen=True, slots=True)
class Budget:
    """A ceiling on one inference; any non-empty subset of the components. None: not limited.

    Drift ||dz||_2 is that of the outputs against the original model's, for one input.

    Attributes:
        latency_ms: Time of one call at `percentile`, milliseconds.
        energy_mj: Energy of one call, millijoules.
        size_mb: Stored bytes of the weights that the profile reads, megabytes (10^6 bytes).
        ram_mb: Weights, activations and workspace while it runs, megabytes (10^6 bytes).
        percentile: Which percentile of the latency counts: "p95" or "p50".
        max_drift: What the certificate's bound on the drift may be, in the unit of the outputs.
        level: Share of inputs that the calibrated bound holds for; None: 0.9.
        drift: Which bound of the certificate counts: "calibrated" or "sound".
    """

    latency_ms: float | None = None
    energy_mj: float | None = None
    size_mb: float | None = None
    ram_mb: float | None = None
    percentile: Percentile = "p95"
    max_drift: float | None = None
    level: float | None = None
    drift: DriftKind = "calibrated"

    def __post_init__(self) -> None:
        """Refuse an empty budget, and values that are not positive finite numbers."""
        for name in COMPONENTS:
            value = getattr(self, name)
            if value is None:
                continue
            unit = "L2 distance of outputs" if name == DRIFT else name[-2:]
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} is {value!r}; give a positive number of {unit}")
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name} is {value}; give a positive, finite number of {unit}")
        if not self.components:
            raise ValueError(f"an empty budget limits nothing; give one of {', '.join(COMPONENTS)}")
        if self.percentile not in PERCENTILES:
            raise ValueError(
                f"percentile is {self.percentile!r}; allowed are {', '.join(PERCENTILES)}"
            )
        self._check_drift()

    def _check_drift(self) -> None:
        """Refuse a level or a kind of bound that says nothing."""
        if self.drift not in DRIFT_KINDS:
            raise ValueError(f"drift is {self.drift!r}; allowed are {', '.join(DRIFT_KINDS)}")
        if self.level is None:
            return
        number = isinstance(self.level, (int, float))  # pyright: ignore[reportUnnecessaryIsInstance]
        if isinstance(self.level, bool) or not number:
            raise TypeError(f"level is {self.level!r}; give a share, for example 0.9")
        if not 0.0 < self.level < 1.0:
            raise ValueError(
                f"level is {self.level}; give a share above 0 and below 1, for example 0.9"
            )
        if self.max_drift is None:
            raise ValueError(f"level={self.level:g} without max_drift limits nothing; give both")
        if self.drift != "calibrated":
            raise ValueError(
                f"level={self.level:g} with drift={self.drift!r}: that bound holds for every input "
                "of its domain; leave level out"
            )

    @property
    def components(self) -> dict[str, float]:
        """The limits that are set: name (with its unit) -> value."""
        values = ((name, getattr(self, name)) for name in COMPONENTS)
        return {name: float(value) for name, value in values if value is not None}

    @property
    def costs(self) -> dict[str, float]:
        """The costs among them."""
        values = ((name, getattr(self, name)) for name in COSTS)
        return {name: float(value) for name, value in values if value is not None}

    def __str__(self) -> str:
        """The spelled form, for example ``latency_ms=2, size_mb=40``."""
        text = ", ".join(f"{name}={value:g}" for name, value in self.components.items())
        if self.max_drift is not None:
            text += f" ({_bound_name(self)})"
        return text if self.percentile == "p95" else f"{text}, percentile={self.percentile}"


def costs(profile: Profile, percentile: Percentile = "p95") -> dict[str, float]:
    """What a budget compares: component -> cost; infinite where nothing states it.

    A predicted latency is the upper end of its interval, where it has one.

    Args:
        profile: The profile.
        percentile: Which latency.
    """
    latency = math.inf
    if profile.latency is not None:
        latency = profile.latency.limit_s(percentile) * 1e3
    energy = profile.energy_mj
    return {
        "latency_ms": latency,
        "energy_mj": math.inf if energy is None else energy,
        "size_mb": profile.storage_bytes / 1e6,
        "ram_mb": profile.ram_bytes / 1e6,
    }


def drift_bound(profile: Profile, kind: DriftKind = "calibrated", level: float = LEVEL) -> float:
    """The bound of a kind on a profile's drift; infinite where its certificate states none.

    Args:
        profile: The profile.
        kind: Which statement of the certificate.
        level: Of a calibrated bound.
    """
    found = profile.certificate
    if kind == "sound":
        return math.inf if found.sound is None else found.sound.value
    bound = None if found.calibrated is None else found.calibrated.at(level)
    return math.inf if bound is None else bound.value


@final
class Selector:
    """Picks profiles of one chain; everything that does not depend on the budget is precomputed.

    For each cost it holds the running minimum from the largest profile down: the last entry that
    is at most the limit is the largest profile that keeps this component, even if a measured cost
    falls somewhere along the chain. For each bound on drift it holds the running maximum, largest
    profile first: so many profiles, counted from the largest, keep a limit.
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
            columns = {name: tuple(row[name] for row in table) for name in COSTS}
            self._costs[percentile] = columns
            self._floor[percentile] = {name: _suffix_min(c) for name, c in columns.items()}
        self._levels = _levels(chain)
        self._drift = {level: self._raised("calibrated", level) for level in self._levels}
        self._sound = self._raised("sound", LEVEL)
        self._none = (math.inf,) * len(chain)

    def _raised(self, kind: DriftKind, level: float) -> tuple[float, ...]:
        """Bounds, largest profile first, each at least that of every larger profile."""
        falling = self.chain.profiles[::-1]
        return tuple(accumulate((drift_bound(p, kind, level) for p in falling), max))

    def index(self, budget: Budget) -> int:
        """Position of the profile to run: the largest that keeps every cost.

        Where drift alone is limited, the smallest whose bound keeps it.

        Raises:
            InfeasibleBudget: No profile does, its bound on drift is above the limit, or a component
                is limited that no profile states.
        """
        found = self._find(budget)
        if found < 0:
            raise self._infeasible(budget)
        return found

    def _find(self, budget: Budget) -> int:
        """As `index`; -1 where it raises."""
        limits, drift = budget.costs, budget.max_drift
        found = self._largest(budget.percentile, limits) if limits else 0
        if drift is None or found < 0:
            return found
        bounds = self._bounds(budget)
        smallest = len(bounds) - bisect_right(bounds, drift)  # whose bound keeps it
        if limits:
            return found if found >= smallest else -1
        return smallest if smallest < len(bounds) else -1

    def select(self, budget: Budget) -> Profile:
        """The profile at `index`.

        Raises:
            InfeasibleBudget: As `index`.
        """
        return self.chain.profiles[self.index(budget)]

    def _largest(self, percentile: Percentile, limits: Mapping[str, float]) -> int:
        """The largest profile that keeps every cost; -1 where none does."""
        floor, column = self._floor[percentile], self._costs[percentile]
        found = min(bisect_right(floor[name], limit) for name, limit in limits.items()) - 1
        while found >= 0 and any(column[name][found] > limit for name, limit in limits.items()):
            found -= 1
        return found

    def _bounds(self, budget: Budget) -> tuple[float, ...]:
        """Bounds on drift of what the budget compares, largest profile first."""
        if budget.drift == "sound":
            return self._sound
        return self._drift.get(LEVEL if budget.level is None else budget.level, self._none)

    def _infeasible(self, budget: Budget) -> InfeasibleBudget:
        """The error, with what the budget needs at least."""
        limits = budget.components
        column = dict(self._costs[budget.percentile])
        if budget.max_drift is not None:
            column[DRIFT] = self._bounds(budget)[::-1]
        unstated = tuple(name for name in limits if min(column[name]) == math.inf)
        if unstated:
            return self._unstated(budget, column, unstated)
        within = len(self.chain) - 1
        if budget.costs:
            within = self._largest(budget.percentile, budget.costs)
        return (
            self._drifts(budget, column, within) if within >= 0 else self._expensive(budget, column)
        )

    def _unstated(
        self, budget: Budget, column: Mapping[str, tuple[float, ...]], unstated: tuple[str, ...]
    ) -> InfeasibleBudget:
        """No profile states what is limited."""
        stated = {n: limit for n, limit in budget.components.items() if n not in unstated}
        nearest = _nearest(column, stated, range(len(self.chain)))
        why = "; ".join(f"{name}: {self._why_unstated(name, budget)}" for name in unstated)
        return InfeasibleBudget(
            f"no profile of this chain states {', '.join(unstated)}, so the budget ({budget}) "
            f"cannot be kept; leave it out ({why})",
            unstated,
            {name: column[name][nearest] for name in stated},
        )

    def _why_unstated(self, name: str, budget: Budget) -> str:
        if name != DRIFT:
            return _WHY_UNSTATED[name]
        if budget.drift == "sound":
            return "no profile has a finite sound bound; lower with domain= for one"
        if not self._levels:
            return "there are no calibrated bounds; make them with `t3c certify` on held-out inputs"
        known = ", ".join(f"{level:g}" for level in self._levels)
        level = LEVEL if budget.level is None else budget.level
        if level not in self._levels:
            return f"calibrated bounds are at levels {known}, not at {level:g}; certify at it"
        least = math.ceil(level / (1 - level) - 1e-9)
        return f"a finite bound at level {level:g} needs {least} held-out inputs; certify with more"

    def _drifts(
        self, budget: Budget, column: Mapping[str, tuple[float, ...]], within: int
    ) -> InfeasibleBudget:
        """Costs can be kept, by the profile at `within` at most; the drift cannot, beside them."""
        limits, bounds = budget.components, column[DRIFT]
        finite = [i for i, bound in enumerate(bounds) if bound < math.inf]
        nearest = within if within in finite else _nearest(column, limits, finite)
        minimum = {name: column[name][nearest] for name in limits}
        beside = f" within {_spelled(budget.costs)}" if budget.costs else ""
        text = (
            f"no profile satisfies {DRIFT}={limits[DRIFT]:g} ({_bound_name(budget)}){beside}; the "
            f"smallest feasible is {_exact(minimum)} (profile {self._name(nearest)!r})"
        )
        enough = [i for i in finite if bounds[i] <= limits[DRIFT]]
        if enough:
            costly = _nearest(column, budget.costs, enough)
            needed = {name: column[name][costly] for name in budget.costs}
            text += f"; so little drift needs {_exact(needed)} (profile {self._name(costly)!r})"
        return InfeasibleBudget(text, (DRIFT,), minimum)

    def _expensive(
        self, budget: Budget, column: Mapping[str, tuple[float, ...]]
    ) -> InfeasibleBudget:
        """No profile keeps the costs; of those that keep the drift, the one of least stretch."""
        limits, limit = budget.components, budget.max_drift
        everyone = range(len(self.chain))
        kept = [i for i in everyone if limit is None or column[DRIFT][i] <= limit]
        among = kept if kept else everyone
        nearest = _nearest(column, limits, among)
        failing = tuple(n for n in budget.costs if min(column[n][i] for i in among) > limits[n])
        failing = failing or tuple(n for n in budget.costs if column[n][nearest] > limits[n])
        failing += () if kept else (DRIFT,)
        beside = f" with {DRIFT}={limit:g} ({_bound_name(budget)})" if limit and kept else ""
        minimum = {name: column[name][nearest] for name in limits}
        return InfeasibleBudget(
            f"no profile satisfies {_spelled({n: limits[n] for n in failing})}{beside}; the "
            f"smallest feasible budget is {_exact(minimum)} (profile {self._name(nearest)!r})",
            failing,
            minimum,
        )

    def _name(self, index: int) -> str:
        return self.chain.profiles[index].name


def select(chain: ProfileChain, budget: Budget) -> Profile:
    """The profile of `chain` that `budget` picks; keep a `Selector` for many calls.

    Raises:
        InfeasibleBudget: No profile does; names the failing components and the smallest budget
            that would do.
    """
    return Selector(chain).select(budget)


def _nearest(
    column: Mapping[str, tuple[float, ...]], limits: Mapping[str, float], among: Iterable[int]
) -> int:
    """The profile that needs the least stretch of the limits; the smallest of equals."""

    def stretch(i: int) -> float:
        return max((column[name][i] / limit for name, limit in limits.items()), default=0.0)

    return min(among, key=stretch)


def _levels(chain: ProfileChain) -> tuple[float, ...]:
    """Levels of calibrated bounds that every profile states, rising."""
    known = [
        {b.level for b in p.certificate.calibrated.bounds} if p.certificate.calibrated else set()
        for p in chain
    ]
    return tuple(sorted(set[float].intersection(*known)))


def _bound_name(budget: Budget) -> str:
    """Which bound of the certificate a budget compares."""
    if budget.drift == "sound":
        return "sound"
    return f"calibrated at {LEVEL if budget.level is None else budget.level:g}"


def _spelled(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in limits.items())


def _exact(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in limits.items())


def _suffix_min(values: tuple[float, ...]) -> tuple[float, ...]:
    """Entry i is the least of values[i:]; non-decreasing."""
    return tuple(accumulate(values[::-1], min))[::-1]
