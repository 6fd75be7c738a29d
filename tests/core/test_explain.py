"""An explanation names the limit that binds: without it a larger profile would be picked."""

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from t3c.core.budget import COSTS, Budget, Selector
from t3c.core.errors import InfeasibleBudget
from t3c.core.explain import doubts, explain
from t3c.core.profile import Energy, Label, ProfileChain, Timing
from tests.core.test_budget import chain_of, token


@pytest.mark.parametrize("rising", [True, False])
def test_dropping_what_binds_picks_more_and_dropping_the_rest_changes_nothing(rising: bool) -> None:
    chain, rng = chain_of(1, rising=rising), random.Random(5)
    selector, explained = Selector(chain), 0
    for _ in range(2000):
        budget = token(rng)
        told = explain(selector, budget)
        if told.profile is None:
            with pytest.raises(InfeasibleBudget) as caught:
                selector.index(budget)
            assert told.binding == caught.value.failing
            assert str(told) == str(caught.value)
            continue
        index = selector.index(budget)
        explained += 1
        assert told.profile == chain.profiles[index].name
        if index == len(chain) - 1:
            assert (told.next, told.binding) == (None, ())
            continue
        assert told.next == chain.profiles[index + 1].name
        assert told.binding
        for row in told.limits:
            assert row.cost is not None
            assert row.cost <= row.limit
            assert row.next_cost is not None
            assert row.binding == (row.next_cost > row.limit)
        rest: dict[str, Any] = {name: None for name in told.binding}
        if set(told.binding) != set(budget.components):
            assert selector.index(replace(budget, **rest)) > index
        only: dict[str, Any] = {name: None for name in COSTS if name not in told.binding}
        if rising:
            assert selector.index(replace(budget, **only)) == index
    assert explained > 200


def predicted(low_ms: float | None, high_ms: float | None) -> ProfileChain:
    """A chain of one whose latency is predicted, 2 ms, and whose energy is estimated."""
    ends = (low_ms and low_ms / 1e3, high_ms and high_ms / 1e3)
    profile = replace(
        chain_of(1).profiles[0],
        latency=Timing(2e-3, 2e-3, Label.PREDICTED, None, 1, *ends),
        energy=Energy(1e-3, Label.ESTIMATED),
    )
    return ProfileChain((profile,))


@pytest.mark.parametrize("percentile", ["p50", "p95"])
def test_a_predicted_latency_is_compared_at_the_upper_end_and_told(percentile: Any) -> None:
    selector = Selector(predicted(1.5, 2.5))
    with pytest.raises(InfeasibleBudget, match=r"smallest feasible budget is latency_ms=2\.5"):
        selector.index(Budget(latency_ms=2.4, percentile=percentile))
    told = explain(selector, Budget(latency_ms=2.5, percentile=percentile))
    assert told.profile is not None
    (why,) = told.to_json()["doubts"]
    assert (
        "is predicted, not measured: the budget compares 2.5 ms, the upper end of its 90 %" in why
    )
    assert "from 1.5 ms; `t3c bench --record`" in why


def test_what_is_measured_or_not_limited_raises_no_doubt() -> None:
    (bare,) = predicted(None, None)
    assert "with no interval known" in doubts(bare, Budget(latency_ms=3))[0]
    assert doubts(bare, Budget(latency_ms=3, energy_mj=2))[1].endswith("is estimated, not measured")
    assert doubts(bare, Budget(size_mb=9)) == ()
    measured = replace(bare, latency=Timing(1e-3, 2e-3, Label.MEASURED, 20))
    assert doubts(measured, Budget(latency_ms=3)) == ()


@pytest.mark.parametrize(
    ("low", "high", "label"),
    [
        (1.5, None, Label.PREDICTED),
        (None, 2.5, Label.PREDICTED),
        (2.1, 2.5, Label.PREDICTED),
        (1.0, 1.9, Label.PREDICTED),
        (1.0, math.inf, Label.PREDICTED),
        (1.0, 2.5, Label.MEASURED),
    ],
)
def test_an_interval_that_is_none_is_refused(low: Any, high: Any, label: Label) -> None:
    with pytest.raises(ValueError, match="an interval belongs to a prediction"):
        Timing(2.0, 2.0, label, None, 1, low, high)


def test_the_sentence_names_limit_and_next_cost() -> None:
    selector = Selector(chain_of(1))
    low, high = selector.chain.profiles[3:5]
    assert low.latency_ms is not None
    assert high.latency_ms is not None
    told = explain(selector, Budget(latency_ms=low.latency_ms, size_mb=1e6))
    assert str(told) == (
        f"'p3', not 'p4', because of latency_ms={low.latency_ms:g} (it has {high.latency_ms:g})"
    )
    assert told.to_json()["binding"] == ["latency_ms"]
    assert "no limit binds" in str(explain(selector, Budget(latency_ms=1e6)))


def test_what_nothing_states_is_null_in_json() -> None:
    selector = Selector(chain_of(1, energy=False))
    told = explain(selector, Budget(energy_mj=5, latency_ms=1e6))
    assert told.profile is None
    assert told.binding == ("energy_mj",)
    found = json.loads(json.dumps(told.to_json(), allow_nan=False))
    assert found["limits"][1]["cost"] is None
    assert "no profile of this chain states energy_mj" in found["message"]
