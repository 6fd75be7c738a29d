"""A session governed in closed loop: what calls really take decides the profile of the next one.

`set_budget` trusts the recorded costs. A device that throttles or is shared takes longer than it
recorded: the governor measures every call, leaves a profile when a percentile of the recent calls
would not keep the budget, and comes back when the device recovers (`t3c.runtime.loop` is the law).
"""

import json
import math
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self, final

from t3c.core.budget import Budget, DriftKind, Selector
from t3c.core.errors import InfeasibleBudget
from t3c.core.profile import Profile, ProfileChain
from t3c.runtime.loop import Law, Loop

METER_EVERY_S = 0.1
"""Time between two readings of a meter: counters of processors step every millisecond, so that a
shorter one would be read off by more than a hundredth."""
REVERSAL_S = 10.0
"""A switch that undoes the direction of the one before within this time is a reversal. A load that
is followed down and up again is none, if it lasts that long; longer than all waits of the law, so
that these cannot hide one."""
ENERGY_LAW = Law(window=16, horizon_s=1.0, keep=3, least=3, run=3)
"""Of energies, which come ten times a second."""


class Meter(Protocol):
    """What measures energy."""

    def read(self) -> float:
        """Joules since some moment; rises, and may start over (such a step is left out)."""
        ...


class Governable(Protocol):
    """What the governor needs of a session."""

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """Smallest first."""
        ...

    @property
    def profile(self) -> Profile:
        """The one that a plain call runs."""
        ...

    @property
    def variants(self) -> Mapping[str, Callable[..., Any]]:
        """Profile name -> callable fixed to it."""
        ...

    def set_profile(self, name: str) -> Profile:
        """Make plain calls run another one."""
        ...


