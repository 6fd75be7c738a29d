"""Recorded costs on the safe side: a budget that trusts them shall not be exceeded."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from t3c.core.manifest import CompiledProfile
from t3c.core.profile import Energy, Profile, Timing

STUDENT_99 = (31.821, 6.965, 4.541, 3.747, 3.365, 3.143, 2.998, 2.896, 2.821, 2.764)
"""99 % points of Student's t with 1 to 10 degrees of freedom.

Source: tables of the t distribution (NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2).
"""
RUNS = range(3, len(STUDENT_99) + 2)
"""So many runs give a limit for the next one."""


def next_run(values: Sequence[float]) -> float:
    """What the next run of a measurement stays below, with 99 %, from some that are alike.

    The prediction limit of a normal variable, of the logarithms: runs in processes of their own
    differ by factors (where pages lie, how the clock runs). It is at least the largest value.

    Args:
        values: One positive number for each run, 3 to 11 of them.

    Raises:
        ValueError: Fewer or more runs, or a value that is not positive and finite.

    Source: Hahn and Meeker, Statistical Intervals (1991), section 4.8: mean + t s sqrt(1 + 1/n).
    """
    count = len(values)
    if count not in RUNS:
        raise ValueError(f"{count} runs; {RUNS.start} to {RUNS.stop - 1} give a limit")
    if not all(0.0 < value < math.inf for value in values):
        raise ValueError(f"runs took {list(values)}; each must be positive and finite")
    logs = [math.log(value) for value in values]
    mean = math.fsum(logs) / count
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in logs) / (count - 1))
    limit = math.exp(mean + STUDENT_99[count - 2] * spread * math.sqrt(1.0 + 1.0 / count))
    return max(limit, *values)


def increasing(profiles: Sequence[CompiledProfile]) -> tuple[CompiledProfile, ...]:
    """Raise each cost to the running maximum along the chain, so that budgets are conservative."""

    def join(small: Profile, large: Profile) -> Profile:
        return replace(
            large,
            storage_bytes=max(small.storage_bytes, large.storage_bytes),
            ram_bytes=max(small.ram_bytes, large.ram_bytes),
            latency=_slower(small.latency, large.latency),
            energy=_hungrier(small.energy, large.energy),
        )

    costs = list(accumulate((c.profile for c in profiles), join))
    return tuple(replace(c, profile=p) for c, p in zip(profiles, costs, strict=True))


def _slower(small: Timing | None, large: Timing | None) -> Timing | None:
    if small is None or large is None:
        return large
    if large.low_s is None:  # what budgets compare of the smaller one, its interval included
        p50 = max(small.limit_s("p50"), large.p50_s)
        return replace(large, p50_s=p50, p95_s=max(p50, small.limit_s("p95"), large.p95_s))
    p50 = max(small.p50_s, large.p50_s)
    high = max(small.limit_s("p50"), large.limit_s("p50"))
    return replace(large, p50_s=p50, p95_s=max(p50, small.p95_s, large.p95_s), high_s=high)


def _hungrier(small: Energy | None, large: Energy | None) -> Energy | None:
    if small is None or large is None or small.label is not large.label:
        return large
    return replace(large, joules=max(small.joules, large.joules))
