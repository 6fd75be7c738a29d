"""What a chain is ordered by: every objective prices the same menu in its own units."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from t3c.controller.costs import check, site_costs, storage_bytes
from t3c.controller.options import gate
from t3c.controller.plan import menu_of, plan
from t3c.core.budget import Budget, select
from t3c.core.code_storage import CodeStorage
from t3c.core.errors import InfeasibleBudget, TargetError
from t3c.core.formats import Dense, Format, LowRank, at_most
from t3c.core.gate import GateRow, Measured
from t3c.core.objective import Goal, Mix, Objective
from t3c.core.profile import Label
from t3c.core.sites import LinearSite, Site
from t3c.cost_models import cost_model
from t3c.cost_models.base import Row
from t3c.cost_models.learned import LearnedModel, Metered
from t3c.targets import get
from t3c.targets.base import Roofline
from t3c.targets.x86 import VNNI
from tests.controller.models import Mlp, block, elastic, mlp, more

SITES: dict[str, Site] = {
    "q": LinearSite("q", 384, 384, 128, True),
    "up": LinearSite("up", 1536, 384, 128, True),
}


def rows_of(objective: Goal) -> dict[str, list[GateRow]]:
    rows = gate(SITES, 16, cost_model(VNNI), four=True, objective=objective)
    return {name: [row for row in rows if row.site == name] for name in SITES}


def test_costs_are_counted_in_the_units_of_the_objective() -> None:
    site = SITES["q"]
    menu: list[Format] = [Dense(8), Dense(4), LowRank(64, 4)]
    assert site_costs(Objective.LATENCY, site, menu, [3.0, 2.0, 1.0]) == [3.0, 2.0, 1.0]
    macs = [128 * 384 * 384, 128 * 384 * 384, 128 * 64 * 768]
    assert site_costs(Objective.MACS, site, menu, []) == macs
    sizes = [storage_bytes(site, fmt, nested=True) for fmt in menu]
    assert sizes[0] == 384 * 384 + 2 * 384 * 6 + 4 * 384  # codes, scales of groups, bias
    assert site_costs(Objective.BYTES, site, menu, []) == sizes
    apart = site_costs(Objective.BYTES, site, menu, [], CodeStorage.INDEPENDENT)
    assert apart == [storage_bytes(site, fmt) for fmt in menu]
    assert apart[0] == 384 * 384 + 2 * 4 * 384  # codes, scales of rows, bias
    assert site_costs(Objective.BYTES, site, menu[:1], []) == [storage_bytes(site, Dense(8))]
    energy = site_costs(Objective.ENERGY, site, menu, [])
    assert energy == sorted(energy, reverse=True)
    assert energy[0] == pytest.approx(macs[0] * 0.3e-12 + sizes[0] * 162.5e-12)


BOTH = Mix((Objective.LATENCY, Objective.BYTES))


def test_a_mix_is_the_mean_of_shares_of_the_dense_network() -> None:
    seconds = {n: cost_model(VNNI).predict([Row(x, Dense(8))])[0] for n, x in SITES.items()}
    whole = {
        Objective.LATENCY: sum(seconds.values()),
        Objective.BYTES: sum(storage_bytes(site, Dense(8)) for site in SITES.values()),
    }
    for name, rows in rows_of(BOTH).items():
        sizes = site_costs(Objective.BYTES, SITES[name], [row.format for row in rows], [])
        for row, size in zip(rows, sizes, strict=True):
            shares = row.predicted_s / whole[Objective.LATENCY], size / whole[Objective.BYTES]
            assert row.cost == pytest.approx(sum(shares) / 2)
    dense = sum(rows[0].cost for rows in rows_of(BOTH).values())
    assert dense == pytest.approx(1.0)


def test_a_mix_takes_four_bits_only_where_no_part_of_it_rises() -> None:
    one: dict[str, Site] = {"one": LinearSite("one", 4096, 4096, 1, True)}
    rows = gate(one, 64, cost_model(VNNI), four=True, objective=BOTH)
    assert [row.format for row in rows[:2]] == [Dense(8), Dense(4)]  # waits for its weights
    assert rows[1].cost < rows[0].cost
    for found in rows_of(BOTH).values():  # many rows: 4 bits take longer
        assert all(row.format.bits == 8 for row in found)


def test_a_mix_keeps_no_format_that_takes_longer_or_more_bytes_than_dense() -> None:
    sites: dict[str, Site] = {"q": LinearSite("q", 768, 768, 16, True)}
    rows = gate(sites, 16, cost_model(VNNI), shares=None, objective=BOTH)
    slow = [row for row in rows if row.predicted_s > rows[0].predicted_s]
    fewer = [row for row in slow if sites["q"].elements(row.format) < 768 * 768]
    assert fewer
    assert not any(row.kept for row in slow)
    kept = [row for row in rows if row.kept]
    assert len(kept) > 5
    for large, small in itertools.pairwise(kept):
        assert small.predicted_s < large.predicted_s
        assert small.cost < large.cost


@pytest.mark.parametrize("objective", [*Objective, BOTH])
def test_menus_are_nested_and_keep_what_costs_less(objective: Goal) -> None:
    for rows in rows_of(objective).values():
        assert all(at_most(b.format, a.format) for a, b in itertools.pairwise(rows))
        least = min(row.cost for row in rows if isinstance(row.format, Dense))
        for row in rows:
            assert row.dense_cost == least
            assert row.kept == (isinstance(row.format, Dense) or row.cost < least)


def test_bytes_fall_by_four_bits_first_and_products_never() -> None:
    for rows in rows_of(Objective.BYTES).values():
        assert [row.format for row in rows[:2]] == [Dense(8), Dense(4)]
        assert all(row.format.bits == 4 for row in rows[1:])
    for rows in rows_of(Objective.MACS).values():
        assert all(row.format.bits == 8 for row in rows)


def test_counted_costs_offer_more_ranks_than_times() -> None:
    model = elastic(Mlp(256, 2, 10), torch.randn(8, 256))
    spec = replace(VNNI, roofline=Roofline(1e9, 1e9, 1e15, 1e-15, 1e-15, 1e-9))

    def ranks(objective: Objective) -> set[Format]:
        rows = menu_of(model, spec, cost_model(spec), 1, objective=objective)
        return {row.format for row in rows if row.kept and row.site == "fc0"}

    assert ranks(Objective.LATENCY) < ranks(Objective.MACS)


def test_a_format_that_measures_slower_stays_where_time_is_no_objective() -> None:
    slow = Measured(2.0, 1.0, 2.0, 2.1)
    row = GateRow("q", LowRank(64), 1.0, 2.0, 10.0, 20.0, slow, Objective.MACS)
    assert row.kept
    assert row.reason == ("lowrank-r64-int8 at q: 10 multiply-adds, less than dense with 20")
    assert not GateRow("q", LowRank(64), 1.0, 2.0, 10.0, 20.0, slow).kept


def test_bytes_are_refused_where_there_are_no_four_bit_kernels() -> None:
    spec = get("cuda")
    with pytest.raises(TargetError, match="'bytes' needs kernels of 4-bit weights, and target 'cu"):
        check(Objective.BYTES, spec)
    with pytest.raises(TargetError, match=r"'latency\+bytes' needs kernels"):
        check(BOTH, spec)
    for objective in (Objective.LATENCY, Objective.MACS, Objective.ENERGY):
        check(objective, spec)
    model = mlp()
    with pytest.raises(TargetError, match="'bytes' needs kernels of 4-bit weights"):
        plan(model, [model.example_inputs], spec, objective=Objective.BYTES)


@pytest.mark.parametrize(
    "objective",
    [
        Objective.MACS,
        Objective.BYTES,
        Objective.ENERGY,
        Mix((Objective.LATENCY, Objective.BYTES, Objective.ENERGY)),
    ],
)
def test_every_step_of_a_chain_saves_what_was_asked_for(objective: Goal) -> None:
    model = block()
    found = plan(model, more(model, 2), VNNI, profiles=4, seconds=math.inf, objective=objective)
    assert found.objective == objective
    costs = {(row.site, row.format): row.cost for row in found.gate}
    chain = [math.fsum(costs[item] for item in p.formats.items()) for p in found.chain]
    assert len(chain) == 4
    assert chain == sorted(set(chain))
    assert all(fmt == Dense(8) for fmt in found.chain.profiles[-1].formats.values())
    for profile in found.chain:
        assert profile.latency is not None
        assert (profile.energy is not None) == (Objective.ENERGY in objective.parts)
        if profile.energy is not None:
            assert profile.energy.label is Label.ESTIMATED
            assert profile.energy.joules > 0
    if isinstance(objective, Mix):  # no part of it rises where the mean falls
        stated = [(p.latency_ms, p.storage_bytes, p.energy_mj) for p in found.chain]
        for column in zip(*stated, strict=True):
            assert list(column) == sorted(set(column))
    lost = Measured(2.0, 1.0, 2.0, 2.1)
    verdicts = dict.fromkeys(costs, lost)
    judged = found.judged(verdicts)
    assert judged.chain == found.chain
    assert {row.measured for row in judged.gate} == {lost}


def test_rows_that_no_output_depends_on_do_not_shape_the_factors() -> None:
    from t3c.controller.calibrate import collect

    model = mlp()
    (x,) = model.example_inputs
    graph, half = model.graph, len(x) // 2
    call = next(n for n in graph.graph.nodes if n.op == "output")
    (y,) = call.args[0]
    with graph.graph.inserting_before(call):
        kept = graph.graph.call_function(torch.narrow, (y, 0, 0, half))
    call.args = ((kept,),)
    graph.recompile()
    wild = torch.cat([x[:half], 1e3 * torch.randn(len(x) - half, x.shape[1])])
    moment = collect(model, [(wild,)])["fc0"]
    assert moment.rows == half
    np.testing.assert_allclose(moment.total, x[:half].T @ x[:half], rtol=1e-4, atol=1e-4)


METERED = replace(
    LearnedModel.of(VNNI),
    metered=Metered(
        LearnedModel(
            VNNI.roofline,
            prior={"*": (1e-4, 0.0, 2e-12, 0.0, 1e-9, 0.0)},
            network=(1.1, 1e-12, 1e-10, 1e-6, 1e-3),
        ),
        "rapl",
    ),
)
"""A model of a device whose joules were metered."""


@pytest.mark.parametrize("objective", [Objective.LATENCY, Objective.ENERGY])
def test_metered_energy_decides_and_budgets_compare_it(objective: Objective) -> None:
    model = block()
    found = plan(
        model,
        more(model, 2),
        VNNI,
        profiles=3,
        seconds=math.inf,
        objective=objective,
        model=METERED,
    )
    for profile in found.chain:
        assert profile.energy is not None
        assert profile.energy.label is Label.PREDICTED
        layers = [Row(model.sites[n], f, 1, False) for n, f in profile.formats.items()]
        joules = METERED.predict_network_energy(layers, found.fixed.rest)
        assert profile.energy.joules == joules
    energies = [p.energy_mj for p in found.chain if p.energy_mj is not None]
    assert energies == sorted(energies)
    middle = select(found.chain, Budget(energy_mj=energies[1]))
    assert middle.name == found.chain.profiles[1].name
    with pytest.raises(InfeasibleBudget, match="energy_mj"):
        select(found.chain, Budget(energy_mj=0.9 * energies[0]))
    if objective is Objective.ENERGY:
        asked = [Row(model.sites[r.site], r.format) for r in found.gate]
        assert [r.cost for r in found.gate] == METERED.predict_energy(asked)
