"""Which model ranks schedules best: TVM's stock one, ours, the learned cost model, simple orders.

    python benchmarks/ranking.py [--repeats 3] [--searches 3] [--again]

Every schedule of some operators (of low-rank spaces, thousands of schedules, a drawn sample) takes
part in two contests against the rule's kernel; what it was measured to be is the geometric mean of
both ratios. Then each operator is left out once. A ranker gets exactly the rows of the other
operators of its kind, and none, 8 or 16 rows of the operator itself, and orders the schedules that
it was not given. Written into ranking.json with the measured rows; a later run takes them from
--folder unless told to measure --again.

`fresh` operators were measured after the settings of `ranking`, a proposal, had been chosen on the
others: they judge it. `trees_alone` is what the search uses.

TVM's model is its own code and settings (XGBModel, per-store features of the functions that are
compiled); features are extracted once, since nothing but the function decides them.
"""

import argparse
import fcntl
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xgboost
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr  # type: ignore[import-untyped]

from t3c import targets
from t3c.codegen.families import families_of, scheduled
from t3c.codegen.kernels.schedule import Op, Schedule, Scheduled
from t3c.codegen.script import read_function
from t3c.codegen.tune import model as ours
from t3c.codegen.tune.inproc import contestant
from t3c.codegen.tune.machine import this_machine
from t3c.codegen.tune.measure import Arguments, Contestant, contest, ratio
from t3c.codegen.tune.records import canonical, choices
from t3c.codegen.tune.search import BATCH, GUESSES, TRIAL
from t3c.codegen.tune.stock import tune_context
from t3c.codegen.tvm_api import make_target, meta_schedule, tvm
from t3c.core.errors import LoweringError
from t3c.core.formats import Dense, LowRank
from t3c.core.sites import ConvSite, LinearSite
from t3c.cost_models import learned
from t3c.cost_models.base import Row
from t3c.cost_models.features import CONSTRAINTS, features
from t3c.targets.base import TargetSpec

SAMPLE = 64
"""Schedules of a space of more than `LARGE`."""
LARGE = 200
NEAR = 1.01
TOLD_APART = 1.02
"""Ratio from which on the order of two schedules counts."""
GIVEN = (0, 8, 16)
"""Rows of the operator itself that a ranker is given."""
BOOTSTRAPS = 2000
CAP, AWAY = 1.2, 0.01
"""Of the proposal: largest ratio, log ratio of a doubling."""
PATIENCE, ROUNDS = 50, 10000
"""Of TVM's model."""
OUT = Path(__file__).with_suffix(".json")
Numbers = NDArray[np.float64]
Given = Sequence[tuple["Space", NDArray[np.int64]]]
Ranker = Callable[[Given, "Space"], Numbers]
"""Rows that were measured, an operator -> a number for each of its schedules, smaller is better."""


def conv(c: int, o: int, size: int, window: int) -> Op:
    """A square convolution of stride 1 that keeps the size."""
    pad = window // 2
    return Op.of(
        "conv", b=1, c=c, o=o, h=size, w=size, kh=window, kw=window, sh=1, sw=1, ph=pad, pw=pad,
        dh=1, dw=1,
    )  # fmt: skip


OPS = (
    Op.of("dense", m=197, n=768, k=192),
    Op.of("dense", m=50, n=384, k=384),
    Op.of("dense", m=128, n=384, k=384),
    Op.of("dense", "add", m=32, n=384, k=1536),
    Op.of("dense", "gelu", m=64, n=512, k=128),
    Op.of("dense", "gelu", m=128, n=1536, k=384),
    Op.of("dense", m=20, n=1000, k=256),
    Op.of("low_rank", m=197, n=768, k=768, r=64),
    Op.of("low_rank", m=50, n=384, k=384, r=64),
    Op.of("low_rank", "add", m=32, n=384, k=1536, r=128),
    Op.of("low_rank", "gelu", m=64, n=1024, k=256, r=64),
    conv(64, 64, 28, 3),
    conv(128, 128, 28, 3),
    conv(256, 64, 56, 1),
    conv(512, 128, 28, 1),
    conv(256, 256, 14, 3),
)


