"""A learned policy is monotone, never over a budget, and picks what an exhaustive search picks."""

import json
import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from t3c.controller.fit_policy import Report, fit
from t3c.core.budget import COSTS, Budget, Selector, costs
from t3c.core.errors import ArtifactError, InfeasibleBudget, T3CError
from t3c.core.profile import ProfileChain
from t3c.runtime import policy as module
from t3c.runtime.policy import (
    SUMMARY,
    Policy,
    PolicySelector,
    decision_seconds,
    summarize,
    table_of,
)
from tests.core.test_budget import chain_of

INPUTS = 120


@cache
def data() -> tuple[ProfileChain, np.ndarray, np.ndarray]:
    """A chain, drifts that differ from input to input, and a summary that tells by how much."""
    chain, rng = chain_of(1), np.random.default_rng(0)
    hard = rng.lognormal(0.0, 0.6, INPUTS)
    drifts = hard[:, None] * np.linspace(1.0, 0.05, len(chain)) ** 1.5
    noise = rng.standard_normal((INPUTS, SUMMARY - 1))
    return chain, drifts, np.concatenate([np.log(hard)[:, None], noise], 1)


@cache
def trained(looks: bool) -> tuple[Policy, Report]:
    chain, drifts, summaries = data()
    seen = summaries if looks else None
    return fit(chain, drifts, steps=150, time_price=1.5, summaries=seen)


def selector(looks: bool = False) -> PolicySelector:
    return PolicySelector(data()[0], trained(looks)[0])


def token(rng: random.Random) -> Budget:
    names = rng.sample(COSTS, rng.randint(1, 4))
    return Budget(**{name: rng.uniform(0.3, 12) for name in names})  # type: ignore[arg-type]


def index(found: PolicySelector | Selector, budget: Budget) -> int:
    try:
        return found.index(budget)
    except InfeasibleBudget:
        return -1


@pytest.mark.parametrize(("looks", "count"), [(False, 10_000), (True, 1000)])
def test_selection_equals_exhaustive_search_on_10000_tokens(looks: bool, count: int) -> None:
    ours, rng, chain = selector(looks), random.Random(2), data()[0]
    table = [costs(profile) for profile in chain]
    for _ in range(count):
        budget = token(rng)
        fits = [
            i for i, row in enumerate(table) if all(row[n] <= v for n, v in budget.costs.items())
        ]
        assert index(ours, budget) == max(fits, default=-1)


def test_more_budget_never_lowers_the_choice_before_or_after_snapping() -> None:
    ours, rng, looks = selector(), random.Random(4), selector(True)
    summaries = data()[2]
    for i in range(10_000):
        low = token(rng)
        more = {n: v * rng.choice([1.0, rng.uniform(1, 3)]) for n, v in low.components.items()}
        high = Budget(**more)  # type: ignore[arg-type]
        assert ours.policy.position(low) <= ours.policy.position(high)
        first, second = index(ours, low), index(ours, high)
        assert first <= second
        if first >= 0 and i % 4 == 0:
            small, large = data()[0].profiles[first], data()[0].profiles[second]
            assert all(small.formats[s].bits <= large.formats[s].bits for s in small.formats)
            x = summaries[i % INPUTS]
            assert looks.index(low, x) <= looks.index(high, x)


def test_an_input_only_chooses_among_profiles_that_keep_the_budget() -> None:
    looks, rng, smaller = selector(True), random.Random(5), 0
    for i in range(2000):
        budget, x = token(rng), np.random.default_rng(i).normal(0, 2, SUMMARY)
        largest = index(looks, budget)
        if largest < 0:
            with pytest.raises(InfeasibleBudget, match="smallest feasible"):
                looks.index(budget, x)
            continue
        chosen = looks.index(budget, x)
        assert 0 <= chosen <= largest
        row = costs(data()[0].profiles[chosen])
        assert all(row[n] <= limit for n, limit in budget.costs.items())
        smaller += chosen < largest
    assert smaller > 100


def test_looking_at_inputs_pays_where_it_is_allowed_and_the_chain_decides_elsewhere() -> None:
    policy, report = trained(True)
    for k, (floor, (ours, chains)) in enumerate(zip(policy.floors, report.objective, strict=True)):
        assert (floor == k) == (ours >= chains)
    assert policy.floors[-1] < policy.profiles - 1
    ours_, budget = selector(True), Budget(latency_ms=1e3)
    seen = [ours_.index(budget, x) for x in data()[2]]
    assert np.corrcoef(seen, data()[2][:, 0])[0, 1] > 0.7  # harder inputs get more
    blind = replace(policy, floors=tuple(range(policy.profiles)))
    ours_ = PolicySelector(data()[0], blind)
    assert all(ours_.index(budget, x) == policy.profiles - 1 for x in data()[2])


