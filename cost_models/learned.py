"""The learned cost model: boosted trees over a roofline, fitted to measurements of one device.

log t = share x log(roofline) + trees(features), the trees monotone in all that grows. The roofline
has constants of its own for every kind of kernel. A network takes
a x (sum of its layers) + b x float32 multiply-adds + c x bytes moved + d x calls + e.
Joules follow the same law, where they were metered. A model of another device keeps that one's
trees as they are and has a roofline of its own (`t3c.cost_models.transfer`).
Intervals are split-conformal: quantiles of the error on shapes and networks that were left out.
Source: Chen and Guestrin, XGBoost, KDD 2016; Vovk et al., Algorithmic Learning, section 4.2.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, final

import numpy as np
import xgboost
from numpy.typing import NDArray

from t3c.core.artifact import write_atomic
from t3c.core.errors import CostModelError
from t3c.core.profile import Label
from t3c.core.sites import LinearSite
from t3c.cost_models.base import AbstractCostModel, Row, Work
from t3c.cost_models.dataset import Dataset, KernelRow, ProfileRow, kernel_key
from t3c.cost_models.device import Device
from t3c.cost_models.features import CONSTRAINTS, FEW, Numbers, features, kind_of, work
from t3c.cost_models.roofline import RooflineModel, non_negative
from t3c.targets.base import Roofline, TargetSpec

SCHEMA = 2
COVERAGE = 0.9
"""Share of new kernels, or networks, that an interval shall hold."""
SHARE = 0.7
"""Of the roofline's growth that is kept; the trees add the rest, and what they know better."""
ROUNDS = 300
BAGS = 3
"""Boosters that are averaged, each with samples of its own."""
SETTINGS: Mapping[str, Any] = {
    "objective": "reg:squarederror",
    "max_depth": 3,
    "eta": 0.05,
    "subsample": 0.7,
    "colsample_bytree": 0.8,
    "min_child_weight": 3,
    "nthread": 1,
    "verbosity": 0,
}
ALL = "*"
"""Kind of kernel that stands for every kind that was not measured."""
ELSEWHERE = 0.1
"""Weight of measurements of other kinds in the prior of a kind: few of its own decide alone."""
STEPS, SMALL = 10, 0.02
"""Rounds of the fit of networks, and the relative error below which an error is noise."""
HELD_OUT = 5
"""Every so manieth shape is left out of the fit, for the intervals."""
LEAST = 40
"""Rows from which on trees are fitted."""


