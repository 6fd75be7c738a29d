"""Limits of drift: exact against exhaustive search, monotone in the stated senses, refused well."""

import math
import random
from dataclasses import replace

import pytest

from t3c.core.budget import COSTS, Budget, Selector, costs, drift_bound, select
from t3c.core.certificate import Bound, Calibrated, Certificate, Sound
from t3c.core.errors import InfeasibleBudget
from t3c.core.profile import Profile, ProfileChain
from tests.core.test_budget import chain_of

LEVELS = (0.9, 0.99)


def certified(chain: ProfileChain, seed: int) -> ProfileChain:
    """Falling bounds at two levels, and sound ones."""
    rng = random.Random(seed)
    tables = [sorted((rng.uniform(0.1, 9) for _ in chain), reverse=True) for _ in range(3)]

    def one(profile: Profile, i: int) -> Profile:
        values = zip(LEVELS, tables, strict=False)
        bounds = tuple(Bound(v, t[i], t[i], 0.0, ()) for v, t in values)
        sound = Sound("bound", 9 + tables[2][i], 1.0, 1.0, "all", "")
        return replace(
            profile, certificate=Certificate(None, sound, Calibrated(bounds, 99, "ab" * 32))
        )

    return ProfileChain(tuple(one(p, i) for i, p in enumerate(chain)))


def token(rng: random.Random) -> Budget:
    names = rng.sample(COSTS, rng.randint(0, 3))
    sound = rng.random() < 0.3
    return Budget(
        **{name: rng.uniform(1, 12) for name in names},  # type: ignore[arg-type]
        max_drift=rng.uniform(8, 19) if sound else rng.uniform(0.05, 9),
        level=None if sound else rng.choice([None, *LEVELS]),
        drift="sound" if sound else "calibrated",
    )


def exhaustive(chain: ProfileChain, budget: Budget) -> Profile | None:
    level = 0.9 if budget.level is None else budget.level
    kept = [p for p in chain if drift_bound(p, budget.drift, level) <= (budget.max_drift or 0.0)]
    if not budget.costs:
        return kept[0] if kept else None
    fits = [p for p in chain if all(costs(p)[n] <= v for n, v in budget.costs.items())]
    return fits[-1] if fits and fits[-1] in kept else None


@pytest.mark.parametrize("rising", [True, False])
def test_selection_equals_exhaustive_search(rising: bool) -> None:
    rng = random.Random(11)
    chosen = 0
    for seed in range(20):
        chain = certified(chain_of(seed, rising=rising), seed)
        selector = Selector(chain)
        for _ in range(200):
            budget = token(rng)
            expected = exhaustive(chain, budget)
            if expected is None:
                with pytest.raises(InfeasibleBudget):
                    selector.select(budget)
            else:
                chosen += 1
                assert selector.select(budget) is expected
    assert chosen > 500


def test_more_drift_alone_never_picks_a_larger_profile() -> None:
    selector, rng = Selector(certified(chain_of(3), 3)), random.Random(4)
    least = selector.chain.profiles[-1]
    for level in LEVELS:
        floor = drift_bound(least, "calibrated", level)
        for _ in range(500):
            small = rng.uniform(floor, 9)
            strict = selector.index(Budget(max_drift=small, level=level))
            assert selector.index(Budget(max_drift=rng.uniform(small, 12), level=level)) <= strict


def test_more_cost_beside_a_limit_of_drift_never_picks_less_nor_turns_infeasible() -> None:
    selector, rng = Selector(certified(chain_of(5), 5)), random.Random(6)

    def index(budget: Budget) -> int:
        try:
            return selector.index(budget)
        except InfeasibleBudget:
            return -1

    for _ in range(2000):
        drift, ms = rng.uniform(0.1, 9), rng.uniform(0.5, 10)
        small = index(Budget(latency_ms=ms, max_drift=drift))
        assert small <= index(Budget(latency_ms=ms * rng.uniform(1, 3), max_drift=drift))
        wider = index(Budget(latency_ms=ms, max_drift=drift * 2))
        assert small in (-1, wider)  # drift decides whether, not which


def test_retrying_with_the_named_minimum_succeeds() -> None:
    refused, rng = 0, random.Random(7)
    for seed in range(40):
        chain = certified(chain_of(seed, rising=seed % 2 == 0), seed)
        for _ in range(60):
            budget = token(rng)
            if exhaustive(chain, budget) is not None:
                continue
            refused += 1
            with pytest.raises(InfeasibleBudget) as caught:
                select(chain, budget)
            error = caught.value
            assert set(error.failing) <= set(budget.components)
            assert error.failing
            assert error.minimum.keys() == budget.components.keys()
            select(chain, Budget(**error.minimum, level=budget.level, drift=budget.drift))  # type: ignore[arg-type]
    assert refused > 200


