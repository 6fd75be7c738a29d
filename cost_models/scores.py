"""How good a cost model is on shapes and networks that it has not seen, beside simpler ones.

Kernels: groups of rows (one shape, several formats) are left out fold by fold. Networks: each is
left out once, and its layers are predicted by the model of kernels. Every contestant is fitted to
and judged on the same rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from t3c.core.formats import Dense
from t3c.cost_models.base import Row
from t3c.cost_models.dataset import Dataset, KernelRow, ProfileRow, kernel_key
from t3c.cost_models.features import Numbers, kind_of
from t3c.cost_models.learned import LearnedModel
from t3c.cost_models.roofline import RooflineModel
from t3c.cost_models.transfer import transfer
from t3c.targets.base import TargetSpec

FOLDS = 5
NOISE = 0.03
"""Measured differences below this share have no sign."""


@dataclass(frozen=True, slots=True)
class Score:
    """How predictions compare with measured medians.

    Attributes:
        rows: How many.
        mape: Mean absolute error, share of the measured time.
        spearman: Correlation of ranks.
        sign: Share of factorized formats, or profiles, of which faster or slower than dense (of the
            same bits) is told right; NaN: none.
        signs: How many are behind `sign`: those that differ from dense by more than `NOISE`.
        coverage: Share that the intervals hold; NaN: no intervals.
    """

    rows: int
    mape: float
    spearman: float
    sign: float = math.nan
    signs: int = 0
    coverage: float = math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain data; NaN is left out."""
        return {
            name: round(value, 4)
            for name, value in asdict(self).items()
            if not (isinstance(value, float) and math.isnan(value))
        }


@dataclass(frozen=True, slots=True)
class Guess:
    """What the learned model said of a row that it had not seen; seconds.

    Attributes:
        measured: The median.
        predicted: The same, predicted.
        low: Lower end of its interval.
        high: Upper end.
    """

    measured: float
    predicted: float
    low: float
    high: float

    @property
    def held(self) -> bool:
        """Whether the interval holds what was measured."""
        return self.low <= self.measured <= self.high