@final
@dataclass(frozen=True, slots=True)
class LearnedModel(AbstractCostModel):
    """What was learnt on one device; before any fit it is the target's roofline.

    Attributes:
        constants: Of the target.
        device: Where it was measured; None: nowhere.
        prior: Kind of kernel -> seconds of a unit of each count (`features.work`).
        trees: Boosters as XGBoost's own JSON; their mean counts.
        network: Weights of a network's parts (`parts`); empty: not learnt.
        spread: Quantile of the absolute log error of kernels; infinite: no interval.
        network_spread: The same of networks.
        spread_label: Whether `spread` was seen on rows that were left out, or is assumed.
        network_spread_label: The same of `network_spread`.
        base: The model of another device whose trees are added; None: this one stands alone.
        metered: Energy on this device; None: nothing was metered.
        measured: `kernel_key` -> median and 95th percentile, seconds, of what was measured on this
            device; they win over any prediction.
    """

    constants: Roofline
    device: Device | None = None
    prior: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    trees: tuple[str, ...] = ()
    network: tuple[float, ...] = ()
    spread: float = math.inf
    network_spread: float = math.inf
    spread_label: Label = Label.MEASURED
    network_spread_label: Label = Label.MEASURED
    base: "LearnedModel | None" = None
    metered: "Metered | None" = None
    measured: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: TargetSpec) -> Self:
        """The roofline of the target."""
        return cls(spec.roofline)

    @classmethod
    def learn(cls, dataset: Dataset, spec: TargetSpec) -> Self:
        """A model of everything in a dataset.

        Raises:
            CostModelError: It holds fewer than `LEAST` kernels.
        """
        kernels = dataset.kernels
        if len(kernels) < LEAST:
            raise CostModelError(
                f"{dataset.path} holds {len(kernels)} kernels; a model needs at least {LEAST}: "
                "measure on with `t3c measure`, or adapt another device's model to them "
                "(`t3c fit --transfer-from`)"
            )
        seconds = [row.seconds.p50_s for row in kernels]
        groups = [row.group or kernel_key(row.row) for row in kernels]
        rows = [row.row for row in kernels]
        model = replace(cls.of(spec), device=dataset.device).fit_groups(rows, seconds, groups)
        model = model.fit_profiles(dataset.profiles).knowing(kernels)
        return replace(model, metered=learn_energy(dataset, spec))

    def knowing(self, kernels: Sequence[KernelRow]) -> Self:
        """The model with what was measured in place of what it would predict of it."""
        found = {k.key: (k.seconds.p50_s, k.seconds.p95_s) for k in kernels}
        return replace(self, measured={**self.measured, **found})

    def fit(self, rows: Sequence[Row], seconds: Sequence[float]) -> Self:
        """See `AbstractCostModel`; rows of one shape are left out together for the intervals."""
        groups = [str(replace(row.site, name="")) for row in rows]
        return self.fit_groups(rows, seconds, groups)

    def fit_groups(
        self, rows: Sequence[Row], seconds: Sequence[float], groups: Sequence[str]
    ) -> Self:
        """A model of kernels.

        Args:
            rows: What was measured.
            seconds: Median of each.
            groups: Of each row; rows of a group are left out together.

        Raises:
            ValueError: Fewer than five rows, or a time that is not positive.
        """
        times = np.asarray(seconds, np.float64)
        if not len(rows) == len(times) == len(groups) or len(rows) < 5 or not (times > 0).all():
            raise ValueError(
                f"got {len(rows)} rows, {len(times)} times and {len(groups)} groups; need one "
                "positive time and a group for each, at least 5"
            )
        names = list(dict.fromkeys(groups))
        left_out = set(names[HELD_OUT - 1 :: HELD_OUT])
        fit = np.array([g not in left_out for g in groups])
        fitted = self._fitted([r for r, f in zip(rows, fit, strict=True) if f], times[fit])
        if fit.all():
            return fitted
        held = [r for r, f in zip(rows, fit, strict=True) if not f]
        errors = np.abs(np.log(fitted.predict(held)) - np.log(times[~fit]))
        return replace(fitted, spread=conformal(errors))

    def _fitted(self, rows: Sequence[Row], times: Numbers) -> Self:
        """Prior and trees; no trees where there are few rows."""
        counts = np.stack([work(row, self.constants) for row in rows])
        kinds = np.array([kind_of(row) for row in rows])
        prior = {ALL: tuple(non_negative(counts, times))}
        for kind in dict.fromkeys(kinds.tolist()):
            weight = np.where(kinds == kind, 1.0, ELSEWHERE)
            prior[kind] = tuple(non_negative(counts, times, weight))
        made = replace(self, prior=prior, trees=(), spread=math.inf)
        if len(rows) < LEAST:
            return made
        return made.with_trees(rows, times, SETTINGS, ROUNDS)

    def with_trees(
        self, rows: Sequence[Row], times: Numbers, settings: Mapping[str, Any], rounds: int
    ) -> Self:
        """The model with trees on what it leaves unexplained without them.

        Args:
            rows: What was measured.
            times: Median of each, seconds.
            settings: Of XGBoost.
            rounds: Trees of a booster.
        """
        made = replace(self, trees=())
        base = made._prior(rows)
        x = features(rows, base, self.constants)
        target = np.log(times) - SHARE * np.log(base) - made._grown(rows, base)
        data = xgboost.DMatrix(x, label=target)
        fixed = {
            "monotone_constraints": "(" + ",".join(map(str, CONSTRAINTS)) + ")",
            "base_score": float(np.median(target)),
        }
        trees = []
        for seed in range(BAGS):
            given = {**settings, **fixed, "seed": seed}
            raw = xgboost.train(given, data, rounds).save_raw("json")
            trees.append(json.dumps(json.loads(bytes(raw))))
        return replace(made, trees=tuple(trees))

    def fit_profiles(self, profiles: Sequence[ProfileRow]) -> Self:
        """A model of whole networks on top of the one of kernels; the same where there are none."""
        return self.fit_networks(
            [(p.network, p.layers, p.rest) for p in profiles],
            [p.seconds.p50_s for p in profiles],
            [min(p.inside_s, p.seconds.p50_s) for p in profiles],
        )

    def fit_networks(
        self,
        networks: Sequence[tuple[str, Sequence[Row], Work]],
        values: Sequence[float],
        insides: Sequence[float],
    ) -> Self:
        """A model of whole networks on top of the one of kernels; fewer than two change nothing.

        Args:
            networks: Name, elastic layers and the rest of each profile.
            values: What was measured of each.
            insides: Of it, what was seen inside the layers; 0: that is not known.
        """
        names = [name for name, _, _ in networks]
        if len(set(names)) < 2:
            return self
        parts = np.stack([self.parts(layers, rest) for _, layers, rest in networks])
        times, inside = np.array(values, np.float64), np.array(insides, np.float64)
        errors = np.zeros(len(times))
        for name in set(names):  # each network is left out once
            out = np.array([n == name for n in names])
            weights = np.array(_composition(parts[~out], times[~out], inside[~out]))
            errors[out] = np.abs(np.log(np.maximum(1e-12, parts[out] @ weights) / times[out]))
        found = _composition(parts, times, inside)
        return replace(self, network=found, network_spread=conformal(errors))

    def parts(self, layers: Sequence[Row], rest: Work) -> Numbers:
        """(seconds of the layers one by one, float32 multiply-adds, bytes, calls, 1)."""
        threads = layers[0].threads if layers else 1
        inside = math.fsum(self.predict(layers))
        shared = (rest.f32_macs / threads, rest.bytes_moved / threads)
        return np.array([inside, *shared, rest.calls, 1.0])

    def predict(self, rows: Sequence[Row]) -> list[float]:
        """Seconds of each row: measured where it was, else predicted."""
        if not self.measured:
            return self._predicted(rows)
        seen = [self.measured.get(kernel_key(row)) for row in rows]
        guesses = iter(self._predicted([r for r, s in zip(rows, seen, strict=True) if s is None]))
        return [next(guesses) if found is None else found[0] for found in seen]

    def _predicted(self, rows: Sequence[Row]) -> list[float]:
        if not rows:
            return []
        base = self._prior(rows)
        if not self.trees and self.base is None:
            return [float(t) for t in base]
        return [float(t) for t in np.exp(self._grown(rows, base) + SHARE * np.log(base))]

    def grown(self, rows: Sequence[Row]) -> Numbers:
        """What trees add to the logarithm of `SHARE` of the roofline."""
        return self._grown(rows, self._prior(rows))

    def _grown(self, rows: Sequence[Row], base: Numbers) -> Numbers:
        """What trees add to the logarithm; those of another device see that one's roofline."""
        added = np.zeros(len(rows))
        if self.base is not None:
            added += self.base._grown(rows, self.base._prior(rows))
        if self.trees:
            x = xgboost.DMatrix(features(rows, base, self.constants))
            each = [_booster(t).predict(x, output_margin=True).astype(float) for t in self.trees]
            added += np.mean(each, axis=0)
        return added

    def predict_interval(self, rows: Sequence[Row]) -> list[tuple[float, float]]:
        """Seconds between which `COVERAGE` of new kernels of the measured kinds lie.

        Of one that was measured: up to its 95th percentile, and as far below its median.
        """
        factors = [math.exp(self.spread)] * len(rows)
        for i, row in enumerate(rows):
            if (seen := self.measured.get(kernel_key(row))) is not None:
                factors[i] = seen[1] / seen[0]
        return [(t / f, t * f) for t, f in zip(self.predict(rows), factors, strict=True)]

    def predict_energy(self, rows: Sequence[Row]) -> list[float] | None:
        """See `AbstractCostModel`."""
        return None if self.metered is None else self.metered.model.predict(rows)

    def predict_network_energy(self, layers: Sequence[Row], rest: Work) -> float | None:
        """See `AbstractCostModel`."""
        return None if self.metered is None else self.metered.model.predict_network(layers, rest)

    def predict_rest(self, work: Work, threads: int = 1) -> float:
        """Seconds of what is not elastic, and of the call."""
        if not self.network:
            return RooflineModel(self.constants).predict_rest(work, threads)
        _, mac, byte, call, one = self.network
        busy = (mac * work.f32_macs + byte * work.bytes_moved) / threads
        return busy + call * work.calls + one

    def predict_network(self, layers: Sequence[Row], rest: Work) -> float:
        """Seconds of one call of a network: layers, what is between them, and the call."""
        parts = self.parts(layers, rest)
        if not self.network:
            return float(parts[0]) + self.predict_rest(rest, layers[0].threads if layers else 1)
        return float(parts @ np.array(self.network))

    def predict_network_interval(self, layers: Sequence[Row], rest: Work) -> tuple[float, float]:
        """Seconds between which `COVERAGE` of new networks of the measured families lie."""
        seconds, factor = self.predict_network(layers, rest), math.exp(self.network_spread)
        return seconds / factor, seconds * factor

    def _prior(self, rows: Sequence[Row]) -> Numbers:
        """Seconds by the roofline; 4 bits never take longer than 8, so that bits are monotone."""
        return np.array([self._prior_of(row) for row in rows])

    def _prior_of(self, row: Row) -> float:
        if row.format.bits == 4:
            eight = replace(row, format=replace(row.format, bits=8))
            return min(self._rising(row), self._rising(eight))
        return self._rising(row)

    def _rising(self, row: Row) -> float:
        """More rows never take less than a few, though other kernels compute them."""
        seconds = self._weighed(row)
        if isinstance(row.site, LinearSite) and row.site.rows > FEW:
            few = replace(row, site=replace(row.site, rows=FEW))
            return max(seconds, self._weighed(few))
        return seconds

    def _weighed(self, row: Row) -> float:
        if not self.prior:
            return RooflineModel(self.constants).predict([row])[0]
        weights = self.prior.get(kind_of(row), self.prior[ALL])
        return max(1e-9, float(work(row, self.constants) @ np.array(weights)))

    def check(self, device: Device) -> None:
        """Make sure that predictions mean something on a device; threads may differ.

        Raises:
            CostModelError: It was measured on another device, or with another version of the
                libraries that make and run kernels.
        """
        if self.device is None:
            return
        if differ := self.device.differences(replace(device, threads=self.device.threads)):
            raise CostModelError(
                f"this cost model is stale here: it was measured with {'; '.join(differ)}. Measure "
                "again with `t3c measure` and fit with `t3c fit`"
            )

    def save(self, path: Path) -> None:
        """Write one JSON file with its own SHA-256; trees are XGBoost's JSON."""
        document = self.to_json()
        write_atomic(path, json.dumps({**document, "sha256": _digest(document)}).encode())

    def to_json(self) -> dict[str, Any]:
        """Plain data; the models that it rests on, too."""
        metered = self.metered
        return {
            "schema": SCHEMA,
            "model": "learned",
            "constants": asdict(self.constants),
            "device": None if self.device is None else self.device.to_json(),
            "prior": {kind: list(weights) for kind, weights in self.prior.items()},
            "network": list(self.network),
            "spread": _number(self.spread),
            "network_spread": _number(self.network_spread),
            "spread_label": str(self.spread_label),
            "network_spread_label": str(self.network_spread_label),
            "trees": [json.loads(text) for text in self.trees],
            "transferred_from": None if self.base is None else self.base.to_json(),
            "energy": None
            if metered is None
            else {"meter": metered.meter, "joules": metered.model.to_json()},
            "measured": {key: list(pair) for key, pair in self.measured.items()},
        }

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a model back.

        Raises:
            CostModelError: No learned model, damaged, or newer than this reader.
        """
        try:
            document = json.loads(path.read_text())
            kind, digest = document.get("model"), document.pop("sha256", None)
        except (OSError, ValueError, AttributeError) as error:
            raise CostModelError(f"{path}: no readable cost model: {error}") from error
        if kind != "learned":
            raise CostModelError(f"{path} holds a {kind!r} cost model, not a learned one")
        if document["schema"] > SCHEMA:
            raise CostModelError(
                f"{path} has schema {document['schema']}; this version reads up to {SCHEMA}: "
                "read it with the version of t3c that wrote it, or a newer one"
            )
        if digest != _digest(document):
            raise CostModelError(f"{path} is damaged: its hash does not fit; fit the model again")
        return cls.from_json(document)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote; files of schema 1 stand alone and know no energy."""
        constants: dict[str, Any] = dict(document["constants"])
        constants["tile"] = tuple(constants["tile"])
        device = document["device"]
        base, energy = document.get("transferred_from"), document.get("energy")
        return cls(
            Roofline(**constants),
            None if device is None else Device.from_json(device),
            {kind: tuple(weights) for kind, weights in document["prior"].items()},
            tuple(json.dumps(tree) for tree in document["trees"]),
            tuple(document["network"]),
            _infinite(document["spread"]),
            _infinite(document["network_spread"]),
            Label(document.get("spread_label", Label.MEASURED)),
            Label(document.get("network_spread_label", Label.MEASURED)),
            None if base is None else cls.from_json(base),
            None
            if energy is None
            else Metered(cls.from_json(energy["joules"]), str(energy["meter"])),
            {key: (p50, p95) for key, (p50, p95) in document.get("measured", {}).items()},
        )


