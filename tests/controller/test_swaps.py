import itertools
import math
from collections.abc import Mapping

import pytest
import torch

from t3c.controller import chain
from t3c.controller.chain import Option
from t3c.controller.plan import plan
from t3c.controller.swaps import drift_on, improve
from t3c.core.formats import Dense, Format, LowRank, at_most
from t3c.elastic.model import ElasticModel
from tests.controller.models import mlp, more
from tests.controller.test_plan import STEEP

MENU: list[Format] = [Dense(8), LowRank(48), LowRank(32), LowRank(16)]
SITES = ("a", "b", "c")


def options() -> dict[str, list[Option]]:
    """What the table says: layer a is cheap to cut, c is not."""
    return {
        site: [Option(fmt, 1 - 0.25 * i, weight * i * i) for i, fmt in enumerate(MENU)]
        for site, weight in zip(SITES, (1.0, 1.1, 1.2), strict=True)
    }


def plans() -> list[chain.Plan]:
    return chain.cut(chain.path(options()), 4)


def truth(formats: Mapping[str, Format]) -> float:
    """What is measured: cutting a and b together hurts, which no single layer shows."""
    at = [MENU.index(formats[site]) for site in SITES]
    return at[0] ** 2 + 1.1 * at[1] ** 2 + 1.2 * at[2] ** 2 + 3 * at[0] * at[1]


def nested(found: list[chain.Plan]) -> bool:
    return all(
        at_most(small.formats[site], large.formats[site])
        for small, large in itertools.pairwise(found)
        for site in SITES
    )


def test_swaps_find_what_single_layers_do_not_show() -> None:
    before = plans()
    found = improve(before, options(), truth, 200)
    assert found.kept > 0
    gains = [truth(b.formats) - truth(a.formats) for b, a in zip(before, found.plans, strict=True)]
    assert min(gains) >= 0
    assert max(gains) > 1
    assert nested(list(found.plans))
    for old, new in zip(before, found.plans, strict=True):
        assert new.cost <= old.cost + 1e-12
    assert len({tuple(p.formats.items()) for p in found.plans}) == len(before)
    made = next(p for b, p in zip(before, found.plans, strict=True) if p is not b)
    rows = options()
    chosen = [next(o for o in rows[s] if o.format == f) for s, f in made.formats.items()]
    assert made.cost == pytest.approx(sum(o.cost for o in chosen))
    assert made.damage == pytest.approx(sum(o.damage for o in chosen))


@pytest.mark.parametrize("evaluations", [0, 1, 5, 17])
def test_evaluations_are_bounded_and_told(evaluations: int) -> None:
    seen: list[Mapping[str, Format]] = []

    def score(formats: Mapping[str, Format]) -> float:
        seen.append(formats)
        return truth(formats)

    found = improve(plans(), options(), score, evaluations)
    assert len(seen) == found.evaluations <= evaluations
    if evaluations == 0:
        assert list(found.plans) == plans()


def test_nothing_is_swapped_where_the_table_is_right() -> None:
    rows = options()

    def table(formats: Mapping[str, Format]) -> float:
        return math.fsum(
            next(o.damage for o in rows[s] if o.format == f) for s, f in formats.items()
        )

    found = improve(plans(), rows, table, 500)
    before = [table(p.formats) for p in plans()]
    after = [table(p.formats) for p in found.plans]
    assert all(a <= b for a, b in zip(after, before, strict=True))
    assert found.kept == sum(a < b for a, b in zip(after, before, strict=True)) == 0


def drift(model: ElasticModel, formats: Mapping[str, Format]) -> float:
    return drift_on(model, more(model, 4))(formats)


def test_plans_with_swaps_drift_less_on_what_they_were_scored_on() -> None:
    torch.manual_seed(0)
    model = mlp()
    batches = more(model, 4)
    plain = plan(model, batches, STEEP, profiles=4, seconds=math.inf)
    score = drift_on(model, batches[1::2])
    before = [score(p.formats) for p in plain.chain]
    swapped = plan(model, batches, STEEP, profiles=4, seconds=math.inf, swaps=40)
    after = [score(p.formats) for p in swapped.chain]
    assert all(a <= b for a, b in zip(after, before, strict=True))
    assert any("swaps" in note for note in swapped.notes)
    assert not any("swaps" in note for note in plain.notes)


def test_drift_is_relative_to_the_original() -> None:
    model = mlp()
    score = drift_on(model, more(model, 2))
    assert score({}) == 0.0
    small = score({"fc0": LowRank(16)})
    assert small > score({"fc0": Dense(8)}) > 0


def test_fewer_than_no_swaps_are_refused() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="swaps is -1; allowed are 0 and above"):
        plan(model, more(model, 2), STEEP, swaps=-1)