FRESH = (
    Op.of("dense", m=77, n=640, k=320),
    Op.of("dense", "gelu", m=40, n=768, k=256),
    Op.of("dense", "add", m=100, n=256, k=512),
    Op.of("low_rank", m=77, n=640, k=320, r=64),
    Op.of("low_rank", "gelu", m=24, n=768, k=512, r=96),
    conv(128, 64, 28, 3),
    conv(512, 256, 14, 1),
)
"""Measured after every setting was chosen, and never learnt from: they judge the choice."""


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """Schedules of one operator that were measured.

    Attributes:
        op: The operator.
        schedules: Of it; the first is the rule's.
        ratios: Time over the rule's in each of two contests [2, schedules].
        rule_s: Seconds of the rule's kernel, the median of all contests.
        stores: TVM's features of each: [stores, 164].
    """

    op: Op
    schedules: tuple[Schedule, ...]
    ratios: Numbers
    rule_s: float
    stores: tuple[NDArray[np.float32], ...]

    @property
    def values(self) -> Numbers:
        """What the schedules were measured to be."""
        found: Numbers = np.exp(np.log(self.ratios).mean(0))
        return found

    @property
    def summary(self) -> dict[str, Any]:
        """What the space is like, and how well two contests agree."""
        values = self.values
        return {
            "op": self.op.key,
            "schedules": len(values),
            "rule_us": round(self.rule_s * 1e6, 1),
            "best_ratio": round(float(values.min()), 3),
            "worst_ratio": round(float(values.max()), 3),
            "within_1_percent": int((values <= NEAR * values.min()).sum()),
            "contests_spearman": round(float(spearmanr(*self.ratios).statistic), 3),
            "stores": [min(map(len, self.stores)), max(map(len, self.stores))],
        }

    @property
    def everything(self) -> NDArray[np.int64]:
        """All places."""
        return np.arange(len(self.schedules))


# -- measuring -------------------------------------------------------------------------------------


def measured(family: Scheduled, op: Op, target: Any, lock: Callable[[], Any]) -> Space:
    """Compile every schedule, extract TVM's features, run both contests."""
    rule = canonical(family.default(op).record())
    known = choices(family, op)
    rest = [name for name in known if name != rule]
    rng = np.random.default_rng(0)
    if len(rest) > LARGE:
        rest = [rest[int(i)] for i in sorted(rng.permutation(len(rest))[: SAMPLE - 1])]
    schedules, stores, built = [], [], []
    for name in (rule, *rest):
        kernel = family.with_records({op.key: known[name]}).kernel(op)
        function = read_function(kernel.source).with_attr("tirx.is_scheduled", True)
        built.append(contestant(tvm.IRModule({kernel.name: function}), target))
        stores.append(per_store(tvm.IRModule({"main": function}), target))
        schedules.append(known[name])
    seconds: list[float] = []
    arguments = Arguments()
    ratios = [contests(built, arguments, rng, seconds, lock) for _ in range(2)]
    rule_s = float(np.median(seconds))
    return Space(op, tuple(schedules), np.array(ratios), rule_s, tuple(stores))


def contests(
    built: Sequence[Contestant],
    arguments: Arguments,
    rng: np.random.Generator,
    seconds: list[float],
    lock: Callable[[], Any],
) -> list[float]:
    """Ratio of each kernel to the first, in batches drawn afresh, as large as the search's."""
    found = [1.0] * len(built)
    order = 1 + rng.permutation(len(built) - 1)
    for part in batches(order, BATCH):
        with lock():
            times = contest([built[0], *(built[i] for i in part)], arguments, rng, *TRIAL)
        seconds.append(float(np.median(times[0])))
        for i, own in zip(part, times[1:], strict=True):
            found[i] = ratio(own, times[0]).median
    return found


def batches(order: NDArray[np.int64], size: int) -> Iterator[list[int]]:
    """Parts of at most `size`."""
    for start in range(0, len(order), size):
        yield [int(i) for i in order[start : start + size]]


