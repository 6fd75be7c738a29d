"""Pareto plots list what is dominated and draw all of it; traces show calls and profiles."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from t3c.core.certificate import Certificate
from t3c.core.errors import TargetError
from t3c.cost_models.scores import Guess
from t3c.report.plots import (
    Axes,
    Point,
    Series,
    Trace,
    chain,
    dominated,
    drifts,
    pareto,
    predictions,
    trace,
)
from tests.runtime import toy

OURS = Series("T3C", (Point("tiny", 1, 70), Point("max", 3, 80)), chain=True)
THEIRS = Series("other", (Point("int8", 3, 75), Point("twin", 1, 70), Point("best", 0.5, 60)))
AXES = Axes("p50 ms", "top-1 %", "one device")


def test_beaten_points_are_listed_with_what_beats_them() -> None:
    assert dominated([OURS, THEIRS]) == [("other", "int8", "T3C max")]


def test_equal_points_do_not_beat_each_other() -> None:
    assert dominated([Series("a", (Point("x", 1, 1),)), Series("b", (Point("y", 1, 1),))]) == []


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_picture_is_written(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra: plot)")
    path = pareto([OURS, THEIRS], tmp_path / f"p.{ending}", AXES)
    assert path.stat().st_size > 1000


def test_the_same_picture_has_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra: plot)")
    log = Axes("ms", "%", log_cost=True)
    first, second = (pareto([OURS], tmp_path / f"{i}.svg", log).read_text() for i in (1, 2))
    assert first == second


def test_a_trace_of_calls_is_written_and_has_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra: plot)")
    times = tuple(float(i) for i in range(10))
    traces = [
        Trace("fixed", times, times),
        Trace("governed", times, times, ("tiny", "max") * 5, follow=True),
    ]

    first, second = (
        trace(
            traces, tmp_path / f"{i}.svg", budget_ms=4.0, loads=[(2, 5)], names=("tiny", "max")
        ).read_text()
        for i in (1, 2)
    )
    assert first == second
    assert len(first) > 5000


def test_drift_against_latency_and_bytes_has_intervals_and_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra: plot)")
    rows = drifts([toy.profile(name) for name in toy.NAMES])
    assert [(row.name, row.p50_ms, row.p95_ms) for row in rows] == [
        ("tiny", 0.5, 1.0),
        ("max", 1.0, 2.0),
    ]
    assert [(row.mean, row.p95, row.bound) for row in rows] == [(0.1, 0.2, None), (0.1, 0.2, 0.1)]
    first, second = (chain(rows, tmp_path / f"{i}.svg", "toy").read_text() for i in (1, 2))
    assert first == second
    costly = [replace(row, millijoules=3.0) for row in rows]
    assert len(chain(costly, tmp_path / "e.svg").read_text()) > len(first)
    untimed = replace(toy.profile("max"), latency=None)
    assert chain(drifts([untimed]), tmp_path / "u.svg").stat().st_size > 1000


def test_predictions_are_drawn_with_their_intervals_or_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib (extra: plot)")
    guesses = [Guess(1e-3 * i, 1.1e-3 * i, 0.9e-3 * i, 1.2e-3 * i) for i in range(1, 9)]
    kinds = {"kernels": guesses, "networks": guesses[:2]}
    first, second = (predictions(kinds, tmp_path / f"{i}.svg").read_text() for i in (1, 2))
    assert first == second
    assert len(first) > 10_000
    with pytest.raises(ValueError, match="measure more layers and networks"):
        predictions({}, tmp_path / "none.svg")


def test_a_chain_without_observed_drift_is_refused(tmp_path: Path) -> None:
    bare = replace(toy.profile("max"), certificate=Certificate())
    assert drifts([bare]) == []
    with pytest.raises(ValueError, match="no profile has observed drift"):
        chain([], tmp_path / "p.svg")


def test_without_matplotlib_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TargetError, match=r"pip install t3c\[plot\]"):
        pareto([OURS], tmp_path / "p.svg", AXES)
