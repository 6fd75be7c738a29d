"""Limits for the next run hold as often as they say."""

import math
import random
from dataclasses import replace
from itertools import accumulate

import pytest

from t3c.core.budget import PERCENTILES, costs
from t3c.core.conservative import RUNS, increasing, next_run
from t3c.core.profile import Label, Timing
from tests.runtime import toy


@pytest.mark.parametrize("count", [3, 5, 11])
def test_the_next_run_stays_below_the_limit_in_99_of_100_draws(count: int) -> None:
    draw, kept, trials = random.Random(count), 0, 4000
    for _ in range(trials):
        scale, spread = draw.uniform(1e-3, 1.0), draw.uniform(0.005, 0.1)
        runs = [scale * math.exp(draw.gauss(0.0, spread)) for _ in range(count + 1)]
        kept += runs[-1] <= next_run(runs[:-1])
    assert 0.985 <= kept / trials <= 0.996


def test_the_limit_is_never_below_a_run_and_equals_runs_that_agree() -> None:
    assert next_run([2.0, 2.0, 2.0]) == 2.0
    assert next_run([1.0, 1.0, 8.0]) > 8.0
    wide = next_run([1.0, 1.1, 1.2])
    assert next_run([1.0, 1.1, 1.2] * 3) < wide


@pytest.mark.parametrize("count", [0, 2, 12])
def test_too_few_and_too_many_runs_are_refused(count: int) -> None:
    assert count not in RUNS
    with pytest.raises(ValueError, match=f"{count} runs; 3 to 11 give a limit"):
        next_run([1.0] * count)


def test_no_cost_that_budgets_compare_falls_along_a_chain_of_predictions_and_measurements() -> None:
    draw = random.Random(3)
    base = toy.manifest().profiles[0]
    for _ in range(300):
        made = []
        for i in range(4):
            p50 = draw.uniform(1.0, 2.0)
            timing = Timing(p50, draw.uniform(1.0, 1.5) * p50, Label.MEASURED, 9)
            if draw.random() < 0.6:
                ends = (draw.uniform(0.5, 1.0) * p50, draw.uniform(1.0, 2.0) * p50)
                timing = Timing(p50, p50, Label.PREDICTED, None, 1, *ends)
            profile = replace(base.profile, name=str(i), latency=timing)
            made.append(replace(base, profile=profile))
        raised = [c.profile.latency for c in increasing(made)]
        for percentile in PERCENTILES:
            before = [costs(c.profile, percentile)["latency_ms"] for c in made]
            after = [t.limit_s(percentile) * 1e3 for t in raised if t is not None]
            assert after == sorted(after)
            assert after == pytest.approx(list(accumulate(before, max)))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_values_that_are_no_times_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        next_run([1.0, value, 1.0])