@dataclass(frozen=True, slots=True)
class Judged:
    """Scores on rows that were left out, and the learned model's guesses behind its own.

    Attributes:
        scores: Contestant -> score.
        guesses: In the order of the rows.
    """

    scores: dict[str, Score]
    guesses: tuple[Guess, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What was judged.

    Attributes:
        kernels: On held-out shapes.
        networks: On held-out networks; without scores for fewer than three.
    """

    kernels: Judged
    networks: Judged

    def to_json(self) -> dict[str, Any]:
        """The scores, plain data."""
        return {
            kind: {name: score.to_json() for name, score in found.scores.items()}
            for kind, found in (("kernels", self.kernels), ("networks", self.networks))
        }

    def guesses(self) -> dict[str, tuple[Guess, ...]]:
        """Kind of row -> guesses, without empty ones."""
        both = {"kernels": self.kernels.guesses, "networks": self.networks.guesses}
        return {kind: found for kind, found in both.items() if found}


class Table:
    """Measured layers by key; another layer takes the nearest of its kind, scaled by its work.

    This is what tables of per-layer times do, as Once-for-all's: no model, a sum for a network.
    """

    def __init__(self, rows: Sequence[Row], seconds: Sequence[float]) -> None:
        """Keep what was measured."""
        self._known = {kernel_key(row): t for row, t in zip(rows, seconds, strict=True)}
        self._near: dict[str, list[tuple[Numbers, float, float]]] = {}
        for row, t in zip(rows, seconds, strict=True):
            macs = row.site.macs(row.format)
            self._near.setdefault(kind_of(row), []).append((_sizes(row), macs, t))

    def predict(self, rows: Sequence[Row]) -> list[float]:
        """Seconds of each row."""
        return [self._one(row) for row in rows]

    def _one(self, row: Row) -> float:
        if (known := self._known.get(kernel_key(row))) is not None:
            return known
        near = self._near.get(kind_of(row)) or [x for v in self._near.values() for x in v]
        sizes = _sizes(row)
        _, macs, seconds = min(near, key=lambda one: float(((one[0] - sizes) ** 2).sum()))
        return seconds * row.site.macs(row.format) / macs


def _sizes(row: Row) -> Numbers:
    """Logarithms of multiply-adds, weights and what is left: rows."""
    macs, weights = row.site.macs(row.format), row.site.elements(row.format)
    return np.log(np.array([macs, weights, macs / weights], np.float64))


def report(dataset: Dataset, spec: TargetSpec) -> Report:
    """Scores of the learned model, of rooflines and of a table.

    Args:
        dataset: What was measured.
        spec: The target.
    """
    return Report(
        kernel_scores(dataset.kernels, spec),
        network_scores(dataset.kernels, dataset.profiles, spec),
    )


def kernel_scores(kernels: Sequence[KernelRow], spec: TargetSpec) -> Judged:
    """Every contestant on shapes that were left out."""
    rows, times = [k.row for k in kernels], np.array([k.seconds.p50_s for k in kernels])
    groups = [k.group or kernel_key(k.row) for k in kernels]
    fold = folds(groups)
    predicted: dict[str, Numbers] = {}
    ends = np.zeros((len(rows), 2))
    for number in range(FOLDS):
        out = fold == number
        known = [r for r, o in zip(rows, out, strict=True) if not o]
        asked = [r for r, o in zip(rows, out, strict=True) if o]
        seen = times[~out].tolist()
        model = LearnedModel.of(spec).fit_groups(
            known, seen, [g for g, o in zip(groups, out, strict=True) if not o]
        )
        found = {
            "learned": model.predict(asked),
            "roofline": RooflineModel.of(spec).predict(asked),
            "roofline, fitted": RooflineModel.of(spec).fit(known, seen).predict(asked),
            "table": Table(known, seen).predict(asked),
        }
        for name, values in found.items():
            predicted.setdefault(name, np.zeros(len(rows)))[out] = values
        ends[out] = model.predict_interval(asked)
    shapes = [f"{g} {row.format.bits}" for g, row in zip(groups, rows, strict=True)]
    dense = _dense_of(shapes, [isinstance(row.format, Dense) for row in rows])
    return _judged(times, predicted, dense, ends)


def network_scores(
    kernels: Sequence[KernelRow], profiles: Sequence[ProfileRow], spec: TargetSpec
) -> Judged:
    """Every contestant on networks that were left out; nothing for fewer than three."""
    names = list(dict.fromkeys(p.network for p in profiles))
    if len(names) < 3:
        return Judged({}, ())
    rows, seen = [k.row for k in kernels], [k.seconds.p50_s for k in kernels]
    groups = [k.group or kernel_key(k.row) for k in kernels]
    times = np.array([p.seconds.p50_s for p in profiles])
    model = LearnedModel.of(spec).fit_groups(rows, seen, groups)
    plain, fitted = RooflineModel.of(spec), RooflineModel.of(spec).fit(rows, seen)
    table = Table(rows, seen)

    def summed(predict: Callable[[Sequence[Row]], list[float]]) -> Numbers:
        return np.array([math.fsum(predict(p.layers)) for p in profiles])

    def rest(model: RooflineModel) -> Numbers:
        return np.array([model.predict_rest(p.rest, p.layers[0].threads) for p in profiles])

    learned, ends = np.zeros(len(profiles)), np.zeros((len(profiles), 2))
    for name in names:
        one = model.fit_profiles([p for p in profiles if p.network != name])
        for i, p in enumerate(profiles):
            if p.network == name:
                learned[i] = one.predict_network(p.layers, p.rest)
                ends[i] = one.predict_network_interval(p.layers, p.rest)
    found = {
        "learned": learned,
        "roofline": summed(plain.predict) + rest(plain),
        "roofline, fitted": summed(fitted.predict) + rest(fitted),
        "sum of the table": summed(table.predict),
        "sum of learned layers": summed(model.predict),
        "sum of measured layers": np.array([max(1e-9, p.inside_s) for p in profiles]),
    }
    dense = _dense_of(
        [p.network for p in profiles],
        [
            all(isinstance(r.format, Dense) and r.format.bits == 8 for r in p.layers)
            for p in profiles
        ],
    )
    return _judged(times, found, dense, ends)


def _judged(
    times: Numbers, predicted: dict[str, Numbers], dense: Sequence[int], ends: Numbers
) -> Judged:
    """Scores of all; `ends` [rows, 2] are the intervals of "learned"."""
    columns = (times, predicted["learned"], *ends.T)
    guesses = tuple(Guess(*map(float, row)) for row in zip(*columns, strict=True))
    held = np.array([guess.held for guess in guesses])
    scores = {name: score(times, values, dense) for name, values in predicted.items()}
    return Judged(scores | {"learned": score(times, predicted["learned"], dense, held)}, guesses)


def transfer_report(
    base: LearnedModel, dataset: Dataset, spec: TargetSpec, *, any_family: bool = False
) -> Report:
    """Scores of a transferred model, on shapes and networks of the new device that are left out.

    Args:
        base: The model of the other device.
        dataset: What was measured on the new one.
        spec: The new one's target.
        any_family: See `t3c.cost_models.transfer.transfer`.
    """
    kernels, device = dataset.kernels, dataset.device
    times = np.array([k.seconds.p50_s for k in kernels])
    groups = [k.group or kernel_key(k.row) for k in kernels]
    predicted: dict[str, Numbers] = {"learned": np.zeros(len(kernels))}
    ends = np.zeros((len(kernels), 2))
    for number in range(FOLDS):
        out = folds(groups) == number
        if not out.any():
            continue
        seen = [k for k, o in zip(kernels, out, strict=True) if not o]
        asked = [k.row for k, o in zip(kernels, out, strict=True) if o]
        model = transfer(base, seen, [], spec, device, any_family=any_family)
        found = {"learned": model.predict(asked), **rivals(base, seen, asked, spec)}
        for name, values in found.items():
            predicted.setdefault(name, np.zeros(len(kernels)))[out] = values
        ends[out] = model.predict_interval(asked)
    alone = list(range(len(times)))
    judged = _judged(times, predicted, alone, ends) if kernels else Judged({}, ())
    return Report(judged, _transfer_networks(base, dataset, spec, any_family=any_family))


def _transfer_networks(
    base: LearnedModel, dataset: Dataset, spec: TargetSpec, *, any_family: bool
) -> Judged:
    """Networks that are left out one by one; nothing for fewer than three."""
    profiles = dataset.profiles
    names = list(dict.fromkeys(p.network for p in profiles))
    if len(names) < 3:
        return Judged({}, ())
    predicted, ends = np.zeros(len(profiles)), np.zeros((len(profiles), 2))
    times = np.array([p.seconds.p50_s for p in profiles])
    for name in names:
        known = [p for p in profiles if p.network != name]
        model = transfer(base, dataset.kernels, known, spec, dataset.device, any_family=any_family)
        for i, p in enumerate(profiles):
            if p.network == name:
                predicted[i] = model.predict_network(p.layers, p.rest)
                ends[i] = model.predict_network_interval(p.layers, p.rest)
    return _judged(times, {"learned": predicted}, list(range(len(times))), ends)


def rivals(
    base: LearnedModel, seen: Sequence[KernelRow], asked: Sequence[Row], spec: TargetSpec
) -> dict[str, list[float]]:
    """Contestant -> predictions of what is simpler than a transfer, from the same rows.

    Args:
        base: The model of the other device.
        seen: Measured on the new device.
        asked: What is predicted.
        spec: The new device's target.
    """
    rows, times = [k.row for k in seen], [k.seconds.p50_s for k in seen]
    old = np.array(base.predict(asked))
    factor = float(np.exp(np.median(np.log(times) - np.log(base.predict(rows))))) if rows else 1.0
    found = {
        "other device, one factor": (factor * old).tolist(),
        "roofline": RooflineModel.of(spec).predict(asked),
    }
    if len(rows) >= 5:
        found["roofline, fitted"] = RooflineModel.of(spec).fit(rows, times).predict(asked)
        groups = [k.group or kernel_key(k.row) for k in seen]
        found["fitted alone"] = LearnedModel.of(spec).fit_groups(rows, times, groups).predict(asked)
    return found


def folds(groups: Sequence[str], count: int = FOLDS) -> Numbers:
    """Number of the fold of each row; groups stay together."""
    names = list(dict.fromkeys(groups))
    order = np.random.default_rng(0).permutation(len(names))
    of = {name: int(order[i]) % count for i, name in enumerate(names)}
    return np.array([of[g] for g in groups])


def score(
    times: Numbers, predicted: Numbers, dense: Sequence[int], held: Numbers | None = None
) -> Score:
    """Compare predictions with measurements.

    Args:
        times: Measured seconds.
        predicted: Predicted seconds.
        dense: For each row the number of the dense one that it stands beside; itself: none.
        held: Whether the interval of each row holds its time; None: there are no intervals.
    """
    signs = right = 0
    for i, j in enumerate(dense):
        if i != j and abs(times[i] / times[j] - 1) > NOISE:
            signs += 1
            right += bool((times[i] < times[j]) == (predicted[i] < predicted[j]))
    return Score(
        len(times),
        float(np.mean(np.abs(predicted / times - 1))),
        float(np.corrcoef(_ranks(times), _ranks(predicted))[0, 1]),
        right / signs if signs else math.nan,
        signs,
        math.nan if held is None else float(np.mean(held)),
    )


def _dense_of(groups: Sequence[str], dense: Sequence[bool]) -> list[int]:
    """Number of the dense row of each row's group; its own where there is none."""
    first = {g: i for i, (g, d) in reversed(list(enumerate(zip(groups, dense, strict=True)))) if d}
    return [first.get(g, i) for i, g in enumerate(groups)]


def _ranks(values: Numbers) -> Numbers:
    """Ranks from 0; equal values share their mean rank."""
    _, of, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts + 1) / 2)[of])
