"""The search: operator by operator, few measurements, and a last contest that decides.

Every contest has the rule's kernel in it. A candidate replaces the rule only if, measured once more
in fresh order, the whole interval of its median ratio lies below `WORTH`.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from t3c.codegen.kernels.schedule import Op, Schedule, Scheduled
from t3c.codegen.script import read_function
from t3c.codegen.tune.inproc import Builder, Runner, Shop
from t3c.codegen.tune.machine import Machine
from t3c.codegen.tune.measure import Times, ratio
from t3c.codegen.tune.model import Ranking
from t3c.codegen.tune.records import Record, canonical, choices, write
from t3c.codegen.tune.trials import Trial, Trials
from t3c.codegen.tvm_api import meta_schedule, tvm
from t3c.core.errors import LoweringError

BATCH = 8
"""Candidates of one contest."""
GUESSES = 6
"""Of these, how many the model names; the others are drawn at random."""
PATIENCE = 16
"""Trials without a better one after which an operator's search ends."""
MOST = 64
"""Trials after which it ends in any case."""
FINALISTS = 3
WORTH = 0.98
"""Ratio to the rule below which a schedule is worth a record."""
UNBUILT = 9.0
"""Ratio that stands for a kernel that cannot be built."""
TRIAL = (0.35, (6, 20))
"""Seconds and turns of a contest of candidates."""
FINAL = (1.0, (25, 60))
"""Seconds and turns of a last contest."""
FINAL_S = 2.5
"""Kept of the time for the last contest of each operator: three kernels built, one contest."""

RECORDS = "records.jsonl"
"""The file in the folder of a search that holds its results."""
Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Task:
    """One operator of a network.

    Attributes:
        family: Its kernel family.
        op: The operator.
        calls: How often the network's profiles call it.
    """

    family: Scheduled
    op: Op
    calls: int
    choices: dict[str, Schedule] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    stale: int = 0
    settled: bool = False

    def __post_init__(self) -> None:
        """List the schedules."""
        self.choices = choices(self.family, self.op)

    @property
    def rule(self) -> str:
        """Canonical text of the rule's schedule."""
        return canonical(self.family.default(self.op).record())

    @property
    def open(self) -> list[str]:
        """Schedules that were not measured."""
        return [c for c in self.choices if c not in self.seen and c != self.rule]

    @property
    def exhausted(self) -> bool:
        """Whether more measurements are not worth their time."""
        return not self.open or self.stale >= PATIENCE or len(self.seen) >= MOST

    def note(self, schedule: str, value: float) -> None:
        """Count one trial."""
        better = value < 0.995 * min(self.seen.values(), default=1.0)
        self.stale = 0 if better else self.stale + 1
        self.seen[schedule] = value


