"""A search finds what is faster, goes on after a kill, and never lets noise choose."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest

from t3c.codegen.kernels.schedule import Op
from t3c.codegen.tune import search
from t3c.codegen.tune.measure import ratio
from t3c.codegen.tune.model import LEAST, Ranking, features
from t3c.codegen.tune.records import read
from t3c.codegen.tune.search import RECORDS, Task, Tuner
from t3c.codegen.tvm_api import make_target
from t3c.core.errors import LoweringError
from tests.codegen.tune.families import MACHINE, OP, CountFamily, Rounds

TARGET = make_target({"kind": "llvm"})


def tuner(folder: Path, notes: list[str] | None = None) -> Tuner:
    say = print if notes is None else notes.append
    return Tuner(TARGET, MACHINE, folder, say)


def quiet(what: str, done: int, total: int) -> None:
    """No terminal."""


def test_the_fastest_schedule_becomes_the_record(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    task = Task(CountFamily(), OP, 1)
    notes: list[str] = []
    tuner(tmp_path, notes).run([task], 0.5, lambda *step: seen.append(step))
    found = read(tmp_path / RECORDS, [CountFamily()], MACHINE, ()).records[OP.key]
    assert found.schedule == Rounds(20, 0)
    assert found.ratio < 0.5
    assert task.settled
    assert seen[0] == ("tune kernels", 0, 30)
    assert seen[-1] == ("tune kernels", 30, 30)
    assert ["cannot be built" in note for note in notes] == [True]


def test_a_second_search_measures_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner(tmp_path).run([Task(CountFamily(), OP, 1)], 0.5, quiet)
    before = (tmp_path / RECORDS).read_text()
    monkeypatch.setattr(Tuner, "_contest", lambda *_: pytest.fail("measured again"))
    tuner(tmp_path).run([Task(CountFamily(), OP, 1)], 0.5, quiet)
    assert (tmp_path / RECORDS).read_text() == before


def test_a_killed_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BATCH", 2)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tuner, "_learn", killed)
        with pytest.raises(KeyboardInterrupt):
            tuner(tmp_path).run([Task(CountFamily(), OP, 1)], 0.5, quiet)
    task = Task(CountFamily(), OP, 1)
    tuner(tmp_path).run([task], 0.5, quiet)
    assert task.settled
    found = read(tmp_path / RECORDS, [CountFamily()], MACHINE, ()).records[OP.key]
    assert found.schedule == Rounds(20, 0)


def test_when_the_time_is_over_what_was_begun_gets_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0.0, 20.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    tasks = [Task(CountFamily(), OP, 9), Task(CountFamily(), Op.of("count", n=8), 1)]
    tuner(tmp_path).run(tasks, 0.5, quiet)
    assert [t.settled for t in tasks] == [False, False]
    assert list(read(tmp_path / RECORDS, [CountFamily()], MACHINE, ()).records) == [OP.key]


def test_a_rule_that_cannot_be_built_is_an_error(tmp_path: Path) -> None:
    class Broken(CountFamily):
        def default(self, op: Op) -> Rounds:
            return Rounds(1, 1)

    with pytest.raises(LoweringError, match="count: the kernel of 'count n=64' cannot be built"):
        tuner(tmp_path).run([Task(Broken(), OP, 1)], 0.5, quiet)


def test_equal_kernels_under_noise_are_not_told_apart() -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        base, same = (1 + 0.1 * rng.standard_exponential(40) for _ in range(2))
        wrong += ratio(same, base).high < search.WORTH
    assert wrong <= 6  # one-sided 2.5 % at most, and less for the margin


def test_the_interval_holds_the_median() -> None:
    found = ratio(np.arange(1.0, 12.0), np.ones(11))
    assert (found.low, found.median, found.high) == (3.0, 6.0, 9.0)


def test_sizes_of_zero_are_features_too() -> None:
    padded = Op.of("conv", c=16, p=0)
    assert np.isfinite(features(padded, Rounds(100, 0))).all()


def test_the_model_orders_schedules_by_what_it_has_seen() -> None:
    ops = [Op.of("count", n=n) for n in (8, 16, 32, 64, 128, 256)]
    choices = {str(r): Rounds(r, 0) for r in (20, 100, 400, 1000, 4000)}
    model = Ranking()
    assert model.order(OP, list(choices), choices) == []
    samples = [(op, s, s.rounds / 1000) for op in ops for s in choices.values()]
    model.fit(samples[: LEAST - 1])
    assert model.order(OP, list(choices), choices) == []
    model.fit(samples)
    order = model.order(Op.of("count", n=100), list(choices), choices)
    assert order[0] in ("20", "100")
    assert order[-1] == "4000"
