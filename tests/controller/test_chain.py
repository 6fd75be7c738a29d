import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t3c.controller.chain import (
    DRIFT_MAX,
    SHARE_OF_MAX,
    Option,
    apart,
    cut,
    falling,
    fine_path,
    hull,
    last_dense,
    path,
    tiny,
    together,
)
from t3c.core.formats import Dense, LowRank, at_most


@st.composite
def menus(draw: st.DrawFn) -> dict[str, list[Option]]:
    """Random sites: damage rises as rank falls; time usually falls, sometimes not."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    menu = {}
    for i in range(draw(st.integers(1, 9))):
        dense = rng.uniform(1e-5, 1e-3)
        row, damage = [Option(Dense(8), dense, rng.choice([0.0, 1e-6]))], 1e-6
        for rank in range(16 * draw(st.integers(0, 6)), 0, -16):
            damage += rng.choice([0.0, rng.uniform(0, 0.02)])
            row.append(Option(LowRank(rank), dense * rng.uniform(0.1, 1.05), damage))
        menu[f"s{i}"] = row
    return menu


@settings(max_examples=200, deadline=None)
@given(menus(), st.integers(1, 12))
def test_chains_are_nested_distinct_and_strictly_cheaper_downwards(
    menu: dict[str, list[Option]], count: int
) -> None:
    for make in (path, fine_path):
        plans = cut(make(menu), count)
        assert 1 <= len(plans) <= count
        for small, large in itertools.pairwise(plans):
            assert small.cost < large.cost
            assert small.damage >= large.damage
            assert small.formats != large.formats
            assert all(at_most(small.formats[s], large.formats[s]) for s in menu)
        assert all(fmt == Dense(8) for fmt in plans[-1].formats.values())


@settings(max_examples=50, deadline=None)
@given(menus(), st.integers(1, 3))
def test_groups_have_one_format_and_what_their_sites_cost_and_damage(
    menu: dict[str, list[Option]], size: int
) -> None:
    names = list(menu)
    groups = [names[i : i + size] for i in range(0, len(names), size)]
    plans = [apart(p, groups) for p in path(together(menu, groups))]
    for small, large in itertools.pairwise(plans[::-1]):
        assert small.cost < large.cost
        assert all(at_most(small.formats[s], large.formats[s]) for s in names)
    for plan in plans:
        assert all(len({plan.formats[s] for s in group}) == 1 for group in groups)
        chosen = [next(o for o in menu[s] if o.format == plan.formats[s]) for s in names]
        assert plan.cost == pytest.approx(math.fsum(o.cost for o in chosen))
        assert plan.damage == pytest.approx(math.fsum(o.damage for o in chosen))


@settings(max_examples=100, deadline=None)
@given(menus())
def test_each_plan_is_the_least_damage_at_its_cost(menu: dict[str, list[Option]]) -> None:
    menu = dict(itertools.islice(menu.items(), 4))
    plans = path(menu)
    for choice in itertools.product(*menu.values()):
        cost = math.fsum(o.cost for o in choice)
        damage = math.fsum(o.damage for o in choice)
        for plan in plans:  # no choice beats a plan in both
            assert not (cost < plan.cost * (1 - 1e-9) and damage < plan.damage - 1e-12)


@settings(max_examples=100, deadline=None)
@given(menus())
def test_hull_prices_rise(menu: dict[str, list[Option]]) -> None:
    for row in menu.values():
        corners = hull(row)
        assert corners[0] == 0
        assert set(corners) <= set(falling(row))
        prices = [
            (row[j].damage - row[i].damage) / (row[i].cost - row[j].cost)
            for i, j in itertools.pairwise(corners)
        ]
        assert prices == sorted(prices)


@settings(max_examples=100, deadline=None)
@given(menus())
def test_the_fine_path_visits_every_cheaper_option(menu: dict[str, list[Option]]) -> None:
    steps = sum(len(falling(row)) - 1 for row in menu.values())
    assert len(fine_path(menu)) == steps + 1
    assert len(path(menu)) <= steps + 1


def ladder(drifts: list[float]) -> list[Option]:
    """Ten even steps of a tenth of the time each."""
    return [
        Option(Dense(8) if i == 0 else LowRank(160 - 16 * i), 1e-3 * (1 - 0.1 * i), d * d)
        for i, d in enumerate(drifts)
    ]


def test_tiny_reaches_its_share_of_cost_however_much_drift_that_costs() -> None:
    plans = path({"fc": ladder([0, 0.5, 0.8, 1, 1.2, 1.3, 1.4, 1.5, 1.6])})
    at = plans[tiny(plans)]
    assert at.cost <= SHARE_OF_MAX * plans[0].cost
    assert plans[tiny(plans) - 1].cost > SHARE_OF_MAX * plans[0].cost


def test_tiny_goes_on_while_drift_is_small() -> None:
    plans = path({"fc": ladder([0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.26, 0.6])})
    at = plans[tiny(plans)]
    assert at.cost == pytest.approx(0.3e-3)
    assert at.drift <= DRIFT_MAX


def test_tiny_is_the_end_where_ranks_allow_no_more() -> None:
    plans = path({"fc": ladder([0, 0.1, 0.2])})
    assert tiny(plans) == 2


def test_profiles_are_denser_where_drift_is_worth_having() -> None:
    drifts = [0, 0.1, 0.2, 0.29, 0.7, 0.8, 0.9]
    plans = cut(path({"fc": ladder(drifts)}), 4)
    assert plans[0].drift > DRIFT_MAX
    assert [plan.drift for plan in plans[1:]] == pytest.approx([0.29, 0.2, 0], abs=0.11)


def test_profiles_are_spread_evenly() -> None:
    rng = random.Random(0)
    menu = {}
    for i in range(40):
        row, damage = [Option(Dense(8), 1e-3, 0.0)], 0.0
        for rank in range(128, 0, -16):
            damage += rng.uniform(0, 0.002)
            row.append(Option(LowRank(rank), 1e-3 * rank / 200, damage))
        menu[f"s{i}"] = row
    plans = cut(path(menu), 8)
    gaps = [large.cost - small.cost for small, large in itertools.pairwise(plans)]
    assert max(gaps) < 2.5 * min(gaps)


def test_a_chain_of_no_profiles_is_refused() -> None:
    with pytest.raises(ValueError, match="0 profiles wanted"):
        cut(path({"fc": ladder([0, 1])}), 0)


def test_sites_without_options_give_one_plan() -> None:
    (only,) = cut(path({"fc": [Option(Dense(8), 1e-3, 0.0)]}), 8)
    assert only.formats == {"fc": Dense(8)}
    assert len(cut(path({}), 8)) == 1


def test_dense_first_passes_dense_quantization_before_any_rank_falls() -> None:
    rng = random.Random(3)
    menu = {}
    for i in range(12):
        base = 10 ** rng.uniform(-6, -2)
        row = [Option(Dense(8), 100.0, 0.0), Option(Dense(4), 53.0, base)]
        row += [Option(LowRank(r, 4), r / 2, base * (2 + 2 * (96 - r) / 16)) for r in (96, 64, 32)]
        menu[f"s{i}"] = row
    plans = path(menu, dense_first=True)
    at = last_dense(plans)
    assert all(fmt == Dense(4) for fmt in plans[at].formats.values())
    assert all(isinstance(f, Dense) for plan in plans[:at] for f in plan.formats.values())
    for small, large in itertools.pairwise(reversed(plans)):
        assert small.cost < large.cost
        assert all(at_most(small.formats[s], large.formats[s]) for s in menu)
    assert path(menu) != plans  # by price alone, some rank falls before the last layer has 4 bits
    for count in (3, 4, 8):
        assert plans[at] in cut(plans, count, through=at)
        assert len(cut(plans, count, through=at)) == count
    assert len(cut(plans, 2, through=at)) == 2


def test_menus_without_dense_steps_have_the_same_path_either_way() -> None:
    menu = {"a": ladder([0, 0.1, 0.3, 0.4]), "b": ladder([0, 0.2, 0.25, 0.6])}
    assert path(menu, dense_first=True) == path(menu)