class Tuner:
    """A search for one target on this machine."""

    def __init__(
        self,
        target: Any,
        machine: Machine,
        folder: Path,
        say: Callable[[str], None],
        *,
        random: bool = False,
    ) -> None:
        """Open the database of `folder`.

        Args:
            target: TVM target.
            machine: This machine.
            folder: Of the trials and of ``records.jsonl``.
            say: Told what could not be built or read.
            random: Draw candidates at random only (to compare).
        """
        self.target = target
        self.machine = machine
        self.folder = folder
        self.say = say
        self.random = random
        self.trials = Trials(folder, machine, target, say)
        self.rng = np.random.default_rng(0)
        self._tasks: Sequence[Task] = ()
        self._rankings: dict[tuple[str, str], Ranking] = {}

    def run(self, tasks: Sequence[Task], minutes: float, progress: Progress) -> None:
        """Search until the time is over or every operator is settled; records go to the folder.

        Operators that take most time go first; all get a first batch before any gets a second.
        """
        start = time.monotonic()
        total = max(1, int(60 * minutes))
        self._tasks = tasks
        self._resume()
        waiting = [t for t in tasks if not t.settled]
        waiting.sort(key=lambda t: t.calls * _work(t.op), reverse=True)
        while waiting:
            for task in list(waiting):
                left = total - (time.monotonic() - start)
                progress("tune kernels", min(total, int(total - left)), total)
                unsettled = sum(1 for t in waiting if t.seen)
                if left < FINAL_S * (unsettled + 1):
                    self._close(waiting, total - left, total, progress)
                    progress("tune kernels", total, total)
                    return
                if task.exhausted:
                    self._settle(task, settled=True)
                    waiting.remove(task)
                else:
                    self._batch(task)
            waiting.sort(key=lambda t: t.calls * t.seconds, reverse=True)
        progress("tune kernels", total, total)

    def _close(self, waiting: Sequence[Task], spent: float, total: int, progress: Progress) -> None:
        """Last contests for whatever was begun; its search goes on in the next run."""
        begun = [t for t in waiting if t.seen]
        for i, task in enumerate(begun):
            progress("tune kernels", min(total, int(spent + i * FINAL_S)), total)
            self._settle(task, settled=False)

    def _resume(self) -> None:
        """Take over what the database holds."""
        for task in self._tasks:
            for trial in self.trials.of(task.family, task.op):
                task.settled |= trial.settled
                if trial.schedule == task.rule:
                    task.seconds = trial.seconds
                elif trial.schedule in task.choices:
                    task.note(trial.schedule, trial.ratio)
        for task in {(t.family.name, t.op.kind): t for t in self._tasks}.values():
            self._learn(task)

    def _batch(self, task: Task) -> None:
        """One contest of candidates against the rule and the best so far."""
        picked = self._pick(task)
        best = min(task.seen, key=lambda c: task.seen[c], default=task.rule)
        also = [] if best == task.rule else [best]
        times = self._contest(task, [task.rule, *also, *picked], TRIAL)
        base = times[task.rule]
        task.seconds = float(np.median(base))
        for name in picked:
            if name not in times:
                task.note(name, UNBUILT)
                continue
            value, seconds = ratio(times[name], base).median, float(np.median(times[name]))
            task.note(name, value)
            self.trials.add(task.family, task.op, Trial(task.op.key, name, value, seconds))
        self._learn(task)

    def _pick(self, task: Task) -> list[str]:
        """Schedules to measure next: an older record, the model's guesses, some at random."""
        unseen = task.open
        count = min(BATCH, len(unseen))
        known = canonical(task.family.pick(task.op).record())
        picked = [known] if known in unseen else []
        ranking = None if self.random else self._ranking(task)
        if ranking is not None:
            picked += [n for n in ranking.order(task.op, unseen, task.choices) if n not in picked]
            picked = picked[:GUESSES]
        rest = [name for name in unseen if name not in picked]
        drawn = self.rng.permutation(len(rest))[: count - len(picked)]
        return [*picked, *(rest[int(i)] for i in drawn)][:count]

    def _ranking(self, task: Task) -> Ranking:
        return self._rankings.setdefault((task.family.name, task.op.kind), Ranking())

    def _learn(self, task: Task) -> None:
        """Fit the model of a task's kind to all that was measured."""
        if self.random:
            return
        alike = [
            t for t in self._tasks if (t.family.name, t.op.kind) == (task.family.name, task.op.kind)
        ]
        samples = [(t.op, t.choices[n], v) for t in alike for n, v in t.seen.items()]
        self._ranking(task).fit(samples)

    def _settle(self, task: Task, *, settled: bool) -> None:
        """The last contest of an operator, and its record."""
        best = sorted(task.seen, key=lambda c: task.seen[c])[:FINALISTS]
        winner, seconds, value = task.rule, task.seconds, 1.0
        if best:
            times = self._contest(task, [task.rule, *best], FINAL)
            base = times[task.rule]
            seconds = float(np.median(base))
            for name in best:
                found = ratio(times[name], base) if name in times else None
                if found is not None and found.high < WORTH and found.median < value:
                    winner, value = name, found.median
        task.settled = settled
        trial = Trial(task.op.key, winner, value, value * seconds, settled)
        self.trials.add(task.family, task.op, trial)
        schedule, us = task.choices[winner], value * seconds * 1e6
        record = Record(task.family.name, task.op, schedule, value, us)
        write(self.folder / RECORDS, self.machine, [record])

    def _contest(
        self, task: Task, names: Sequence[str], limits: tuple[float, tuple[int, int]]
    ) -> dict[str, Times]:
        """Seconds of each schedule's kernel, without those that cannot be built.

        Raises:
            LoweringError: The first one, the rule's, cannot be built.
        """
        shop = Shop()
        built = Builder(shop).build([self._input(task, task.choices[name]) for name in names])
        paths = {}
        for name, result in zip(names, built, strict=True):
            if result.error_msg is None:
                paths[name] = result.artifact_path
            else:
                self.say(f"{task.op.key}: schedule {name} cannot be built: {result.error_msg}")
        if names[0] not in paths:
            raise LoweringError(
                f"{task.family.name}: the kernel of {task.op.key!r} cannot be built: "
                f"{built[0].error_msg}"
            )
        given = [meta_schedule.runner.RunnerInput(p, "cpu", []) for p in paths.values()]
        results = [future.result().run_secs for future in Runner(shop, *limits).run(given)]
        return {
            name: np.array([float(s) for s in seconds])
            for name, seconds in zip(paths, results, strict=True)
        }

    def _input(self, task: Task, schedule: Schedule) -> Any:
        kernel = task.family.with_records({task.op.key: schedule}).kernel(task.op)
        function = read_function(kernel.source).with_attr("tirx.is_scheduled", True)
        module = tvm.IRModule({kernel.name: function})
        return meta_schedule.builder.BuilderInput(module, self.target)


def _work(op: Op) -> float:
    """A first guess at what an operator costs: the product of its three largest sizes."""
    return float(math.prod(sorted(size for _, size in op.sizes)[-3:]))