def per_store(module: Any, target: Any) -> NDArray[np.float32]:
    """TVM's features of a function: what its search gives its model."""
    context = tune_context(target)
    candidate = meta_schedule.MeasureCandidate(tvm.s_tir.Schedule(module), [])
    (found,) = meta_schedule.feature_extractor.PerStoreFeature().extract_from(context, [candidate])
    array: NDArray[np.float32] = found.numpy().astype(np.float32)
    return array


def kept(path: Path, op: Op, known: Mapping[str, Schedule]) -> Space:
    """A space from the folder of an earlier run."""
    with np.load(path) as data:
        ends = np.cumsum(data["counts"])[:-1]
        return Space(
            op,
            tuple(known[str(name)] for name in data["schedules"]),
            data["ratios"],
            float(data["rule_s"]),
            tuple(np.split(data["stores"], ends)),
        )


def keep(path: Path, space: Space) -> None:
    """Store a space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        schedules=np.array([canonical(s.record()) for s in space.schedules]),
        ratios=space.ratios,
        rule_s=space.rule_s,
        stores=np.concatenate(space.stores),
        counts=np.array([len(s) for s in space.stores]),
    )


# -- rankers ---------------------------------------------------------------------------------------


def tvm_stock(given: Given, space: Space) -> Numbers:
    """TVM's XGBModel: each operator's times as shares of its best, summed over stores."""
    model = meta_schedule.cost_model.XGBModel(num_tuning_cores=1)
    stores = [other.stores[i] for other, at in given for i in at]
    best = [other.values[at].min() / other.values[at] for other, at in given]
    model._train(xs=stores, ys=np.concatenate(best).astype(np.float32))
    return -np.asarray(model._predict(xs=list(space.stores)), np.float64)


def tvm_damped(given: Given, space: Space) -> Numbers:
    """TVM's model with a step that cannot overshoot.

    Its own moves every store's share by eta times the error of the whole sum, so that more than
    2 / eta = 10 stores alike move the sum by more than twice its error, and the fit diverges. Here
    the second derivative is the bound sum(f)^2 <= n sum(f^2): times n, the stores of the function.
    All else is TVM's: features, target, weights, settings, rounds, early end. Equal stores of a
    function are one row with their number as weight, which changes no sum.
    """
    config = meta_schedule.cost_model.xgb_model.XGBConfig(nthread=1).to_dict()
    rows, ids, counts = packed([other.stores[i] for other, at in given for i in at])
    y = np.concatenate([other.values[at].min() / other.values[at] for other, at in given])
    sizes = np.bincount(ids, weights=counts)[ids]
    errors: list[float] = []

    def objective(f: Numbers, data: Any) -> tuple[Numbers, Numbers]:
        del data
        error = np.bincount(ids, weights=counts * f) - y
        errors.append(float(np.sqrt(np.mean(error**2))))
        weight = counts * y[ids]
        return weight * error[ids], weight * sizes

    class Ends(xgboost.callback.TrainingCallback):  # type: ignore[misc]
        """TVM's: fifty rounds without a smaller error."""

        def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
            del model, evals_log
            return epoch - int(np.argmin(errors)) >= PATIENCE

    booster = xgboost.train(
        {**config, "base_score": 0.0}, xgboost.DMatrix(rows), ROUNDS, obj=objective,
        callbacks=[Ends()],
    )  # fmt: skip
    rows, ids, counts = packed(space.stores)
    shares = counts * booster.predict(xgboost.DMatrix(rows))
    return np.asarray(-np.bincount(ids, weights=shares), np.float64)


def packed(stores: Sequence[NDArray[np.float32]]) -> tuple[Numbers, NDArray[np.int64], Numbers]:
    """(different stores of each function, function of each, how often it is in it)."""
    parts = [np.unique(s, axis=0, return_counts=True) for s in stores]
    ids = np.repeat(np.arange(len(parts)), [len(rows) for rows, _ in parts])
    return (
        np.concatenate([rows for rows, _ in parts]),
        ids,
        np.concatenate([counts for _, counts in parts]).astype(np.float64),
    )