def test_where_smaller_profiles_never_pay_the_chain_decides() -> None:
    chain, drifts, _ = data()
    noise = np.random.default_rng(3).standard_normal((INPUTS, SUMMARY))
    policy, report = fit(chain, drifts, summaries=noise, time_price=0.0, steps=100)
    assert all(ours >= chains - 1e-9 for ours, chains in report.objective)
    assert policy.floors == tuple(range(policy.profiles))


def test_the_report_tells_what_snapping_costs_and_how_good_the_network_is_alone() -> None:
    policy, report = trained(False)
    assert len(report.snapping_gap) == policy.profiles
    assert all(gap is not None and abs(gap) < 0.3 for gap in report.snapping_gap)
    assert report.exact_before_snapping > 0.5
    assert report.proxy_rank_correlation == pytest.approx(1.0)
    assert policy.parameters < 1000
    assert report.objective == ()


def test_what_the_policy_does_not_know_is_left_to_the_chain() -> None:
    chain = data()[0]
    ours, plain = selector(), Selector(chain)
    for i in range(1, 100):
        budget = Budget(latency_ms=0.1 * i, percentile="p50")
        assert index(ours, budget) == index(plain, budget)
    with pytest.raises(InfeasibleBudget, match="calibrated"):
        ours.index(Budget(latency_ms=1e3, max_drift=0.1))
    assert selector(True).index(Budget(latency_ms=1e3, percentile="p50"), data()[2][0]) == 8


def test_a_repeated_budget_is_a_look_up_and_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "KNOWN", 3)
    several = selector()
    for i in range(5, 15):
        several.index(Budget(latency_ms=i))
        assert len(several._known) <= 3  # pyright: ignore[reportPrivateUsage]
    ours, budget = selector(), Budget(latency_ms=5)
    assert ours.select(budget) is ours.select(budget)
    assert len(ours._known) == 1  # pyright: ignore[reportPrivateUsage]
    assert len(decision_seconds(ours, [budget] * 3, [np.ones(4)])) == 3


@pytest.mark.parametrize("looks", [False, True])
def test_json_round_trips_and_damage_is_refused(looks: bool) -> None:
    policy = trained(looks)[0]
    data_ = json.loads(json.dumps(policy.to_json()))
    again = Policy.from_json(data_)
    assert again.to_json() == policy.to_json()
    rng = random.Random(6)
    for _ in range(50):
        budget = token(rng)
        assert again.position(budget) == policy.position(budget)
    with pytest.raises(ArtifactError, match="policy schema 2, known is 1"):
        Policy.from_json({**data_, "schema": 2})
    with pytest.raises(ArtifactError, match="damaged"):
        Policy.from_json({k: v for k, v in data_.items() if k != "curves"})
    data_["curves"][0][0][0][0] = -1.0
    with pytest.raises(ArtifactError, match="latency_ms has a negative weight"):
        Policy.from_json(data_)


def test_a_policy_for_other_costs_is_refused() -> None:
    with pytest.raises(T3CError, match="fitted to other costs"):
        PolicySelector(chain_of(2), trained(False)[0])


def test_what_does_not_fit_is_refused() -> None:
    chain, drifts, summaries = data()
    with pytest.raises(ValueError, match=r"drifts are \(120, 8\)"):
        fit(chain, drifts[:, 1:])
    with pytest.raises(ValueError, match="finite"):
        fit(chain, np.full_like(drifts, np.nan))
    with pytest.raises(ValueError, match=r"summaries are \(120, 3\), not \(120, 4\)"):
        fit(chain, drifts, summaries=summaries[:, 1:])
    with pytest.raises(ValueError, match="running maximum"):
        fit(chain_of(1, rising=False), drifts)
    policy = trained(False)[0]
    with pytest.raises(ValueError, match="costs must rise"):
        replace(policy, table=policy.table[:, ::-1])
    with pytest.raises(ValueError, match="floors are"):
        replace(trained(True)[0], floors=(0, 2))


def test_costs_that_nothing_states_are_left_out() -> None:
    policy, _ = fit(chain_of(1, energy=False), data()[1], steps=10)
    assert policy.components == ("latency_ms", "size_mb", "ram_mb")
    np.testing.assert_array_equal(policy.table, table_of(chain_of(1), policy.components))


def test_summaries_are_four_cheap_statistics() -> None:
    ids, mask = np.array([[1, 3, 5, 0]]), np.array([[1, 1, 1, 0]])
    np.testing.assert_allclose(summarize([ids, mask]), [2.25, ids.std(), 0.25, 3.0])
    np.testing.assert_allclose(summarize([np.ones((1, 1))]), [1, 0, 0, 0])
