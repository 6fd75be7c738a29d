"""The measured gate: noise never keeps a format, and profiles stay nested."""

from itertools import pairwise

import numpy as np
import pytest

from t3c.controller.verdict import judge, settle
from t3c.core.formats import Dense, Format, LowRank, at_most

Formats = dict[str, Format]
PROFILES: list[tuple[str, Formats]] = [
    ("tiny", {"a": LowRank(16), "b": LowRank(16)}),
    ("p1", {"a": LowRank(32), "b": LowRank(16)}),
    ("max", {"a": Dense(), "b": Dense()}),
]


def times(**ratios: float) -> dict[str, dict[str, np.ndarray]]:
    """Times relative to dense, on a machine whose speed changes from turn to turn."""
    rng = np.random.default_rng(0)
    pace = rng.uniform(1, 3, 40)
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, formats in PROFILES:
        for site, fmt in formats.items():
            share = 1.0 if isinstance(fmt, Dense) else ratios[f"{site}{int(fmt.ranks[0])}"]
            noise = rng.normal(1, 0.02, 40)
            found.setdefault(name, {})[site] = 1e-4 * share * pace * noise
    return found


def test_clear_wins_stay() -> None:
    verdicts = judge(PROFILES, times(a16=0.5, a32=0.8, b16=0.6))
    assert all(v.wins for (_, fmt), v in verdicts.items() if fmt != Dense())
    assert settle(PROFILES, verdicts) == PROFILES
    assert verdicts["a", LowRank(32)].ratio == pytest.approx(0.8, rel=0.03)
    assert verdicts["a", Dense()].ratio == 1.0


@pytest.mark.parametrize("share", [1.0, 1.3])
def test_what_does_not_win_turns_dense_in_larger_profiles_too(share: float) -> None:
    verdicts = judge(PROFILES, times(a16=share, a32=0.8, b16=0.6))
    lost = [key for key, v in verdicts.items() if not v.wins and key[1] != Dense()]
    assert lost == [("a", LowRank(16))]
    made = settle(PROFILES, verdicts)
    assert [formats["a"] for _, formats in made] == [Dense(), Dense()]
    assert [name for name, _ in made] == ["p1", "max"]  # tiny and p1 became equal
    for (_, small), (_, large) in pairwise(made):
        assert all(at_most(small[s], large[s]) for s in small)


def test_what_turns_dense_takes_the_width_of_the_largest() -> None:
    seconds = {"a": np.ones(5)}
    profiles: list[tuple[str, Formats]] = [("tiny", {"a": LowRank(16)}), ("max", {"a": Dense(4)})]
    made = settle(profiles, judge(profiles, {"tiny": seconds, "max": seconds}))
    assert made == [("max", {"a": Dense(4)})]


def test_a_smaller_rank_that_wins_stays() -> None:
    made = settle(PROFILES, judge(PROFILES, times(a16=0.5, a32=1.1, b16=0.6)))
    assert [formats["a"] for _, formats in made] == [LowRank(16), Dense(), Dense()]


def test_sites_without_a_dense_form_are_not_judged() -> None:
    profiles: list[tuple[str, Formats]] = [("max", {"a": LowRank(16), "b": Dense()})]
    seconds = np.ones(5)
    assert list(judge(profiles, {"max": {"a": seconds, "b": seconds}})) == [("b", Dense())]