def tvm_pooled(given: Given, space: Space) -> Numbers:
    """TVM's features, their sums and maxima over a function's stores, in our trees."""
    x = np.stack([pooled(other.stores[i]) for other, at in given for i in at])
    y = np.log(np.minimum(np.concatenate([other.values[at] for other, at in given]), 4.0))
    booster = xgboost.train(ours.SETTINGS, xgboost.DMatrix(x, label=y), ours.ROUNDS)
    to = np.stack([pooled(s) for s in space.stores])
    return np.asarray(booster.predict(xgboost.DMatrix(to)), np.float64)


def pooled(stores: NDArray[np.float32]) -> NDArray[np.float32]:
    """One line for a function."""
    return np.concatenate([stores.sum(0), stores.max(0), [np.float32(len(stores))]])


def ranking(given: Given, space: Space) -> Numbers:
    """A proposal for the search: the rule's choices are features, and nearness to them counts.

    Three boosters, ratios cut at `CAP`, and `AWAY` is added for each doubling from the rule's.
    """
    x = np.stack([beside_rule(o, i) for o, at in given for i in at])
    ratios = np.concatenate([o.values[at] for o, at in given]).astype(np.float32)
    data = xgboost.DMatrix(x, label=np.log(np.minimum(ratios, np.float32(CAP))))
    to = xgboost.DMatrix(np.stack([beside_rule(space, i) for i in space.everything]))
    found = []
    for seed in range(learned.BAGS):
        booster = xgboost.train({**ours.SETTINGS, "seed": seed}, data, ours.ROUNDS)
        found.append(booster.predict(to))
    return np.asarray(np.mean(found, axis=0) + AWAY * near_rule(given, space), np.float64)


def beside_rule(space: Space, place: int) -> NDArray[np.float32]:
    """Features of the search, and how far each choice is from the rule's."""
    schedule, rule = space.schedules[place], space.schedules[0]
    far = doublings(schedule, rule)
    own = ours.features(space.op, schedule)
    return np.array([*own, *far, sum(map(abs, far))], np.float32)


def doublings(schedule: Schedule, rule: Schedule) -> list[float]:
    """Of each choice, from the rule's to the schedule's; another word counts one."""
    found = []
    for own, other in zip(schedule.record().values(), rule.record().values(), strict=True):
        if isinstance(own, int) and isinstance(other, int):
            found.append(math.log2((1 + own) / (1 + other)))
        else:
            found.append(float(own != other))
    return found


def trees_alone(given: Given, space: Space) -> Numbers:
    """The search's own (codegen/tune/model.py)."""
    made = ours.Ranking()
    made.fit([(o.op, o.schedules[i], float(o.values[i])) for o, at in given for i in at])
    return np.asarray(made.predict(space.op, space.schedules), np.float64)


def cost_model(given: Given, space: Space) -> Numbers:
    """The learned cost model's recipe, its features joined by the schedule's.

    Roofline as prior, its settings, bags and constraints, log seconds.
    """
    rows = [row_of(o.op) for o, at in given for _ in at]
    seconds = np.concatenate([o.rule_s * o.values[at] for o, at in given])
    prior = learned.LearnedModel.of(SPEC)._fitted(rows, seconds)

    def seen(rows: Sequence[Row], pairs: Sequence[tuple[Space, int]]) -> tuple[Numbers, Numbers]:
        base = prior._prior(rows)
        x = features(rows, base, SPEC.roofline)
        return np.hstack([x, np.stack([beside_rule(o, i) for o, i in pairs])]), np.log(base)

    x, base = seen(rows, [(o, int(i)) for o, at in given for i in at])
    to, to_base = seen(
        [row_of(space.op)] * len(space.schedules), [(space, i) for i in range(len(space.schedules))]
    )
    target = np.log(seconds) - learned.SHARE * base
    free = x.shape[1] - len(CONSTRAINTS)
    found = []
    for seed in range(learned.BAGS):
        settings = {
            **learned.SETTINGS,
            "seed": seed,
            "monotone_constraints": str((*CONSTRAINTS, *(0 for _ in range(free)))),
            "base_score": float(np.median(target)),
        }
        booster = xgboost.train(settings, xgboost.DMatrix(x, label=target), learned.ROUNDS)
        found.append(booster.predict(xgboost.DMatrix(to), output_margin=True))
    return np.asarray(np.mean(found, axis=0) + learned.SHARE * to_base, np.float64)