@final
@dataclass(frozen=True, slots=True)
class Metered:
    """Energy of one device, learnt from a meter: everything that the meter saw during a call.

    Attributes:
        model: Predicts joules where models of time predict seconds.
        meter: Name of the meter.
    """

    model: LearnedModel
    meter: str


def learn_energy(dataset: Dataset, spec: TargetSpec) -> Metered | None:
    """Energy of the dataset's device; None where too little was metered to learn it.

    Networks are needed, too: without them the energy of what is not elastic is not known, and
    counted operations would be mixed with a meter's joules.

    Args:
        dataset: What was measured.
        spec: The target.

    Raises:
        CostModelError: Its joules are no meter's.
    """
    kernels, profiles = dataset.kernel_energies, dataset.profile_energies
    if dataset.meter is None or energy_lacks(dataset):
        return None
    meter, label = dataset.meter
    if label is not Label.MEASURED:
        raise CostModelError(
            f"{dataset.path} holds joules that {meter!r} {label}; a model learns from a meter only"
        )
    model = replace(LearnedModel.of(spec), device=dataset.device).fit_groups(
        [k.row for k in kernels],
        [k.energy.joules for k in kernels],
        [k.group or kernel_key(k.row) for k in kernels],
    )
    model = model.fit_networks(
        [(p.network, p.layers, p.rest) for p in profiles],
        [p.energy.joules for p in profiles],
        [0.0] * len(profiles),
    )
    return Metered(model, meter)


