"""What was measured so far, in TVM's JSON database: a killed search goes on where it stopped.

TVM keeps a workload (a function) and, for each trial, a trace of schedule steps. Our workload is an
empty function whose attributes name the operator, the machine and the text of the rule's kernel:
measurements of another text are another workload's. Our trace is annotations of its root block.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t3c.codegen.kernels.schedule import Op, Scheduled
from t3c.codegen.script import read_function
from t3c.codegen.tune.machine import Machine
from t3c.codegen.tvm_api import meta_schedule, tvm
from t3c.core.artifact import write_atomic

WORKLOADS, RECORDS = "database_workload.json", "database_tuning_record.json"
_database: Any = meta_schedule.database


@dataclass(frozen=True, slots=True)
class Trial:
    """One measured schedule of one operator.

    Attributes:
        op: Key of the operator.
        schedule: Canonical text of the schedule (records.canonical).
        ratio: Median ratio to the rule's kernel, in one contest.
        seconds: Median of one call.
        settled: Whether a last contest chose this schedule, and the search is over for the
            operator.
    """

    op: str
    schedule: str
    ratio: float
    seconds: float
    settled: bool = False


class Trials:
    """The trials of one machine in one folder."""

    def __init__(
        self, folder: Path, machine: Machine, target: Any, say: Callable[[str], None]
    ) -> None:
        """Open the database, or begin it.

        Args:
            folder: Of the database.
            machine: This machine; trials of others are left alone.
            target: TVM's target of the kernels.
            say: Told what was repaired.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for note in repair(folder):
            say(note)
        self.machine = machine
        self.target = target
        self._database = _database.JSONDatabase(
            str(folder / WORKLOADS), str(folder / RECORDS), allow_missing=True
        )
        self._found: dict[tuple[str, str], list[Trial]] = {}
        for record in self._database.get_all_tuning_records():
            attrs = record.workload.mod["main"].attrs
            if str(attrs["t3c.machine"]) == machine.key:
                key = str(attrs["t3c.family"]), str(attrs["t3c.kernel"])
                self._found.setdefault(key, []).append(_trial(str(attrs["t3c.op"]), record))

    def of(self, family: Scheduled, op: Op) -> list[Trial]:
        """What was measured for an operator, with the kernel text of today."""
        found = self._found.get((family.name, _digest(family, op)), [])
        return [trial for trial in found if trial.op == op.key]

    def add(self, family: Scheduled, op: Op, trial: Trial) -> None:
        """Store one trial at once."""
        digest = _digest(family, op)
        module = _workload(op.key, family.name, self.machine.key, digest)
        schedule = tvm.s_tir.Schedule(module)
        root = schedule.get_sblock("root")
        for name in ("schedule", "ratio", "settled"):
            schedule.annotate(root, f"t3c.{name}", json.dumps(getattr(trial, name)))
        self._database.commit_tuning_record(
            _database.TuningRecord(
                schedule.trace,
                self._database.commit_workload(module),
                [trial.seconds],
                self.target,
                [],
            )
        )
        self._found.setdefault((family.name, digest), []).append(trial)


def _digest(family: Scheduled, op: Op) -> str:
    """Of the kernel that follows the rule."""
    source = family.with_records({}).kernel(op).source
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _workload(op: str, family: str, machine: str, digest: str) -> Any:
    """An empty function that stands for an operator."""
    return stand_in(
        {"t3c.op": op, "t3c.family": family, "t3c.machine": machine, "t3c.kernel": digest}
    )


def stand_in(attrs: Mapping[str, str]) -> Any:
    """A module of an empty function with a root block and these attributes."""
    function = read_function(
        '@T.prim_func(s_tir=True)\ndef main():\n    with T.sblock("root"):\n        T.evaluate(0)\n'
    )
    return tvm.IRModule({"main": function.with_attrs(dict(attrs))})


def _trial(op: str, record: Any) -> Trial:
    """The trial that a trace describes."""
    notes = {
        str(step.attrs[0]): json.loads(str(step.inputs[1]))
        for step in record.trace.insts
        if str(step.kind.name) == "Annotate"
    }
    return Trial(
        op,
        notes["t3c.schedule"],
        float(notes["t3c.ratio"]),
        float(record.run_secs[0]),
        bool(notes["t3c.settled"]),
    )


def repair(folder: Path) -> list[str]:
    """Take lines that are no JSON out of a database, which TVM would refuse whole.

    A process that is killed while it writes leaves half a line. Bad lines go to ``*.rejected``;
    records name their workload by its line, so those of later workloads are renumbered.

    Returns:
        What was done, a line for each file.
    """
    notes: list[str] = []
    workloads = _sound(folder / WORKLOADS, notes)
    records = _sound(folder / RECORDS, notes)
    place = {old: new for new, old in enumerate(workloads)}
    kept = {}
    for number, line in records.items():
        workload, *rest = json.loads(line)
        if workload in place:
            kept[number] = json.dumps([place[workload], *rest])
    if notes:
        _replace(folder / WORKLOADS, list(workloads.values()))
        _replace(folder / RECORDS, list(kept.values()))
    return notes


def _sound(path: Path, notes: list[str]) -> dict[int, str]:
    """Line number -> line that is a JSON list; the others are moved aside."""
    if not path.exists():
        return {}
    text = path.read_text(errors="replace")
    good: dict[int, str] = {}
    bad: list[str] = []
    for number, line in enumerate(text.splitlines()):
        try:
            sound = isinstance(json.loads(line), list)
        except ValueError:
            sound = False
        if sound:
            good[number] = line
        else:
            bad.append(line)
    if bad or (text and not text.endswith("\n")):
        aside = path.with_name(f"{path.name}.rejected")
        with aside.open("a") as stream:
            stream.writelines(f"{line}\n" for line in bad)
        notes.append(f"{path}: {len(bad)} damaged line(s) moved to {aside.name}")
    return good


def _replace(path: Path, lines: list[str]) -> None:
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
