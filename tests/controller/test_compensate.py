"""Compensation of upstream errors: nothing changes where nothing errs, less error where it does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from t3c.controller.calibrate import (
    MADE_UP,
    REFERENCES,
    collect,
    factorize,
    reference,
    round_weights,
)
from t3c.controller.compensate import Pair, walk
from t3c.controller.plan import plan
from t3c.core.code_storage import CodeStorage
from t3c.core.formats import Dense, Format, LowRank
from t3c.core.objective import Objective
from t3c.elastic.model import ElasticModel
from t3c.elastic.rounding import round_groups, round_nested
from t3c.targets import get
from tests.controller import models

ROWS = 40
"""Batches of 8 or 12 rows: several times the width of the models."""


def with_factorizer(model: ElasticModel, name: str) -> ElasticModel:
    for layer in model.layers.values():
        layer.set_thin(name)
    return model


def fitted(model: ElasticModel, name: str, gains: bool = True) -> ElasticModel:
    batches = models.more(model, ROWS)
    moments = collect(model, batches)
    if not gains:
        moments = {n: replace(m, gains=None) for n, m in moments.items()}
    factorize(with_factorizer(model, name), moments, batches=batches)
    return model


def pairs(model: ElasticModel, formats: Mapping[str, Format]) -> dict[str, Pair]:
    found: dict[str, Pair] = {}
    batches = models.more(model, 3)
    walk(model, batches, [formats], list(model.sites), found.__setitem__)
    return found


def off(model: ElasticModel, formats: Mapping[str, Format], site: str) -> float:
    """Squared error of a site's outputs behind compressed sites: tr of E[(W x - V x')^2]."""
    batches = models.more(model, ROWS)
    seen: dict[str, list[Tensor]] = {"was": [], "is": []}
    layer = model.layers[site]
    for key, chosen in (("was", None), ("is", formats)):
        hook = layer.register_forward_hook(
            lambda _m, _x, y, key=key: seen[key].append(torch.as_tensor(y).detach())
        )
        with torch.no_grad(), model.using(chosen):
            for batch in batches:
                model.graph(*batch)
        hook.remove()
    return float((torch.stack(seen["was"]) - torch.stack(seen["is"])).square().sum())


def test_sites_before_which_nothing_errs_keep_their_factors_bit_for_bit() -> None:
    plain, aimed = (fitted(models.block(), n) for n in ("kronecker-svd", "saes-svd"))
    for name in ("q", "k", "v"):  # they see the network's input
        for factor in ("low", "high"):
            one, two = plain.layers[name].factor(factor), aimed.layers[name].factor(factor)
            assert torch.equal(one, two)
    assert not torch.equal(plain.layers["o"].factor("low"), aimed.layers["o"].factor("low"))


def test_copies_in_original_formats_see_what_the_original_sees() -> None:
    for pair in pairs(models.block(), {}).values():
        assert torch.equal(pair.total, pair.cross)
    for name, pair in pairs(models.mlp(), {"fc1": LowRank(8, 32)}).items():
        assert torch.equal(pair.total, pair.cross) == (name in ("fc0", "fc1"))


@pytest.mark.parametrize(
    ("make", "most"),
    [(models.mlp, {"fc1": 1, "fc2": 1, "head": 1}), (models.block, {"o": 0.95, "down": 1})],
)
def test_every_site_errs_less_behind_compressed_ones(
    make: Callable[[], ElasticModel], most: Mapping[str, float]
) -> None:
    plain, aimed = (fitted(make(), name, gains=False) for name in ("whitened-svd", "saes-svd"))
    for site, limit in most.items():
        errors = [
            sum(off(model, reference(model, share), site) for share in REFERENCES)
            for model in (plain, aimed)
        ]
        assert errors[1] < limit * errors[0]


def test_the_walk_leaves_formats_as_they_were() -> None:
    model = models.mlp()
    before = {name: layer.state for name, layer in model.layers.items()}
    pairs(model, reference(model, 0.5))
    assert {name: layer.state for name, layer in model.layers.items()} == before


def test_references_keep_to_the_ranks_that_there_are() -> None:
    model = models.mlp()
    assert reference(model, 0.5)["fc0"] == LowRank(16, 32)
    assert reference(model, 0.5, {"fc1": (12,)}) == {"fc1": LowRank(12, 32)}
    assert all(fmt.ranks[0] >= 1 for fmt in reference(model, 1e-9).values())


def test_ranks_that_are_asked_for_are_kept() -> None:
    model = with_factorizer(models.mlp(), "saes-svd")
    batches = models.more(model, 4)
    most = {name: (12,) for name in ("fc0", "fc1", "fc2")}
    factorize(model, collect(model, batches), most=most, batches=batches)
    assert {tuple(model.layers[n].factor("low").shape) for n in most} == {(12, 64)}


def test_compensation_without_batches_is_refused() -> None:
    model = with_factorizer(models.mlp(), "saes-svd")
    with pytest.raises(ValueError, match="'saes-svd' runs the network front to back; give"):
        factorize(model, collect(model, models.more(model, 1)))


def test_rows_that_do_not_count_enter_no_moment() -> None:
    model, batches = models.mlp(), models.more(models.mlp(), 3)
    half = torch.arange(8) < 4
    found: dict[str, Pair] = {}
    kept = [dict.fromkeys(model.sites, half) for _ in batches]
    walk(model, batches, [{}], list(model.sites), found.__setitem__, kept=kept)
    rows = torch.cat([batch[0][half] for batch in batches])
    torch.testing.assert_close(found["fc0"].total, rows.T @ rows)
    assert found["fc0"].rows == len(rows)


def in_four_bits(
    menu: Sequence[Format], share: float, stored: CodeStorage = CodeStorage.NESTED
) -> ElasticModel:
    model = models.block()
    batches = models.more(model, ROWS)
    formats = dict.fromkeys(model.sites, menu)
    seen = collect(model, batches)
    made_up: dict[str, Any] = {"batches": batches, "share": share} if share else {}
    round_weights(model, seen, formats, **made_up, stored=stored)
    return model


@pytest.mark.parametrize("menu", [[Dense(4)], [Dense(8), Dense(4)]], ids=["alone", "nested"])
def test_four_bits_make_up_for_four_bits_before_them(menu: list[Format]) -> None:
    plain, some, aimed = (in_four_bits(menu, share) for share in (0, MADE_UP, 0.5))
    four: dict[str, Format] = dict.fromkeys(plain.sites, Dense(4))
    for site in ("o", "down"):
        assert off(aimed, four, site) < 0.85 * off(plain, four, site)
        assert off(aimed, four, site) < off(some, four, site) < 0.9 * off(plain, four, site)
    for site in ("q", "k", "v"):  # nothing before them errs
        codes = [m.layers[site].codes_of("weight", 4) for m in (plain, aimed)]
        assert all(torch.equal(one, two) for one, two in zip(*codes, strict=True))
    if Dense(8) in menu:
        eight: dict[str, Format] = dict.fromkeys(plain.sites, Dense(8))
        for site in ("o", "down"):
            assert off(aimed, eight, site) < 0.1 * off(aimed, four, site)


def test_eight_bits_stored_apart_know_nothing_of_what_four_bits_make_up_for() -> None:
    both = [Dense(8), Dense(4)]
    alone = in_four_bits([Dense(4)], 0.5)
    plain, aimed = (in_four_bits(both, x, CodeStorage.INDEPENDENT) for x in (0, 0.5))
    for site in plain.sites:
        for bits, other in ((8, plain), (4, alone)):
            codes = [m.layers[site].codes_of("weight", bits) for m in (aimed, other)]
            assert all(torch.equal(one, two) for one, two in zip(*codes, strict=True))


@pytest.mark.parametrize("codes", list(CodeStorage))
def test_in_chains_for_bytes_nested_codes_make_up_for_each_other(codes: CodeStorage) -> None:
    model = models.mlp()
    batches = models.more(model, 4)
    options: dict[str, Any] = {"profiles": 2, "seconds": 0.5, "codes": codes}
    plan(model, batches, get("x86-vnni"), objective=Objective.BYTES, **options)
    fit, held = (collect(model, part) for part in (batches[::2], batches[1::2]))
    layer, moment = model.layers["fc2"], (fit["fc2"] + held["fc2"]).mean()
    nested = round_nested(layer.weight, moment).coarse.q
    apart = round_groups(layer.weight, moment, search=True).q
    alone = nested if codes is CodeStorage.NESTED else apart
    same = np.array_equal(model.layers["fc2"].codes_of("weight", 4)[0].numpy(), alone)
    assert same is (codes is CodeStorage.INDEPENDENT)


def test_the_planner_gives_its_batches_to_factorizers_that_need_them() -> None:
    plain, aimed = (with_factorizer(models.mlp(), n) for n in ("kronecker-svd", "saes-svd"))
    for model in (plain, aimed):
        plan(model, models.more(model, 4), get("x86"), profiles=2, seconds=0.5)
    one, two = (model.layers["fc2"].factor("low") for model in (plain, aimed))
    assert one.shape == two.shape
    assert not torch.equal(one, two)
