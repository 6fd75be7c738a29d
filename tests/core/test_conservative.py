"""Limits for the next run hold as often as they say."""

import math
import random

import pytest

from t3c.core.conservative import RUNS, next_run


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


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_values_that_are_no_times_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        next_run([1.0, value, 1.0])