def near_rule(given: Given, space: Space) -> Numbers:
    """How many doublings a schedule's choices are from the rule's."""
    del given
    rule = space.schedules[0]
    return np.array([sum(map(abs, doublings(s, rule))) for s in space.schedules])


def row_of(op: Op) -> Row:
    """The layer that an operator computes."""
    if op.kind == "conv":
        kernel, stride, padding, dilation, size = (
            (op[f"{a}h"], op[f"{a}w"]) for a in ("k", "s", "p", "d", "")
        )
        site = ConvSite(
            "", op["o"], op["c"], kernel, stride, padding, dilation, op["b"], size, size, True
        )
        return Row(site, Dense(8), codes=True)
    site_ = LinearSite("", op["n"], op["k"], op["m"], True)
    return Row(site_, LowRank(op["r"], 8) if op.kind == "low_rank" else Dense(8))


SPEC: TargetSpec = targets.get("x86-vnni")
RANKERS: Mapping[str, Ranker] = {
    "tvm_stock": tvm_stock,
    "tvm_damped": tvm_damped,
    "tvm_pooled": tvm_pooled,
    "ranking": ranking,
    "trees_alone": trees_alone,
    "cost_model": cost_model,
    "near_rule": near_rule,
}
NAMES = (*RANKERS, "random")
ONCE = frozenset({"tvm_stock"})
"""Asked only without rows of the operator, and not in searches."""
SLOW = frozenset({"tvm_damped"})
"""Repeated once; of the operators that are left out once, like those of `ONCE`."""
FITS: list[tuple[str, bool]] = []
"""Each fit so far: whose, and whether all its predictions are numbers."""
REFERENCE = "ranking"
"""Whose differences to the others get intervals."""


# -- judging ---------------------------------------------------------------------------------------


def judged(truth: Numbers, predicted: Numbers) -> dict[str, float]:
    """How good an order is.

    Returns:
        Spearman's correlation; share of pairs in the right order, of those that differ by more than
        `TOLD_APART`; time of the first, and of the best of the first five, over the best.
    """
    one, two = np.triu_indices(len(truth), 1)
    far = np.abs(np.log(truth[one] / truth[two])) > math.log(TOLD_APART)
    sign = np.sign(truth[one] - truth[two]) * np.sign(predicted[one] - predicted[two])
    order = np.argsort(predicted, kind="stable")
    return {
        "spearman": float(np.corrcoef(rankdata(truth), rankdata(predicted))[0, 1]),
        "pairs": float((1 + sign[far].mean()) / 2) if far.any() else math.nan,
        "top1": float(truth[order[0]] / truth.min()),
        "top5": float(truth[order[:5]].min() / truth.min()),
    }


def ranked(name: str, given: Given, space: Space, rng: np.random.Generator) -> Numbers:
    """Numbers of a ranker; ties are broken at random, and so is what it could not compute."""
    if name == "random":
        return rng.random(len(space.schedules))
    numbers = RANKERS[name](given, space)
    FITS.append((name, bool(np.isfinite(numbers).all())))
    found = rankdata(np.nan_to_num(numbers, nan=0.0, posinf=0.0, neginf=0.0))
    return np.asarray(found + 1e-3 * rng.random(len(found)), np.float64)


def others(spaces: Sequence[Space], space: Space) -> list[tuple[Space, NDArray[np.int64]]]:
    """All rows of the other operators of the kind."""
    alike = [o for o in spaces if o is not space and o.op.kind == space.op.kind]
    return [(o, o.everything) for o in alike]


