"""How many trials the cost model saves, compared with drawing schedules at random.

    python benchmarks/tuning_model.py [--target x86-vnni]

Measures every schedule of a few operators in contests against the rule's, then replays searches on
that table, --searches times with other random numbers: batches as in the search, once with the
model (which has seen the other operators, as in a network, or nothing) and once without. Printed
is the mean number of trials until a schedule within 1 % of the best of the table was measured.
Written into tuning.json.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tuning import store

from t3c import targets
from t3c.codegen.families import families_of, scheduled
from t3c.codegen.kernels.schedule import Op
from t3c.codegen.tune.machine import this_machine
from t3c.codegen.tune.measure import ratio
from t3c.codegen.tune.model import Ranking, Sample
from t3c.codegen.tune.search import BATCH, GUESSES, TRIAL, Task, Tuner
from t3c.codegen.tvm_api import make_target
from t3c.targets.base import TargetSpec

OPS = (
    Op.of("dense", m=197, n=768, k=192),
    Op.of("dense", m=50, n=384, k=384),
    Op.of("dense", "gelu", m=64, n=512, k=128),
    Op.of("dense", m=20, n=1000, k=256),
)
NEAR = 1.01
Table = dict[str, float]


def table(task: Task, tuner: Tuner) -> Table:
    """Ratio to the rule of every schedule."""
    found = {task.rule: 1.0}
    names = task.open
    for start in range(0, len(names), BATCH):
        batch = names[start : start + BATCH]
        times = tuner._contest(task, [task.rule, *batch], TRIAL)
        base = times[task.rule]
        found |= {name: ratio(times[name], base).median for name in batch if name in times}
    return found


def replay(
    task: Task, known: Table, others: Sequence[Sample], rng: np.random.Generator, *, model: bool
) -> int:
    """Trials until a schedule within `NEAR` of the best is found."""
    goal = NEAR * min(known.values())
    seen: Table = {task.rule: 1.0}
    while min(seen.values()) > goal:
        unseen = [name for name in known if name not in seen]
        picked: list[str] = []
        if model:
            ranking = Ranking()
            ranking.fit([*others, *samples(task, seen)])
            picked = ranking.order(task.op, unseen, task.choices)[:GUESSES]
        rest = [name for name in unseen if name not in picked]
        drawn = rng.permutation(len(rest))[: BATCH - len(picked)]
        for name in [*picked, *(rest[int(i)] for i in drawn)]:
            seen[name] = known[name]
            if known[name] <= goal:
                break
    return len(seen) - 1


def samples(task: Task, known: Mapping[str, float]) -> list[Sample]:
    """What the model learns from."""
    return [(task.op, task.choices[name], value) for name, value in known.items()]


def main() -> None:
    """Measure, replay, JSON."""
    parser = argparse.ArgumentParser(description="The cost model against random search.")
    parser.add_argument("--target", default="x86-vnni")
    parser.add_argument("--searches", type=int, default=20)
    options = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = "1"
    spec: TargetSpec = targets.get(options.target)
    target = make_target({"kind": "llvm", "mcpu": spec.mcpu})
    (family, *_) = scheduled(families_of(spec))
    tasks = [Task(family, op, 1) for op in OPS]
    with tempfile.TemporaryDirectory() as folder:
        tuner = Tuner(target, this_machine(), Path(folder), print)
        tables = [table(task, tuner) for task in tasks]
    rows = []
    for i, (task, known) in enumerate(zip(tasks, tables, strict=True)):
        others = [s for j, t in enumerate(tasks) if j != i for s in samples(t, tables[j])]
        row: dict[str, object] = {
            "op": task.op.key,
            "schedules": len(known),
            "best_ratio": round(min(known.values()), 3),
            "within_1_percent": sum(v <= NEAR * min(known.values()) for v in known.values()),
        }
        for name, given, model in (
            ("random", [], False),
            ("model", [], True),
            ("model_other_operators", others, True),
        ):
            rng = np.random.default_rng(0)
            trials = [replay(task, known, given, rng, model=model) for _ in range(options.searches)]
            row[name] = round(float(np.mean(trials)), 1)
        rows.append(row)
        print(row, flush=True)
    store(options.target, {"model_against_random": {"searches": options.searches, "rows": rows}})


if __name__ == "__main__":
    main()
