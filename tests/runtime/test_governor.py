"""A governed session: measured calls decide, statistics tell it, nothing is left behind."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import t3c
from t3c.core.certificate import Bound, Calibrated, Certificate
from t3c.core.errors import InfeasibleBudget
from t3c.core.profile import Profile
from t3c.runtime.governor import REVERSAL_S, Governor, govern
from t3c.runtime.session import load
from tests.runtime import toy
from tests.runtime.plant import NAMES, RECORDED, SECONDS, Plant, square, step

BUDGET_MS = 9.0
LAST = len(SECONDS) - 1


def governed(plant: Plant, **more: Any) -> Governor:
    arguments: dict[str, Any] = {"latency_ms": BUDGET_MS, **more}
    return govern(plant, clock=plant.clock, **arguments)


def drive(plant: Plant, governor: Governor, seconds: float) -> None:
    while plant.now < seconds:
        governor()


def test_it_follows_the_load_and_the_session_follows_it() -> None:
    plant = Plant(step(1.5, 2.0, 6.0))
    plant.set_profile("p2")
    with governed(plant) as g:
        assert plant.profile.name == g.profile == "max"
        drive(plant, g, 5.0)
        assert plant.profile.name == g.profile == "p1"
        drive(plant, g, 8.0)
        assert plant.profile.name == g.profile == "max"
    assert plant.profile.name == "p2"
    assert plant.over(BUDGET_MS * 1e-3) < 0.05
    assert g.switches == plant.switches() == 2
    before = g.switches
    plant.load = lambda now: 1.5
    drive(plant, g, 10.0)  # outside the block it governs its own calls only
    assert g.switches > before
    assert plant.profile.name == "p2"


def test_switches_that_undo_the_last_one_soon_are_counted_as_reversals() -> None:
    plant = Plant(square(1.5, 6.0))
    g = governed(plant)
    drive(plant, g, 40.0)
    assert g.reversals == plant.reversals(REVERSAL_S) == g.statistics()["reversals"] > 4
    plant = Plant(square(1.5, 30.0))  # slower than that: followed, not reversed
    g = governed(plant)
    drive(plant, g, 100.0)
    assert g.switches >= 6
    assert g.reversals == plant.reversals(REVERSAL_S) == 0


def test_a_call_returns_what_the_session_computes(tmp_path: Path) -> None:
    session, x = load(toy.write_native(tmp_path / "a")), toy.inputs()
    with t3c.govern(session, latency_ms=1e3) as g:
        np.testing.assert_allclose(g(x).logits, toy.expected("max", x), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(g(x=x).logits, g.within(1e3, x).logits)
        found = g.statistics()
    assert found["calls"] == found["profiles"]["max"]["calls"] == 3
    assert found["deadlines"] == 1
    assert found["profiles"]["max"]["seconds"] > 0


def test_a_deadline_picks_by_the_present_slowdown_for_one_call() -> None:
    plant = Plant(step(1.5, 0.0, 50.0))
    g = governed(plant, latency_ms=20.0)
    drive(plant, g, 1.0)
    assert g.profile == "max"
    want = max(i for i, s in enumerate(RECORDED) if s * g.slowdown <= 10e-3)
    assert 0 < want < LAST
    assert g.within(10.0) == NAMES[want]
    assert g() == "max"
    assert g.within(5.1) == "tiny"  # feasible when quiet, late now
    found = g.statistics()
    assert (found["deadlines"], found["deadlines_missed"]) == (2, 1)
    with pytest.raises(InfeasibleBudget, match=r"smallest feasible budget is latency_ms=5\.0") as e:
        g.within(5.0)
    assert g.within(e.value.minimum["latency_ms"]) == "tiny"
    with pytest.raises(ValueError, match="latency_ms is nan"):
        g.within(math.nan)


@pytest.mark.parametrize("states_energy", [True, False])
def test_energy_is_kept_where_a_meter_shows_more_than_the_record(states_energy: bool) -> None:
    plant = Plant(watts=lambda now: 10.0 if not 3.0 <= now < 8.0 else 14.0)
    plant = Plant(watts=plant.watts, states_energy=states_energy)
    limit = SECONDS[-1] * 10.0 * 1e3 * 1.15  # of max at 10 W, 15 % spare
    with governed(plant, latency_ms=None, energy_mj=limit, meter=plant) as g:
        drive(plant, g, 2.5)
        assert g.profile == "max"
        drive(plant, g, 7.5)
        assert 0 < NAMES.index(g.profile) < LAST
        begin, calls = plant.joules, len(plant.log)
        drive(plant, g, 7.9)
        assert (plant.joules - begin) / (len(plant.log) - calls) * 1e3 <= limit
        drive(plant, g, 10.0)
        assert g.profile == "max"
    found = g.statistics()
    assert found["switches"] <= 8
    assert found["energy_j"] == pytest.approx(plant.joules, rel=0.02)
    assert "t3c_governor_energy_joules_total" in g.prometheus()


def test_latency_and_energy_both_limit() -> None:
    plant = Plant(step(1.5, 0.0, 3.0), states_energy=True)
    with governed(plant, energy_mj=SECONDS[4] * 1.05 * 1e4, meter=plant) as g:
        drive(plant, g, 2.9)
        assert NAMES.index(g.profile) <= 1
        drive(plant, g, 9.0)
        assert g.profile in ("p3", "p4", "p5")
        begin, calls = plant.joules, len(plant.log)
        drive(plant, g, 12.0)
        assert (plant.joules - begin) / (len(plant.log) - calls) <= SECONDS[4] * 1.05 * 10.0


def test_a_meter_that_starts_over_is_not_believed() -> None:
    plant = Plant(states_energy=True)
    with governed(plant, energy_mj=100.0, meter=plant) as g:
        drive(plant, g, 1.0)
        plant.joules = 0.0
        drive(plant, g, 2.0)
    assert g.profile == "max"
    assert 0 < g.statistics()["energy_j"] < plant.joules + 11


def test_a_meter_alone_is_only_counted() -> None:
    plant = Plant()
    g = governed(plant, meter=plant)
    drive(plant, g, 2.0)
    assert g.switches == 0
    assert g.statistics()["energy_j"] == pytest.approx(plant.joules, rel=0.1)


def test_sizes_are_fixed_limits() -> None:
    plant = Plant()
    with governed(plant, size_mb=3.5) as g:
        assert g.profile == "p2"
        drive(plant, g, 5.0)
        assert g.within(1e3) == "p2"
    assert plant.switches() == 0


def test_no_load_makes_it_leave_what_the_drift_allows() -> None:
    def bounded(bound: float) -> Certificate:
        return Certificate(calibrated=Calibrated((Bound(0.9, bound, bound, 0.1, (1.0,)),), 50, "0"))

    plant = Plant(step(1.5, 1.0, 5.0))
    plant.profiles = tuple(
        replace(p, certificate=bounded(1.0 - i / 10)) for i, p in enumerate(plant.profiles)
    )
    with governed(plant, max_drift=0.75) as g:  # p3 has 0.7
        drive(plant, g, 5.0)
        assert g.profile == "p3"
        assert g.statistics()["saturated"]
        assert min(i for _, i, _ in plant.log) == 3
        with pytest.raises(InfeasibleBudget, match="profile 'p3'"):
            g.within(6.0)
        drive(plant, g, 8.0)
        assert g.profile == "max"
    with pytest.raises(InfeasibleBudget, match=r"max_drift=0\.1"):
        governed(plant, max_drift=0.1)
    with pytest.raises(InfeasibleBudget, match="so little drift needs"):
        governed(plant, max_drift=0.35, latency_ms=7.0)


def test_statistics_are_json_and_prometheus_and_agree() -> None:
    plant = Plant(step(1.5, 1.0, 3.0))
    g = governed(plant)
    drive(plant, g, 5.0)
    g.within(30.0)
    found = json.loads(g.json())
    assert found["calls"] == len(plant.log)
    assert found["over_budget"] == sum(s > BUDGET_MS * 1e-3 for _, _, s in plant.log[:-1])
    assert found["over_budget_share"] == found["over_budget"] / (len(plant.log) - 1)
    assert found["predicted_s"] == pytest.approx(RECORDED[-1] * found["slowdown"])
    assert sum(row["seconds"] for row in found["profiles"].values()) == pytest.approx(plant.now)
    text = g.prometheus({"model": 'a"b\\c\n'})
    names = re.findall(r"^# TYPE (\S+) (counter|gauge)$", text, re.M)
    assert len(names) == len(set(names)) == len(re.findall(r"^# HELP ", text, re.M))
    values: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = re.fullmatch(r'(\w+)\{((?:\w+="(?:[^"\\\n]|\\.)*",?)+)\} (\S+)', line)
            assert match, line
            assert match[2].startswith('model="a\\"b\\\\c\\n"')
            assert match[1] in dict(names)
            values[match[1]] = values.get(match[1], 0.0) + float(match[3])
    assert values["t3c_governor_calls_total"] == found["calls"]
    assert values["t3c_governor_over_budget_total"] == found["over_budget"]
    assert values["t3c_governor_switches_total"] == found["switches"]
    assert values["t3c_governor_profile"] == 1
    assert "t3c_governor_saturated 0" in g.prometheus()


def test_profiles_ascend_with_the_budget() -> None:
    budgets = (5.2, 6.0, 7.0, 8.0, 9.0)
    found = [NAMES.index(governed(Plant(), latency_ms=ms).profile) for ms in budgets]
    assert all(a <= b for a, b in pairwise(found))
    assert found[-1] == LAST


def test_what_cannot_be_governed_is_refused() -> None:
    plant = Plant()
    with pytest.raises(ValueError, match="needs latency_ms or energy_mj"):
        govern(plant, size_mb=3)
    with pytest.raises(ValueError, match="needs meter="):
        govern(plant, energy_mj=3)
    with pytest.raises(ValueError, match="percentile is 100; allowed are 50 to below 100"):
        govern(plant, latency_ms=9, percentile=100)
    with pytest.raises(ValueError, match="percentile is 500; allowed"):
        govern(plant, energy_mj=9, meter=plant, percentile=500)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="latency_ms is"):
            govern(plant, latency_ms=bad)
    with pytest.raises(InfeasibleBudget, match="smallest feasible budget") as error:
        govern(plant, latency_ms=4)
    minimum = error.value.minimum["latency_ms"]
    assert govern(plant, latency_ms=minimum).profile == "tiny"
    with pytest.raises(InfeasibleBudget, match="smallest feasible budget"):
        govern(Plant(states_energy=True), energy_mj=1, meter=plant)
    unknown = Profile("max", {}, 1, 1, 1)
    plant.profiles = (unknown,)
    with pytest.raises(InfeasibleBudget, match="states no latency"):
        govern(plant, energy_mj=9, meter=plant)
