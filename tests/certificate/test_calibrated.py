"""Conformal bounds: the order statistic, honest coverage, monotone along the chain."""

import math

import numpy as np
import pytest

from t3c.certificate.calibrated import (
    calibrate,
    conformal_bound,
    coverage,
    draws,
    with_shifted,
)
from t3c.core.errors import CertificateError


def lognormal(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 1, count)


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


def test_draws_are_disjoint_hashed_and_each_covers_the_others() -> None:
    scores = lognormal(3, 900)
    digests = [f"{i:x}" for i in range(900)]
    kept = np.arange(900) % 10 > 0
    found = draws(scores, digests, (0.9, 0.99), kept, kept & (scores < 3))
    assert [d.inputs for d in found] == [300, 300, 300]
    assert len({d.sha256 for d in found}) == 3
    assert draws(scores, digests, (0.9,))[0].sha256 == found[0].sha256
    moved = [*digests[3:4], *digests[1:3], *digests[:1], *digests[4:]]  # inside the first draw
    again = draws(scores, moved, (0.9,))
    assert again[0].sha256 != found[0].sha256
    assert again[1].sha256 == found[1].sha256
    error = 3 * math.sqrt(0.9 * 0.1 * (1 / 300 + 1 / 600))
    for p, d in enumerate(found):
        assert all(abs(c - v) < error for c, v in zip(d.covered, (0.9, 0.99), strict=True))
        assert d.drift == pytest.approx(scores[p::3].mean())
        assert d.agreement == pytest.approx(0.9)
        assert d.accuracy is not None
        assert d.accuracy < 0.9


def test_a_draw_from_elsewhere_shows_in_its_coverage() -> None:
    """What holds on one draw only is seen: its bound covers the others too often or too seldom."""
    scores = lognormal(4, 900)
    scores[::3] /= 4
    first, second, _ = draws(scores, [""] * 900, (0.9,))
    assert first.covered[0] < 0.7
    assert second.covered[0] > 0.92


def test_few_inputs_are_not_split_into_draws() -> None:
    assert draws(np.ones(5), [""] * 5, (0.9,)) == ()


def test_shifted_data_are_measured_against_the_raised_bound() -> None:
    drift = {"tiny": np.linspace(0, 1, 99), "max": np.linspace(0, 2, 99)}
    found = with_shifted(calibrate(drift, drift, ""), {n: np.full(7, 1.5) for n in drift}, "cd")
    for one in found.values():
        assert one.shifted is not None
        assert one.shifted.coverage == (1.0, 1.0, 1.0)  # 1.5 is below the bounds of max
        assert (one.shifted.inputs, one.shifted.drift, one.shifted.sha256) == (7, 1.5, "cd")
    with pytest.raises(CertificateError, match="not all finite"):
        with_shifted(found, {"tiny": np.array([math.nan])}, "")
