import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t3c.core.budget import COSTS, Budget, Selector, costs, select
from t3c.core.errors import InfeasibleBudget
from t3c.core.formats import Dense, LowRank
from t3c.core.profile import Energy, Label, Profile, ProfileChain, Timing


def profile(i: int, ms: float, mb: float, ram: float, mj: float | None, last: bool) -> Profile:
    timing = Timing(ms * 0.9e-3, ms * 1e-3, Label.MEASURED, 100)
    return Profile(
        f"p{i}",
        {"fc": Dense(8) if last else LowRank(16 * (i + 1))},
        macs=10 * (i + 1),
        storage_bytes=int(mb * 1e6),
        ram_bytes=int(ram * 1e6),
        latency=timing,
        energy=None if mj is None else Energy(mj * 1e-3, Label.MEASURED),
    )


def chain_of(seed: int, *, rising: bool = True, energy: bool = True, n: int = 9) -> ProfileChain:
    rng = random.Random(seed)

    def column() -> list[float]:
        values = [rng.uniform(0.5, 10) for _ in range(n)]
        return sorted(values) if rising else values

    rows = zip(column(), column(), column(), column(), strict=True)
    return ProfileChain(
        tuple(
            profile(i, a, b, c, d if energy else None, i == n - 1)
            for i, (a, b, c, d) in enumerate(rows)
        )
    )


def token(rng: random.Random) -> Budget:
    names = rng.sample(COSTS, rng.randint(1, 4))
    percentile = rng.choice(["p50", "p95"])
    return Budget(**{name: rng.uniform(0.3, 12) for name in names}, percentile=percentile)  # type: ignore[arg-type]


def exhaustive(chain: ProfileChain, budget: Budget) -> Profile | None:
    fits = [
        p
        for p in chain
        if all(costs(p, budget.percentile)[n] <= v for n, v in budget.components.items())
    ]
    return fits[-1] if fits else None


@pytest.mark.parametrize("rising", [True, False])
def test_selection_equals_exhaustive_search_on_10000_tokens(rising: bool) -> None:
    chain = chain_of(1, rising=rising)
    selector, rng = Selector(chain), random.Random(2)
    for _ in range(10_000):
        budget = token(rng)
        expected = exhaustive(chain, budget)
        if expected is None:
            with pytest.raises(InfeasibleBudget):
                selector.select(budget)
        else:
            assert selector.select(budget) is expected


@pytest.mark.parametrize("rising", [True, False])
def test_more_budget_never_selects_less_on_10000_pairs(rising: bool) -> None:
    selector, rng = Selector(chain_of(3, rising=rising)), random.Random(4)

    def index(budget: Budget) -> int:
        try:
            return selector.index(budget)
        except InfeasibleBudget:
            return -1

    for _ in range(10_000):
        small = token(rng)
        more = {n: v * rng.choice([1.0, rng.uniform(1, 3)]) for n, v in small.components.items()}
        large = Budget(**more, percentile=small.percentile)  # type: ignore[arg-type]
        assert index(small) <= index(large)


@pytest.mark.parametrize("rising", [True, False])
def test_retrying_with_the_named_minimum_succeeds(rising: bool) -> None:
    refused = 0
    for seed in range(40):
        chain, rng = chain_of(seed, rising=rising), random.Random(seed)
        for _ in range(100):
            budget = token(rng)
            if exhaustive(chain, budget) is not None:
                continue
            refused += 1
            with pytest.raises(InfeasibleBudget) as caught:
                select(chain, budget)
            error = caught.value
            assert error.failing
            assert set(error.failing) <= set(budget.components)
            assert error.minimum.keys() == budget.components.keys()
            select(chain, Budget(**error.minimum, percentile=budget.percentile))  # type: ignore[arg-type]
            if rising:
                smallest = costs(chain.profiles[0], budget.percentile)
                assert error.minimum == {n: smallest[n] for n in budget.components}
    assert refused > 100


def test_message_names_the_failing_component_and_the_minimum() -> None:
    chain = chain_of(5)
    least = costs(chain.profiles[0])["latency_ms"]
    with pytest.raises(InfeasibleBudget, match=r"latency_ms=0\.001; .*smallest feasible") as caught:
        select(chain, Budget(latency_ms=0.001, size_mb=100))
    assert caught.value.failing == ("latency_ms",)
    assert caught.value.minimum["latency_ms"] == least


def test_a_component_that_no_profile_states_is_refused_and_the_rest_still_works() -> None:
    chain = chain_of(6, energy=False)
    with pytest.raises(
        InfeasibleBudget, match="no profile of this chain states energy_mj"
    ) as caught:
        select(chain, Budget(energy_mj=5, latency_ms=100))
    assert caught.value.failing == ("energy_mj",)
    assert select(chain, Budget(**caught.value.minimum)) in chain.profiles  # type: ignore[arg-type]
    with pytest.raises(InfeasibleBudget) as alone:
        select(chain, Budget(energy_mj=5))
    assert alone.value.minimum == {}


def test_equal_cost_is_inside_the_budget_and_percentiles_differ() -> None:
    chain = chain_of(7)
    third = chain.profiles[3]
    assert third.latency_ms is not None
    assert select(chain, Budget(latency_ms=third.latency_ms)) is third
    p50 = Budget(latency_ms=third.latency_ms * 0.9 * (1 + 1e-12), percentile="p50")
    assert select(chain, p50) is third


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", COSTS)
def test_bad_values_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Budget(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["2", True])
def test_non_numbers_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="latency_ms"):
        Budget(latency_ms=value)  # type: ignore[arg-type]


def test_empty_budget_and_unknown_percentile_are_refused() -> None:
    with pytest.raises(ValueError, match="empty budget"):
        Budget()
    with pytest.raises(ValueError, match="p99"):
        Budget(latency_ms=1, percentile="p99")  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(st.sets(st.sampled_from(COSTS), min_size=1), st.floats(1e-6, 1e6))
def test_every_subset_is_a_budget_and_spells_itself(names: set[str], value: float) -> None:
    budget = Budget(**dict.fromkeys(names, value))  # type: ignore[arg-type]
    assert set(budget.components) == names
    assert all(name in str(budget) for name in names)


def test_selection_takes_microseconds() -> None:
    selector, budget = Selector(chain_of(8, n=64)), Budget(latency_ms=5, size_mb=9)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(200):
            selector.index(budget)
        best = min(best, (time.perf_counter() - start) / 200)
    assert best < 200e-6
