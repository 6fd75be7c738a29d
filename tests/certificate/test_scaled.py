"""Bounds for each input: they cover what they promise, and are tighter where outputs tell."""

import math
from typing import Any

import numpy as np
import pytest

from t3c.certificate.labels import Classes
from t3c.certificate.library import Scores
from t3c.certificate.scaled import each_input, per_input, ridge
from t3c.core.errors import CertificateError
from t3c.core.per_input import DIRECTIONS, features, widened

GOLDEN = (
    0.04201006613406605,
    0.11419519938459449,
    0.8437947344813395,
    0.0,
    2.514333275315112,
    0.9131609761919233,
    0.659142575587815,
)
"""Probabilities and directions of the scores 1, 2, 4."""


def sample(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of 8 classes, and drift that grows with the first one."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1, (count, 8))
    return z, np.exp(z[:, 0]) * rng.lognormal(0, 0.2, count)


def test_coverage_over_many_draws_is_what_was_promised() -> None:
    hits = []
    for seed in range(80):
        z, drift = sample(200, seed)
        found = per_input(features([z], 200), drift, (0.9,))
        assert found is not None
        fresh, off = sample(200, seed + 1000)
        hits.append((off <= found.bound([fresh], 0.9, 200)).mean())
    error = np.std(hits) / math.sqrt(len(hits))
    assert 0.9 - 3 * error <= np.mean(hits) <= 0.9 + 1 / 101 + 3 * error


def test_coverage_holds_whatever_other_data_taught() -> None:
    z, drift = sample(120, 0)
    wrong = drift[::-1]  # teaches nothing that is true
    other = features([3 * z + 1], 120), 7 * drift
    hits: dict[str, list[float]] = {"wrong": [], "other": []}
    for seed in range(40):
        z, drift = sample(100, seed + 2000)
        fresh, off = sample(400, seed + 3000)
        taught = {"wrong": (other[0], wrong), "other": other}
        for name, one in taught.items():
            found = per_input(features([z], 100), drift, (0.9,), scores=True, taught=one)
            assert found is not None
            assert (found.inputs, found.taught, found.directions) == (100, 120, DIRECTIONS)
            hits[name].append((off <= found.bound([fresh], 0.9, 400)).mean())
    for shares in hits.values():
        error = np.std(shares) / math.sqrt(len(shares))
        assert 0.9 - 3 * error <= np.mean(shares) <= 0.9 + 1 / 101 + 3 * error


def test_directions_learn_what_no_linear_form_of_scores_says() -> None:
    rng = np.random.default_rng(8)
    z = rng.normal(0, 1, (3000, 6))
    drift = np.exp(np.abs(z[:, 0] - z[:, 1])) * rng.lognormal(0, 0.05, 3000)
    seen = features([z], 3000)
    ratios = []
    for scores in (False, True):
        made = per_input(seen[1000:], drift[1000:], (0.9,), scores=scores)
        assert made is not None
        ratios.append(float(np.median(made.bound([z[:1000]], 0.9, 1000) / drift[:1000])))
    assert ratios[1] < 1.45 < 1.6 < ratios[0]


def test_directions_are_the_same_everywhere() -> None:
    wide = widened(features([np.array([[1.0, 2.0, 4.0]])], 1), 4)
    assert wide.shape == (1, 3 * 3 + 7 + 4)
    np.testing.assert_allclose(wide[0, -7:], GOLDEN, rtol=1e-12)


def held(count: int, seed: int) -> Scores:
    """Of one profile ``max`` whose outputs are class scores."""
    z, drift = sample(count, seed)
    names = tuple(f"{seed} {i}" for i in range(count))
    classes: Any = Classes
    return Scores({"max": drift}, {"max": 0 * drift}, {"max": features([z], count)}, names, classes)


def test_inputs_that_teach_are_enough_and_others_than_those_held_out() -> None:
    found = each_input(held(120, 1), (0.9,), held(100, 2))["max"]
    assert found is not None
    assert (found.inputs, found.taught, found.directions) == (120, 100, DIRECTIONS)
    assert each_input(held(99, 1), (0.9,), held(100, 2)) == {"max": None}
    halves = each_input(held(200, 1), (0.9,))["max"]
    assert halves is not None
    assert (halves.inputs, halves.taught) == (100, 0)
    with pytest.raises(CertificateError, match="99 inputs teach; give 100 or more, or none"):
        each_input(held(120, 1), (0.9,), held(99, 2))
    with pytest.raises(CertificateError, match="120 inputs teach and are held out; bounds would"):
        each_input(held(120, 1), (0.9,), held(130, 1))


def test_outputs_that_tell_make_bounds_tighter() -> None:
    z, drift = sample(2000, 1)
    found = per_input(features([z], 2000), drift, (0.9,))
    assert found is not None
    assert found.inputs == 1000
    plain = float(np.quantile(drift, 0.9) / np.median(drift))
    assert found.ratios[0] < 1.5 < 3 < plain
    fresh, off = sample(2000, 2)
    again = float(np.median(found.bound([fresh], 0.9, 2000) / off))
    assert found.ratios[0] == pytest.approx(again, rel=0.05)


def test_predictions_stay_within_what_was_learned_from() -> None:
    z, drift = sample(400, 3)
    found = per_input(features([z], 400), drift, (0.9,))
    assert found is not None
    far = found.bound([100 * z], 0.9, 400)
    assert np.isfinite(far).all()
    assert far.max() <= found.factors[0] * math.exp(found.high) * (1 + 1e-12)


def test_few_inputs_and_no_drift_give_none() -> None:
    z, drift = sample(199, 4)
    assert per_input(features([z], 199), drift, (0.9,)) is None
    z, drift = sample(400, 4)
    assert per_input(features([z], 400), np.zeros(400), (0.9,)) is None
    most = np.where(np.arange(400) % 4 == 0, 0.0, drift)
    assert per_input(features([z], 400), most, (0.9,)) is not None


def test_levels_beyond_the_data_have_no_finite_bound() -> None:
    z, drift = sample(200, 5)
    found = per_input(features([z], 200), drift, (0.9, 0.999))
    assert found is not None
    assert found.factors[1] == found.ratios[1] == math.inf
    with pytest.raises(CertificateError, match=r"no bound at level 0\.5; there are 0\.9, 0\.999"):
        found.bound([z], 0.5, 200)
    with pytest.raises(CertificateError, match=r"outputs give 11 features, .* from 21"):
        found.bound([z[:, :3]], 0.9, 200)


def test_ridge_finds_a_line_and_ignores_a_constant_column() -> None:
    x = np.random.default_rng(6).normal(0, [1, 10, 0], (500, 3))
    weights, offset = ridge(x, 2 * x[:, 0] - 0.5 * x[:, 1] + 3)
    np.testing.assert_allclose(weights, [2, -0.5, 0], atol=0.02)
    assert offset == pytest.approx(3, abs=0.05)


def test_features_are_those_of_each_input_alone() -> None:
    y = np.random.default_rng(7).normal(0, 1, (4, 5, 6))
    whole = features([y], 4)
    assert whole.shape == (4, 13)
    for i in range(4):
        np.testing.assert_allclose(whole[i], features([y[i]], 1)[0])
    np.testing.assert_allclose(whole[:, 1:7], y.mean(1))
    assert features([np.ones((2, 600))], 2).shape == (2, 1)  # wide: its norm alone
    assert features([np.float32(3.0), np.ones(4)], 1).shape == (1, 3 + 13)


def test_equal_scores_give_finite_features() -> None:
    assert np.isfinite(features([np.zeros((3, 4))], 3)).all()
