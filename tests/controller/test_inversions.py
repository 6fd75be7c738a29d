import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from t3c import api
from t3c.controller.inversions import LEAST_INPUTS, inversions, student
from t3c.controller.plan import Plan, plan
from t3c.core.codes import Matrix
from t3c.elastic.model import ElasticModel
from t3c.proof import Notes
from tests.controller.models import mlp, more
from tests.controller.test_plan import STEEP

Drifts = Mapping[str, NDArray[np.float64]]


def falling(inputs: int = 16) -> dict[str, NDArray[np.float64]]:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 1.5, inputs)  # inputs differ far more than profiles
    means = {"tiny": 0.4, "p1": 0.3, "p2": 0.2, "max": 0.1}
    return {name: base * (m + 0.001 * rng.standard_normal(inputs)) for name, m in means.items()}


def test_a_chain_that_gets_better_keeps_every_profile() -> None:
    assert inversions(falling()) == []


def test_a_planted_inversion_is_dropped_and_told() -> None:
    drifts = falling()
    drifts["p2"] = 1.1 * drifts["p1"]  # far less than inputs differ, but on every one of them
    (found,) = inversions(drifts)
    assert (found.larger, found.smaller, found.inputs) == ("p2", "p1", 16)
    assert 0 < found.margin < found.drifts[0] - found.drifts[1]
    assert "profile 'p2' was dropped: it drifts more than the smaller 'p1'" in str(found)


def test_a_difference_within_its_interval_drops_nothing() -> None:
    drifts = falling()
    noise = np.random.default_rng(1).standard_normal(16)
    drifts["p2"] = drifts["p1"] + 0.2 * (noise - noise.mean()) + 0.02
    assert float((drifts["p2"] - drifts["p1"]).mean()) > 0
    assert inversions(drifts) == []


def test_a_bad_profile_does_not_shield_a_larger_one_that_is_bad_too() -> None:
    drifts = falling()
    drifts["p2"] = 1.5 * drifts["tiny"]
    drifts["max"] = 1.2 * drifts["tiny"]  # better than p2, worse than all that stay
    assert [found.larger for found in inversions(drifts)] == ["p2", "max"]


def test_few_inputs_judge_nothing() -> None:
    for inputs in range(1, LEAST_INPUTS):
        drifts = falling(inputs)
        drifts["p2"] = 2 * drifts["tiny"]
        assert inversions(drifts) == []
    drifts = falling(LEAST_INPUTS)
    drifts["p2"] = 2 * drifts["tiny"]
    assert len(inversions(drifts)) == 1


def test_a_constant_excess_is_an_inversion() -> None:
    drifts = {"tiny": np.full(8, 0.25), "max": np.full(8, 0.5)}
    assert [found.larger for found in inversions(drifts)] == ["max"]
    assert inversions({"tiny": np.full(8, 0.5), "max": np.full(8, 0.5)}) == []


def test_intervals_cover_what_they_claim() -> None:
    rng = np.random.default_rng(2)
    dropped = 0
    for _ in range(4000):  # two profiles that are equally good
        base = rng.uniform(0.5, 1.5, 8)
        drifts = {name: base + 0.1 * rng.standard_normal(8) for name in ("tiny", "max")}
        dropped += len(inversions(drifts))
    assert 0.015 < dropped / 4000 < 0.035  # one side of 95 %


@pytest.mark.parametrize(("freedom", "value"), [(4, 2.776), (7, 2.365), (15, 2.131), (500, 1.965)])
def test_quantiles_are_students(freedom: int, value: float) -> None:
    assert student(freedom) == pytest.approx(value, rel=0.01)


def planted() -> tuple[ElasticModel, Plan]:
    """A real chain in which the dense form of a layer is worse than its low ranks."""
    model = mlp()
    chosen = plan(model, more(model, 4), STEEP, profiles=4, seconds=math.inf)
    layer = model.layers["fc0"]
    dense = model.codes("fc0").dense
    assert dense is not None
    noise = np.random.default_rng(0).integers(-60, 60, dense.q.shape)
    harmed = np.clip(dense.q + noise, -127, 127).astype(np.int8)
    layer.set_codes("weight", Matrix(harmed, dense.scale))
    return model, chosen


def test_measured_quality_never_falls_along_the_chain_of_a_plan() -> None:
    model, chosen = planted()
    torch.manual_seed(7)
    held = more(model, 8, 3)
    told: list[str] = []
    found = api._observed(model, chosen, held, Notes(told.append), None)  # pyright: ignore
    drifts = [p.certificate.observed for p in found.chain]
    assert len(found.chain) < len(chosen.chain)
    assert all(
        a is not None and b is not None and a.mean >= b.mean for a, b in itertools.pairwise(drifts)
    )
    lost = {p.name for p in chosen.chain} - {p.name for p in found.chain}
    assert lost
    assert lost.isdisjoint(found.drift)
    for name in lost:
        assert any(f"profile {name!r} was dropped" in note for note in found.notes)
        assert any(f"profile {name!r} was dropped" in line for line in told)
