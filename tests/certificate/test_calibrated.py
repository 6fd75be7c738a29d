"""Conformal bounds: the order statistic, honest coverage, monotone along the chain."""

import math

import numpy as np
import pytest

from t3c.certificate.calibrated import calibrate, conformal_bound, coverage
from t3c.core.errors import CertificateError


def test_the_bound_is_an_order_statistic() -> None:
    scores = np.arange(1.0, 20.0)  # 19 of them: (19 + 1) * .9 = 18
    assert conformal_bound(scores, 0.9) == 18.0
    assert conformal_bound(scores, 0.95) == 19.0
    assert conformal_bound(scores, 0.99) == math.inf
    assert conformal_bound(np.array([2.0]), 0.5) == 2.0


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_coverage_over_many_splits_is_what_was_promised(level: float) -> None:
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(400):
        scores = rng.lognormal(0, 1, 60)
        hits.append((rng.lognormal(0, 1, 200) <= conformal_bound(scores, level)).mean())
    error = np.std(hits) / math.sqrt(len(hits))
    assert level - 3 * error <= np.mean(hits) <= level + 1 / 61 + 3 * error


def test_each_third_is_tested_by_the_others() -> None:
    scores = np.random.default_rng(1).random(300)
    assert len(coverage(scores, 0.9)) == 3
    assert all(0.8 < share <= 1.0 for share in coverage(scores, 0.9))
    shifted = np.where(np.arange(300) % 3 == 0, 10.0, scores)  # a third from elsewhere
    assert coverage(shifted, 0.5)[0] == 0.0
    assert coverage(np.ones(3), 0.9) == ()


def test_smaller_profiles_never_promise_less_drift() -> None:
    rng = np.random.default_rng(2)
    drift = {"tiny": rng.random(99), "p1": 3 * rng.random(99), "max": rng.random(99) / 10}
    found = calibrate(drift, {**drift, "max": np.zeros(99)}, "ab" * 32)
    for level in (0.9, 0.95, 0.99):
        tiny, p1, most = (found[n].at(level) for n in drift)
        assert tiny is not None
        assert p1 is not None
        assert most is not None
        assert tiny.raw < p1.raw
        assert tiny.value == p1.value == p1.raw > most.value
        assert most.teacher == 0.0
    assert found["tiny"].inputs == 99
    assert found["tiny"].at(0.5) is None


@pytest.mark.parametrize("scores", [np.array([]), np.array([1.0, math.nan])])
def test_scores_that_say_nothing_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(CertificateError, match=r"profile .max.: .* scores, not all finite"):
        calibrate({"max": scores}, {"max": scores}, "")


def test_levels_are_shares() -> None:
    with pytest.raises(ValueError, match=r"level is 90; need a share"):
        conformal_bound(np.ones(3), 90)
