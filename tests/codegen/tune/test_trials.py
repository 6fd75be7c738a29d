"""The database of trials: found again, kept apart, repaired."""

from dataclasses import replace
from pathlib import Path

from t3c.codegen.kernels.schedule import Op
from t3c.codegen.tune.records import canonical
from t3c.codegen.tune.trials import RECORDS, WORKLOADS, Trial, Trials
from t3c.codegen.tvm_api import make_target
from tests.codegen.tune.families import MACHINE, OP, CountFamily, Rounds

TARGET = make_target({"kind": "llvm"})
OTHER = Op.of("count", n=8)


class Slower(CountFamily):
    def default(self, op: Op) -> Rounds:
        return Rounds(4000, 0)


def trial(op: Op, rounds: int, *, settled: bool = False) -> Trial:
    return Trial(op.key, canonical(Rounds(rounds, 0).record()), rounds / 1000, 1e-5, settled)


def store(folder: Path) -> None:
    trials = Trials(folder, MACHINE, TARGET, print)
    trials.add(CountFamily(), OP, trial(OP, 20))
    trials.add(CountFamily(), OTHER, trial(OTHER, 100))
    trials.add(CountFamily(), OP, trial(OP, 400, settled=True))


def reopen(folder: Path, notes: list[str]) -> Trials:
    return Trials(folder, MACHINE, TARGET, notes.append)


def test_a_new_process_finds_what_was_stored(tmp_path: Path) -> None:
    store(tmp_path)
    notes: list[str] = []
    trials = reopen(tmp_path, notes)
    found = sorted(trials.of(CountFamily(), OP), key=lambda t: t.ratio)
    assert found == [trial(OP, 20), trial(OP, 400, settled=True)]
    assert trials.of(CountFamily(), OTHER) == [trial(OTHER, 100)]
    assert notes == []


def test_trials_of_another_machine_or_another_kernel_text_do_not_count(tmp_path: Path) -> None:
    store(tmp_path)
    assert Trials(tmp_path, replace(MACHINE, l2_kb=1), TARGET, print).of(CountFamily(), OP) == []
    assert reopen(tmp_path, []).of(Slower(), OP) == []


def test_half_a_line_at_the_end_is_moved_aside(tmp_path: Path) -> None:
    store(tmp_path)
    with (tmp_path / RECORDS).open("a") as stream:
        stream.write('[0, [[["Get')
    notes: list[str] = []
    trials = reopen(tmp_path, notes)
    assert len(trials.of(CountFamily(), OP)) == 2
    assert "1 damaged line(s) moved to" in notes[0]
    assert (tmp_path / f"{RECORDS}.rejected").read_text() == '[0, [[["Get\n'
    trials.add(CountFamily(), OP, trial(OP, 4000))
    assert len(reopen(tmp_path, notes).of(CountFamily(), OP)) == 3
    assert len(notes) == 1


def test_a_damaged_workload_loses_its_own_trials_only(tmp_path: Path) -> None:
    store(tmp_path)
    first, *rest = (tmp_path / WORKLOADS).read_text().splitlines()
    (tmp_path / WORKLOADS).write_text("\n".join([first[:50], *rest]) + "\n")
    notes: list[str] = []
    trials = reopen(tmp_path, notes)
    assert trials.of(CountFamily(), OP) == []
    assert trials.of(CountFamily(), OTHER) == [trial(OTHER, 100)]
    assert len(notes) == 1