def energy_lacks(dataset: Dataset) -> str:
    """What is missing for a model of energy; empty: nothing."""
    kernels = len(dataset.kernel_energies)
    networks = len({p.network for p in dataset.profile_energies})
    if kernels >= LEAST and networks >= 2:
        return ""
    return (
        f"{kernels} kernels and {networks} networks are metered; energy is learnt from {LEAST} and "
        "2, until then it is estimated"
    )


def conformal(errors: NDArray[np.float64], coverage: float = COVERAGE) -> float:
    """The ceil((n + 1) coverage)-th smallest of n errors; infinite where there are too few."""
    place = math.ceil((len(errors) + 1) * coverage - 1e-9)
    return float(np.sort(errors)[place - 1]) if place <= len(errors) else math.inf


def _composition(parts: Numbers, times: Numbers, inside: Numbers) -> tuple[float, ...]:
    """Weights of a network's parts: layers by what was seen inside them, the rest by what was not.

    Least absolute errors, as shares of the whole, so that no odd network decides alone.
    Source: iteratively reweighted least squares; errors below `SMALL` count as squares.

    Args:
        parts: Of each profile (`LearnedModel.parts`).
        times: Its seconds.
        inside: Of them, seconds in its layers; 0: not known.
    """
    if not inside.any():
        return _whole(parts, times)
    known = inside > 0
    factor = float(np.median(inside[known] / parts[known, 0])) if known.any() else 1.0
    inside = np.where(known, inside, np.minimum(factor * parts[:, 0], times))
    outside = np.maximum(times - inside, 1e-3 * times)
    shares = outside / times
    found = np.array(non_negative(parts[:, 1:], outside, shares))
    for _ in range(STEPS - 1):
        errors = np.abs(parts[:, 1:] @ found - outside) / times
        weights = 1 / np.sqrt(np.maximum(errors, SMALL))
        found = np.array(non_negative(parts[:, 1:], outside, shares * weights))
    return factor, *found.tolist()


def _whole(parts: Numbers, times: Numbers) -> tuple[float, ...]:
    """The same weights from the whole alone."""
    weights = np.ones(len(times))
    found = np.zeros(parts.shape[1])
    for _ in range(STEPS):
        found = np.array(non_negative(parts, times, weights))
        errors = np.abs(parts @ found - times) / times
        weights = 1 / np.sqrt(np.maximum(errors, SMALL))
    return tuple(found.tolist())


@lru_cache(maxsize=64)
def _booster(text: str) -> Any:
    booster = xgboost.Booster({"nthread": 1})
    booster.load_model(bytearray(text.encode()))
    return booster


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _number(value: float) -> float | None:
    return None if math.isinf(value) else value


def _infinite(value: float | None) -> float:
    return math.inf if value is None else float(value)