def held_out(
    name: str, spaces: Sequence[Space], space: Space, count: int, repeats: int
) -> dict[str, float] | None:
    """Means over draws of the operator's own rows that are given; None: too few are left."""
    if len(space.schedules) < 1 + count + 6:
        return None
    fixed = count == 0 and name not in ("random", "near_rule")
    found = []
    for seed in range(1 if fixed else repeats):
        rng = np.random.default_rng(seed)
        own = np.sort(1 + rng.permutation(len(space.schedules) - 1)[:count])
        given = [*others(spaces, space), *([(space, own)] if count else [])]
        rest = np.setdiff1d(space.everything[1:], own)
        found.append(judged(space.values[rest], ranked(name, given, space, rng)[rest]))
    return {key: mean([f[key] for f in found]) for key in found[0]}


def mean(values: Sequence[float]) -> float:
    """Of those that are numbers: where no pair can be told apart there is no share of pairs."""
    known = [v for v in values if not math.isnan(v)]
    return float(np.mean(known)) if known else math.nan


def trials(name: str, spaces: Sequence[Space], space: Space, seed: int) -> int:
    """Schedules that a search measures until one is within `NEAR` of the best of the table."""
    rng = np.random.default_rng(seed)
    values = space.values
    goal = NEAR * values.min()
    seen = [0]
    given = others(spaces, space)
    while values[seen].min() > goal:
        unseen = np.setdiff1d(space.everything, seen)
        picked: list[int] = []
        if name != "random":
            rows = [*given, *([(space, np.array(seen))] if len(seen) > 1 else [])]
            order = np.argsort(ranked(name, rows, space, rng)[unseen])
            picked = [int(i) for i in unseen[order[:GUESSES]]]
        rest = np.setdiff1d(unseen, picked)
        drawn = rng.permutation(len(rest))[: BATCH - len(picked)]
        for i in [*picked, *rest[drawn].tolist()]:
            seen.append(i)
            if values[i] <= goal:
                break
    return len(seen) - 1


def interval(values: Numbers) -> list[float]:
    """95 % of the means of operators drawn with replacement."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (BOOTSTRAPS, len(values)))].mean(1)
    return [round(float(q), 3) for q in np.quantile(means, [0.025, 0.975])]


def summary(cells: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Means over operators, and differences to the reference.

    Args:
        cells: Ranker -> operator -> value.
    """
    found: dict[str, Any] = {}
    for name, of in cells.items():
        known = [op for op, value in of.items() if not math.isnan(value)]
        own = np.array([of[op] for op in known])
        base = np.array([cells[REFERENCE][op] for op in known])
        found[name] = {
            "mean": round(float(own.mean()), 3),
            "interval": interval(own),
            f"minus_{REFERENCE}": round(float((own - base).mean()), 3),
            "difference_interval": interval(own - base),
        }
    return found


def compared(
    names: Sequence[str],
    spaces: Sequence[Space],
    asked: Sequence[Space],
    repeats: int,
    searches: int,
) -> dict[str, Any]:
    """Every ranker, taught by the other `spaces`, on every operator of `asked`."""
    once = ONCE if asked is not spaces else ONCE | SLOW
    found: dict[str, Any] = {"rows_given": {}}
    for count in GIVEN:
        table: dict[str, dict[str, dict[str, float]]] = {}
        for name in names:
            if count and name in once:
                continue
            start = time.monotonic()
            runs = 1 if name in SLOW else repeats
            cells = {s.op.key: held_out(name, spaces, s, count, runs) for s in asked}
            table[name] = {op: cell for op, cell in cells.items() if cell is not None}
            print(f"{count} rows, {name}: {time.monotonic() - start:.0f} s", flush=True)
        found["rows_given"][str(count)] = {"operators": len(table[REFERENCE])} | {
            metric: summary(
                {name: {op: c[metric] for op, c in of.items()} for name, of in table.items()}
            )
            for metric in ("spearman", "pairs", "top1", "top5")
        }
        found["rows_given"][str(count)]["each"] = {
            name: {
                op: {k: round(v, 3) for k, v in c.items() if not math.isnan(v)}
                for op, c in of.items()
            }
            for name, of in table.items()
        }
    needed = {}
    for name in names:
        if name in once:
            continue
        start = time.monotonic()
        runs = 1 if name in SLOW else searches
        needed[name] = {
            s.op.key: float(np.mean([trials(name, spaces, s, i) for i in range(runs)]))
            for s in asked
        }
        print(f"searches, {name}: {time.monotonic() - start:.0f} s", flush=True)
    found["trials_to_1_percent"] = summary(needed)
    print("\n".join(lines(found)), flush=True)
    found["trials_to_1_percent_each"] = needed
    return found


