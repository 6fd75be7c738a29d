"""Are budgets kept? 1,000 random ones on MiniLM and on ResNet-18, checked in another process.

    python -m benchmarks.budgets [--minilm folder] [--resnet18 folder]

For each network a copy of its library is timed in fresh processes (`t3c.runtime.record`), as
`t3c bench --record` does. Then random budgets (tuples of latency, stored and working bytes) pick
profiles, and one more process times all profiles: a profile whose p95 there is above a budget that
picked it is a profile violation, a call above it an inference violation. The same budgets are
called once each in this process, too. Results go to benchmarks/budgets.json; two minutes.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.libraries import NAMES, inputs, library, one_thread

HERE = Path(__file__).resolve().parent
TOKENS, PAIRS = 1000, 10_000
PROCESSES, CALLS, CHECK_CALLS = 5, 40, 200
"""Of the record; calls of each profile in each; of the checking process."""
PERCENTILE = 95


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in NAMES:
        parser.add_argument(f"--{name}", type=Path, help="lowered before; else kept in build/")
    options = parser.parse_args()
    one_thread()
    from benchmarks import machine

    found = machine.describe()
    found["networks"] = {}
    for name in NAMES:
        folder = library(name, getattr(options, name))
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copytree(folder, Path(scratch) / "net")
            found["networks"][name] = run(name, Path(scratch) / "net")
        print(json.dumps({name: found["networks"][name]}, indent=1), flush=True)
    (HERE / "budgets.json").write_text(json.dumps(found, indent=1) + "\n")


def run(name: str, folder: Path) -> dict[str, Any]:
    """Everything for one network."""
    import t3c
    from t3c.runtime import record

    artifact = t3c.Artifact.read(folder)
    values = [value.numpy() for value in inputs(name)[0]]
    given = {spec.name: v for spec, v in zip(artifact.manifest.inputs, values, strict=True)}
    artifact = record.record(artifact, given, processes=PROCESSES, calls=CALLS, threads=1)
    session = t3c.load(artifact, hashes=False, threads=1)
    draw = random.Random(0)
    budgets = [token(draw, session.profiles) for _ in range(TOKENS)]
    check = record.samples(artifact, given, CHECK_CALLS, threads=1)
    return {
        "recorded_p95_ms": {p.name: p.latency_ms for p in session.profiles},
        "checked_p95_ms": {n: _p95(s) for n, s in check.seconds.items()},
        "recorded_over_checked": _ratios(session, check.seconds),
        **kept(session, budgets, check.seconds),
        "calls_in_this_process": live(session, budgets, values),
        "infeasible": infeasible(session, budgets),
        "selection_us": selection(session, budgets),
        "monotonicity": monotone(session, draw),
        "differs_from_exhaustive_search": exhaustive(session, budgets),
    }


def token(draw: random.Random, profiles: Any) -> Any:
    """A budget: latency, and now and then bytes beside or instead; some below the smallest."""
    import t3c

    limits: dict[str, Any] = {}
    columns: dict[str, Callable[[Any], float]] = {
        "latency_ms": lambda p: p.latency_ms,
        "size_mb": lambda p: p.storage_bytes / 1e6,
        "ram_mb": lambda p: p.ram_bytes / 1e6,
    }
    names = (
        ["latency_ms"] if draw.random() < 0.5 else draw.sample(list(columns), draw.randint(1, 3))
    )
    for name in names:
        low, high = columns[name](profiles[0]), columns[name](profiles[-1])
        limits[name] = draw.uniform(0.95 * low, 1.05 * high)
    return t3c.Budget(**limits)


def kept(session: Any, budgets: list[Any], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Violations of both kinds, by what another process measured."""
    p95 = {name: _p95(values) for name, values in seconds.items()}
    picked: dict[str, int] = {}
    over, limited, shares, calls = 0, 0, [], 0
    for budget in budgets:
        told = session.explain(budget)
        if told.profile is None:
            continue
        picked[told.profile] = picked.get(told.profile, 0) + 1
        profile = next(p for p in session.profiles if p.name == told.profile)
        sizes = (budget.size_mb, profile.storage_bytes), (budget.ram_mb, profile.ram_bytes)
        bytes_over = any(limit is not None and size / 1e6 > limit for limit, size in sizes)
        limit = budget.latency_ms
        over += bytes_over or (limit is not None and p95[told.profile] > limit)
        if limit is not None:
            limited += 1
            calls += len(seconds[told.profile])
            shares.append(sum(s * 1e3 > limit for s in seconds[told.profile]))
    return {
        "budgets": len(budgets),
        "feasible": sum(picked.values()),
        "picked": picked,
        "profile_violations": over,
        "inference_violations": {
            "budgets": limited,
            "share": sum(shares) / calls,
            "worst_share_of_a_budget": max(shares) / CHECK_CALLS,
            "allowed": _allowed(calls // max(1, limited) * len(picked)),
        },
    }


def live(session: Any, budgets: list[Any], values: list[Any]) -> dict[str, Any]:
    """One call for each feasible budget, right after the switch."""
    import t3c

    over = calls = 0
    for _ in range(20):
        session(*values)
    for budget in budgets:
        try:
            session.set_budget(**budget.components)
        except t3c.InfeasibleBudget:
            continue
        begin = time.perf_counter()
        session(*values)
        milliseconds = (time.perf_counter() - begin) * 1e3
        if budget.latency_ms is not None:
            calls += 1
            over += milliseconds > budget.latency_ms
    return {"calls": calls, "share_over": over / calls, "allowed": _allowed(calls)}


def infeasible(session: Any, budgets: list[Any]) -> dict[str, int]:
    """Refused budgets, and how many of the named minima then succeed."""
    import t3c

    refused = succeed = named = 0
    for budget in budgets:
        try:
            session.set_budget(**budget.components)
        except t3c.InfeasibleBudget as error:
            refused += 1
            named += bool(error.failing)
            succeed += session.set_budget(**error.minimum).name in session.variants
    return {"refused": refused, "failing_components_named": named, "minimum_succeeds": succeed}


def selection(session: Any, budgets: list[Any]) -> dict[str, float]:
    """Median and p95 microseconds of `set_budget`: making the budget, finding, switching."""
    import numpy as np

    feasible = [b.components for b in budgets if session.explain(b).profile is not None]
    seconds = []
    for limits in feasible * 5:
        begin = time.perf_counter()
        session.set_budget(**limits)
        seconds.append(time.perf_counter() - begin)
    median, p95 = np.percentile(seconds, (50, 95)) * 1e6
    return {"median": float(median), "p95": float(p95)}


def monotone(session: Any, draw: random.Random) -> dict[str, int]:
    """Pairs in which the larger budget picked a smaller profile, or a site's rank or bits fell."""
    import t3c

    selector = t3c_selector(session)

    def index(budget: Any) -> int:
        try:
            return int(selector.index(budget))
        except t3c.InfeasibleBudget:
            return -1

    smaller = sites = 0
    for _ in range(PAIRS):
        low = token(draw, session.profiles)
        more = {
            n: v * draw.choice([1.0, draw.uniform(1.0, 1.5)]) for n, v in low.components.items()
        }
        i, j = index(low), index(t3c.Budget(**more))
        smaller += i > j
        if 0 <= i and 0 <= j:
            sites += not _at_most(session.profiles[i], session.profiles[j])
    return {"pairs": PAIRS, "smaller_profile": smaller, "smaller_format_of_a_site": sites}


def exhaustive(session: Any, budgets: list[Any]) -> int:
    """Budgets for which a search through all profiles finds another one."""
    from t3c.core.budget import costs

    differ = 0
    for budget in budgets:
        fits = [
            p.name
            for p in session.profiles
            if all(costs(p)[n] <= limit for n, limit in budget.components.items())
        ]
        differ += session.explain(budget).profile != (fits[-1] if fits else None)
    return differ


def t3c_selector(session: Any) -> Any:
    """The session's way to find profiles."""
    from t3c.core.budget import Selector

    return Selector(session.manifest.chain)


def _at_most(small: Any, large: Any) -> bool:
    from t3c.core.formats import at_most

    return all(at_most(fmt, large.formats[site]) for site, fmt in small.formats.items())


def _p95(seconds: list[float]) -> float:
    import numpy as np

    return float(np.percentile(seconds, PERCENTILE) * 1e3)


def _ratios(session: Any, seconds: dict[str, list[float]]) -> dict[str, float]:
    """How far the record is on the safe side: recorded over checked p95."""
    found = sorted(p.latency_ms / _p95(seconds[p.name]) for p in session.profiles)
    return {"least": found[0], "median": found[len(found) // 2], "most": found[-1]}


def _allowed(calls: int) -> float:
    """1 - percentile and two standard errors of such a share over so many calls."""
    share = 1 - PERCENTILE / 100
    return share + 2 * math.sqrt(share * (1 - share) / calls)


if __name__ == "__main__":
    main()