def test_messages_name_the_component_and_both_ways_out() -> None:
    chain = certified(chain_of(8), 8)
    third, last = chain.profiles[3], chain.profiles[-1]
    limit = drift_bound(last) * 1.0001
    with pytest.raises(InfeasibleBudget) as caught:
        select(chain, Budget(latency_ms=third.latency_ms, max_drift=limit))
    assert caught.value.failing == ("max_drift",)
    assert caught.value.minimum == {
        "latency_ms": third.latency_ms,
        "max_drift": drift_bound(third),
    }
    text = str(caught.value)
    assert f"max_drift={limit:g} (calibrated at 0.9) within latency_ms" in text
    assert f"so little drift needs latency_ms={last.latency_ms!r} (profile 'p8')" in text
    with pytest.raises(InfeasibleBudget, match=r"latency_ms=0\.001 with max_drift") as slow:
        select(chain, Budget(latency_ms=0.001, max_drift=limit))
    assert slow.value.failing == ("latency_ms",)
    assert slow.value.minimum["max_drift"] == drift_bound(last)
    with pytest.raises(InfeasibleBudget) as both:
        select(chain, Budget(latency_ms=0.001, max_drift=0.001))
    assert both.value.failing == ("latency_ms", "max_drift")


def test_bounds_that_nobody_computed_are_said_to_be_missing() -> None:
    bare, chain = chain_of(9), certified(chain_of(9), 9)
    with pytest.raises(InfeasibleBudget, match="t3c certify") as caught:
        select(bare, Budget(max_drift=3, latency_ms=100))
    assert caught.value.failing == ("max_drift",)
    assert select(bare, Budget(**caught.value.minimum)) in bare.profiles  # type: ignore[arg-type]
    with pytest.raises(InfeasibleBudget, match=r"at levels 0\.9, 0\.99, not at 0\.8"):
        select(chain, Budget(max_drift=3, level=0.8))
    with pytest.raises(InfeasibleBudget, match="lower with domain="):
        select(bare, Budget(max_drift=3, drift="sound"))
    few = Calibrated((Bound(0.9, math.inf, math.inf, math.inf, ()),), 4, "ab" * 32)
    short = ProfileChain(tuple(replace(p, certificate=Certificate(calibrated=few)) for p in chain))
    with pytest.raises(InfeasibleBudget, match=r"level 0\.9 needs 9 held-out inputs"):
        select(short, Budget(max_drift=3))


def test_a_profile_without_a_bound_is_never_the_way_out() -> None:
    chain = certified(chain_of(10), 10)
    found = chain.profiles[0].certificate.calibrated
    assert found is not None
    lost = Calibrated(
        tuple(replace(b, value=math.inf) for b in found.bounds), found.inputs, found.sha256
    )
    first = replace(chain.profiles[0], certificate=Certificate(calibrated=lost))
    chain = ProfileChain((first, *chain.profiles[1:]))
    with pytest.raises(InfeasibleBudget) as caught:
        select(chain, Budget(latency_ms=first.latency_ms, max_drift=20))
    assert select(chain, Budget(**caught.value.minimum)) is chain.profiles[1]  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bad_drifts_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"max_drift is .*positive, finite number of L2 distance"):
        Budget(max_drift=value)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 90, math.nan])
def test_bad_levels_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"level is .*share above 0 and below 1"):
        Budget(max_drift=1, level=value)


def test_levels_and_kinds_that_say_nothing_are_refused() -> None:
    with pytest.raises(TypeError, match=r"level is '0\.9'"):
        Budget(max_drift=1, level="0.9")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without max_drift limits nothing"):
        Budget(latency_ms=1, level=0.9)
    with pytest.raises(ValueError, match="leave level out"):
        Budget(max_drift=1, level=0.9, drift="sound")
    with pytest.raises(ValueError, match="'proxy'; allowed are calibrated, sound"):
        Budget(max_drift=1, drift="proxy")  # type: ignore[arg-type]


def test_a_budget_spells_its_bound() -> None:
    assert str(Budget(latency_ms=2, max_drift=0.3)) == (
        "latency_ms=2, max_drift=0.3 (calibrated at 0.9)"
    )
    assert str(Budget(max_drift=0.3, drift="sound")) == "max_drift=0.3 (sound)"