def govern(
    session: Governable,
    *,
    latency_ms: float | None = None,
    energy_mj: float | None = None,
    size_mb: float | None = None,
    ram_mb: float | None = None,
    max_drift: float | None = None,
    level: float | None = None,
    drift: DriftKind = "calibrated",
    percentile: float = 95.0,
    meter: Meter | None = None,
    law: Law | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> "Governor":
    """Keep a budget although the device slows down.

    ``with t3c.govern(session, latency_ms=8) as g: y = g(x)``. Inside the block the session's own
    calls follow, too, but only ``g(...)`` is measured; behind it the session has its profile back.

    Args:
        session: A session; its profiles need recorded latencies.
        latency_ms: Milliseconds of one call at the percentile.
        energy_mj: Millijoules of one call, on average, everything that the meter sees included.
        size_mb: Stored weights of the profile, 10^6 bytes: a fixed limit.
        ram_mb: Memory while it runs, 10^6 bytes: a fixed limit.
        max_drift: Bound on the drift of one input: no profile runs whose bound is above, however
            slow the device gets.
        level: Share of inputs that the bound holds for; None: 0.9.
        drift: Which bound of the certificate: "calibrated" or "sound".
        percentile: Share in per cent of recent calls that must keep `latency_ms`, 50 to below 100.
        meter: Anything whose ``read()`` returns joules that rise; needed for `energy_mj`.
        law: Constants of the loop; None: the defaults.
        clock: Seconds that rise.

    Raises:
        InfeasibleBudget: Not even an undisturbed device keeps it; names the smallest budget.
        ValueError: Neither latency nor energy is limited, energy without a meter, or a value that
            is no budget or percentile.
    """
    if latency_ms is None and energy_mj is None:
        raise ValueError("govern needs latency_ms or energy_mj; set_budget keeps sizes by itself")
    if energy_mj is not None and meter is None:
        raise ValueError(
            f"energy_mj={energy_mj:g} needs meter=, an object whose read() returns joules; "
            "set_budget(energy_mj=...) trusts the recorded energies"
        )
    if not 50.0 <= percentile < 100.0:
        raise ValueError(f"percentile is {percentile}; allowed are 50 to below 100")
    budget = Budget(
        latency_ms=latency_ms,
        energy_mj=energy_mj,
        size_mb=size_mb,
        ram_mb=ram_mb,
        percentile="p50" if percentile == 50.0 else "p95",
        max_drift=max_drift,
        level=level,
        drift=drift,
    )
    return Governor(session, budget, percentile, meter, law, clock)


@final
class Governor:
    """Calls a session at the largest profile that keeps the budget now; see `govern`.

    Calls may come from several threads; what they do to each other counts as slowdown. A call asks
    for no memory beyond the session's own but for the numbers that Python boxes.
    """

    def __init__(
        self,
        session: Governable,
        budget: Budget,
        percentile: float = 95.0,
        meter: Meter | None = None,
        law: Law | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Choose the first profile; see `govern` for arguments and errors."""
        profiles = session.profiles
        self.budget, self.percentile = budget, percentile
        self._session, self._meter, self._clock = session, meter, clock
        self._names = tuple(profile.name for profile in profiles)
        self._variants = tuple(session.variants[name] for name in self._names)
        self._latencies = array("d", _latencies(profiles, percentile))
        self._least, self._most = _fixed_limits(profiles, budget)
        least, most = self._least, self._most
        self._limit = budget.latency_ms / 1e3 if budget.latency_ms is not None else None
        self._loop: Loop | None = None
        if self._limit is not None:
            self._loop = Loop(self._latencies, self._limit, percentile, law, most, least)
        self._energy: Loop | None = None
        if meter is not None and budget.energy_mj is not None:
            stated = [p.energy_mj for p in profiles]
            known = [mj for mj in stated if mj is not None]
            self._per_call = array("d", known if len(known) == len(stated) else self._latencies)
            # where no energy is recorded, it goes with time: the factor between is learned
            self._energy = Loop(self._per_call, budget.energy_mj, 50.0, ENERGY_LAW, most, least)
        self._index = most if self._loop is None else self._loop.index
        if self._energy is not None:
            unknown = any(profile.energy_mj is None for profile in profiles)
            self._index = least if unknown else min(self._index, self._energy.index)
        self._lock = threading.Lock()
        self._calls = array("q", bytes(8 * len(profiles)))
        self._seconds = array("d", bytes(8 * len(profiles)))
        self._over = array("q", bytes(8 * len(profiles)))
        self._deadlines = self._missed = self._switches = self._reversals = 0
        self._up, self._switched = False, -math.inf
        self._read_at: float | None = None
        self._joules = self._metered = self._expected = 0.0
        self._metered_calls = self._pending = 0
        self._before: str | None = None

    def __enter__(self) -> Self:
        """Let the session follow; its profile is noted."""
        self._before = self._session.profile.name
        self._session.set_profile(self._names[self._index])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the session its profile back."""
        if self._before is not None:
            self._session.set_profile(self._before)
            self._before = None

    @property
    def profile(self) -> str:
        """Name of the profile that the next call runs."""
        return self._names[self._index]

    @property
    def switches(self) -> int:
        """How often another profile was picked."""
        return self._switches

    @property
    def reversals(self) -> int:
        """Switches that undid the direction of the one before within `REVERSAL_S`."""
        return self._reversals

    @property
    def failed_ups(self) -> int:
        """Switches up that were soon taken back."""
        return sum(x.failed for x in (self._loop, self._energy) if x is not None)

    @property
    def slowdown(self) -> float:
        """Measured over recorded latency at the percentile, of recent calls."""
        return 1.0 if self._loop is None else self._loop.slowdown

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; see `Session.__call__`."""
        return self._timed(self._index, args, kwargs, None)

    def within(self, deadline_ms: float, *args: Any, **kwargs: Any) -> Any:
        """Run the model, this one time within another time.

        The largest profile that is predicted to keep the deadline at the percentile runs, under the
        present slowdown; the smallest if none is, which is counted if it comes late.

        Args:
            deadline_ms: Milliseconds from now on.
            args: As the session takes them.
            kwargs: As the session takes them.

        Raises:
            InfeasibleBudget: Not even an undisturbed device keeps it.
        """
        limit = Budget(latency_ms=deadline_ms).components["latency_ms"] / 1e3
        if limit < self._latencies[self._least]:
            least = self._latencies[self._least] * 1e3
            raise InfeasibleBudget(
                f"no profile takes {deadline_ms:g} ms or less; the smallest feasible budget is "
                f"latency_ms={least!r} (profile {self._names[self._least]!r})",
                ("latency_ms",),
                {"latency_ms": least},
            )
        factor = self.slowdown
        index = self._most if self._energy is None else min(self._most, self._energy.index)
        while index > self._least and self._latencies[index] * factor > limit:
            index -= 1
        return self._timed(index, args, kwargs, limit)

    def _timed(
        self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], deadline: float | None
    ) -> Any:
        if self._meter is not None and self._read_at is None:
            self._read_at, self._joules = self._clock(), self._meter.read()
        start = self._clock()
        result = self._variants[index](*args, **kwargs)
        now = self._clock()
        with self._lock:
            self._observe(index, now, now - start, deadline)
        return result

    def _observe(self, index: int, now: float, seconds: float, deadline: float | None) -> None:
        """Count one call and choose the profile of the next."""
        self._calls[index] += 1
        self._seconds[index] += seconds
        limit = self._limit
        if deadline is not None:
            self._deadlines += 1
            self._missed += seconds > deadline
        elif limit is not None:
            self._over[index] += seconds > limit
        wanted = self._most
        if self._loop is not None:
            wanted = self._loop.observe(now, seconds / self._latencies[index])
        if self._meter is not None:
            wanted = min(wanted, self._read(index, now, self._meter))
        if wanted != self._index:
            up = wanted > self._index
            self._reversals += up != self._up and now - self._switched <= REVERSAL_S
            self._up, self._switched, self._index = up, now, wanted
            self._switches += 1
            if self._before is not None:
                self._session.set_profile(self._names[wanted])

    def _read(self, index: int, now: float, meter: Meter) -> int:
        """Add a call to the present interval of the meter; the profile that its budget allows."""
        loop = self._energy
        self._pending += 1
        if loop is not None:
            self._expected += self._per_call[index]
        if self._read_at is not None and now - self._read_at >= METER_EVERY_S:
            joules = meter.read()
            used = joules - self._joules
            if used > 0.0:
                self._metered += used
                self._metered_calls += self._pending
                if loop is not None:
                    loop.observe(now, used * 1e3 / self._expected)
            self._read_at, self._joules = now, joules
            self._expected, self._pending = 0.0, 0
        if loop is None:
            return self._most
        return loop.index if self._metered_calls else self._index

    def statistics(self) -> dict[str, Any]:
        """What happened so far, as JSON takes it; times in seconds, energy in joules.

        ``slowdown`` is measured over recorded latency at the percentile, ``predicted_s`` what the
        present profile takes at it now; ``over_budget`` counts calls without a deadline of their
        own. ``reversals`` are switches against the direction of the one before within
        `REVERSAL_S`: oscillation, where the load did not do the same. ``energy_j`` and
        ``energy_calls`` belong together; null without a meter.
        """
        with self._lock:
            loop = self._loop
            calls = sum(self._calls) - self._deadlines
            over = sum(self._over)
            return {
                "budget": self.budget.components,
                "percentile": self.percentile,
                "profile": self.profile,
                "slowdown": self.slowdown,
                "predicted_s": None if loop is None else loop.predicted(self._index),
                "saturated": bool(loop is not None and loop.saturated),
                "calls": sum(self._calls),
                "over_budget": over,
                "over_budget_share": over / calls if calls and loop is not None else None,
                "switches": self._switches,
                "reversals": self._reversals,
                "failed_ups": self.failed_ups,
                "deadlines": self._deadlines,
                "deadlines_missed": self._missed,
                "energy_j": None if self._meter is None else self._metered,
                "energy_calls": None if self._meter is None else self._metered_calls,
                "profiles": {
                    name: {"calls": n, "seconds": s, "over_budget": v}
                    for name, n, s, v in zip(
                        self._names, self._calls, self._seconds, self._over, strict=True
                    )
                },
            }

    def json(self) -> str:
        """`statistics` as text."""
        return json.dumps(self.statistics(), allow_nan=False)

    def prometheus(self, labels: Mapping[str, str] | None = None) -> str:
        """`statistics` in Prometheus' text format.

        Args:
            labels: Added to every line, for example ``{"model": "minilm"}``.

        Source: Prometheus documentation, Exposition formats, text-based format 0.0.4.
        """
        found, fixed = self.statistics(), {} if labels is None else dict(labels)
        text = _Exposition(fixed)
        by_profile = found["profiles"].items()
        for name, key, what in (
            ("calls_total", "calls", "Calls."),
            ("call_seconds_total", "seconds", "Time in calls, seconds."),
            ("over_budget_total", "over_budget", "Calls over the latency budget."),
        ):
            rows = [({"profile": profile}, row[key]) for profile, row in by_profile]
            text.add(name, "counter", what, rows)
        for name, key, what in (
            ("switches_total", "switches", "Switches of the profile."),
            ("reversals_total", "reversals", "Switches that soon undid the direction of the last."),
            ("failed_ups_total", "failed_ups", "Switches up that were soon taken back."),
            ("deadlines_total", "deadlines", "Calls with a deadline of their own."),
            ("deadlines_missed_total", "deadlines_missed", "Of these, late ones."),
        ):
            text.add(name, "counter", what, [({}, found[key])])
        text.add("slowdown", "gauge", "Measured over recorded latency.", [({}, found["slowdown"])])
        text.add("saturated", "gauge", "1: no profile fits now.", [({}, int(found["saturated"]))])
        now = [({"profile": name}, int(name == found["profile"])) for name in self._names]
        text.add("profile", "gauge", "1 for the profile of the next call.", now)
        limits = [({"component": name}, value) for name, value in found["budget"].items()]
        text.add("budget", "gauge", "Limits, in the unit of their name.", limits)
        if found["predicted_s"] is not None:
            rows = [({"percentile": f"{self.percentile:g}"}, found["predicted_s"])]
            text.add("predicted_seconds", "gauge", "Latency now at the percentile.", rows)
        if found["energy_j"] is not None:
            text.add("energy_joules_total", "counter", "Energy.", [({}, found["energy_j"])])
        return str(text)


class _Exposition:
    """Lines of Prometheus' text format."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self._lines: list[str] = []

    def add(
        self, name: str, kind: str, what: str, rows: Sequence[tuple[Mapping[str, str], float]]
    ) -> None:
        """One metric with its help, type and values."""
        self._lines += [f"# HELP t3c_governor_{name} {what}", f"# TYPE t3c_governor_{name} {kind}"]
        for own, value in rows:
            pairs = [f'{k}="{_escaped(v)}"' for k, v in {**self._labels, **own}.items()]
            inside = f"{{{','.join(pairs)}}}" if pairs else ""
            self._lines.append(f"t3c_governor_{name}{inside} {value!r}")

    def __str__(self) -> str:
        return "\n".join([*self._lines, ""])


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _latencies(profiles: Sequence[Profile], percentile: float) -> list[float]:
    """Recorded seconds of each profile: the median for percentile 50, else the 95th percentile.

    Raises:
        InfeasibleBudget: A profile has none.
    """
    found = []
    for profile in profiles:
        if profile.latency is None:
            raise InfeasibleBudget(
                f"profile {profile.name!r} states no latency, so slowdown cannot be told; measure "
                "the artifact on its device, or lower with a cost model",
                ("latency_ms",),
                {},
            )
        timing = profile.latency
        found.append(timing.p50_s if percentile == 50.0 else timing.p95_s)
    return found


def _fixed_limits(profiles: Sequence[Profile], budget: Budget) -> tuple[int, int]:
    """Smallest and largest profile within the limits that nothing slows down.

    Raises:
        InfeasibleBudget: As `Selector.index`, for an undisturbed device.
    """
    selector = Selector(ProfileChain(tuple(profiles)))
    unstated = any(profile.energy_mj is None for profile in profiles)
    whole = replace(budget, energy_mj=None) if unstated and _others(budget) else budget
    if whole.energy_mj is None or not unstated:
        selector.index(whole)
    least, most = 0, len(profiles) - 1
    if budget.max_drift is not None:
        alone = replace(budget, latency_ms=None, energy_mj=None, size_mb=None, ram_mb=None)
        least = selector.index(alone)
    if budget.size_mb is not None or budget.ram_mb is not None:
        sizes = replace(budget, latency_ms=None, energy_mj=None, max_drift=None, level=None)
        most = selector.index(sizes)
    return least, most


def _others(budget: Budget) -> bool:
    return any(name != "energy_mj" for name in budget.components)