def main() -> None:
    """Measure what is not in the folder, compare, JSON."""
    parser = argparse.ArgumentParser(description="Rankers of schedules on held-out operators.")
    parser.add_argument("--repeats", type=int, default=3, help="draws of the rows given")
    parser.add_argument("--searches", type=int, default=3, help="of each operator")
    parser.add_argument("--again", action="store_true", help="measure what is in the folder, too")
    parser.add_argument("--rankers", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--folder", type=Path, default=Path("build/ranking"), help="of the rows")
    parser.add_argument("--lock", type=Path, help="file that is locked while contests run")
    options = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = "1"
    target = make_target({"kind": "llvm", "mcpu": SPEC.mcpu})

    @contextmanager
    def lock() -> Iterator[None]:
        if options.lock is None:
            yield
            return
        with options.lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    every = []
    for op in (*OPS, *FRESH):
        family = family_of(op)
        path = options.folder / SPEC.name / f"{op.key.replace(' ', '_')}.npz"
        if options.again or not path.exists():
            keep(path, measured(family, op, target, lock))
        every.append(kept(path, op, choices(family, op)))
        print(every[-1].summary, flush=True)
    names = [name for name in NAMES if name in options.rankers]
    spaces, fresh = every[: len(OPS)], every[len(OPS) :]
    counts = (options.repeats, options.searches)
    result_of = {
        "fresh": compared(names, spaces, fresh, *counts),
        "left_out_once": compared(names, spaces, spaces, *counts),
    }
    result = {
        "schema": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "machine": this_machine().key,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "xgboost": xgboost.__version__,
        "tvm": tvm.__version__,
        "operators": [s.summary for s in every],
        **result_of,
        "diverged": {
            name: [sum(not ok for own, ok in FITS if own == name), sum(n == name for n, _ in FITS)]
            for name in names
        },
        "rows": [
            {
                "op": s.op.key,
                "rule_us": round(s.rule_s * 1e6, 1),
                "ratios": {c.text: [round(float(r), 4) for r in both]
                           for c, both in zip(s.schedules, s.ratios.T, strict=True)},
            }
            for s in every
        ],
    }  # fmt: skip
    OUT.write_text(json.dumps(result, indent=1) + "\n")


def lines(part: Mapping[str, Any]) -> list[str]:
    """A Markdown table of one group of operators: means over them."""
    head = "| ranker | given | Spearman | pairs | first | best of five | trials |"
    found = [head, "|---|---|---|---|---|---|---|"]
    for count, of in part["rows_given"].items():
        for name in of["spearman"]:
            own = [of[metric][name]["mean"] for metric in ("spearman", "pairs", "top1", "top5")]
            needed = part["trials_to_1_percent"].get(name, {}).get("mean", "")
            found.append(f"| {name} | {count} | {' | '.join(map(str, own))} | {needed} |")
    return found


@cache
def family_of(op: Op) -> Scheduled:
    """The family of the target that has the operator.

    Raises:
        LoweringError: None has.
    """
    for family in scheduled(families_of(SPEC)):
        try:
            family.default(op)
        except LoweringError:
            continue
        return family
    raise LoweringError(f"no family of {SPEC.name} has {op.key!r}")


def command() -> str:
    """The command line without what is this machine's business."""
    words = sys.argv[1:]
    for name in ("--folder", "--lock"):
        if name in words:
            at = words.index(name)
            words = words[:at] + words[at + 2 :]
    return shlex.join(["python", "benchmarks/ranking.py", *words])


if __name__ == "__main__":
    main()
