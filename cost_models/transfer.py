"""A cost model of a device from few measurements of it and a fitted model of another.

    log t = trees of the other device + SHARE log(its roofline, re-fitted) + offsets [+ trees]

The roofline keeps the other device's constants times exp(theta), one theta for each kind of work
(products, weight bytes, ...), and each kind of kernel has an offset. Both are shrunk to one factor
for all. So a few measurements give the other device's times, scaled, and every further one moves
what it tells about; without any the constants of the two targets give the factor. Trees on what is
left come with `LEAST` rows, where rows that were left out say that they help. All terms rise with
rank, bits and batch, so the model does. Intervals are quantiles of the errors on rows that were
left out of the fit, a shape at a time; with too few rows they are a factor that is assumed, and
labelled ``estimated``.
Source: ridge regression as the mode of a normal posterior (Bishop, Pattern Recognition, section
3.3), by Gauss-Newton steps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t3c.core.errors import CostModelError
from t3c.core.profile import Label
from t3c.core.sites import ConvSite
from t3c.cost_models.base import Row
from t3c.cost_models.dataset import KernelRow, ProfileRow, kernel_key
from t3c.cost_models.design import design
from t3c.cost_models.device import Device, target_of
from t3c.cost_models.features import Numbers, kind_of, work
from t3c.cost_models.learned import (
    ALL,
    COVERAGE,
    LEAST,
    SETTINGS,
    SHARE,
    LearnedModel,
    conformal,
)
from t3c.cost_models.roofline import RooflineModel
from t3c.targets.base import TargetSpec

ASSUMED = math.log(2.0)
"""Half-width of an interval in the logarithm where no errors were seen: a factor of two."""
NOISE = 0.2
"""Of the logarithm of a measured time, with what the law does not know (standard deviation)."""
FACTOR, THETA, CLASS, KIND = 1.0, 0.3, 0.1, 0.1
"""Standard deviations before any measurement: of the common factor, the constants of the roofline,
the offsets of linear layers and convolutions, and those of kinds of kernels; logarithms. Source:
benchmarks/transfer.json, chosen on x86-avx2."""
BELIEVED = 0.5
"""Of the logarithm of the ratio of two targets' constants: they are off by factors. Source: the
same; AVX2 takes 2.1 times as long as VNNI where the constants say 6."""
BLEND = 0.02
"""Of the target's own constants in every kind's roofline, so that no term is fixed at 0."""
INSIDE, OUTSIDE = 0.1, 0.5
"""Standard deviations of the factors of a network's layers and of everything else."""
NETWORK_NOISE = 0.05
STUDENT_95 = {3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860}
"""95 % points of Student's t by degrees of freedom: networks, whose errors have the mean 0.

Source: tables of the t distribution (NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2).
"""
STEPS = 12
FOLDS = 10
"""Parts of the shapes, each left out once; with fewer shapes, one by one."""
REFERENCE = 120
"""Designed layers on which the constants of two targets are compared."""
TREES: Mapping[str, Any] = {**SETTINGS, "max_depth": 2, "lambda": 5.0, "min_child_weight": 4}
ROUNDS = 60


@dataclass(frozen=True, slots=True)
class _Known:
    """Measured layers of the new device.

    Attributes:
        rows: The layers.
        times: Median of each, seconds.
        groups: Rows of a group are left out together.
    """

    rows: list[Row]
    times: Numbers
    groups: list[str]

    @classmethod
    def of(cls, kernels: Sequence[KernelRow]) -> "_Known":
        return cls(
            [k.row for k in kernels],
            np.array([k.seconds.p50_s for k in kernels], np.float64),
            [k.group or kernel_key(k.row) for k in kernels],
        )

    def where(self, mask: NDArray[np.bool_]) -> "_Known":
        return _Known(
            [r for r, m in zip(self.rows, mask, strict=True) if m],
            self.times[mask],
            [g for g, m in zip(self.groups, mask, strict=True) if m],
        )


def transfer(
    base: LearnedModel,
    kernels: Sequence[KernelRow],
    profiles: Sequence[ProfileRow],
    spec: TargetSpec,
    device: Device,
    *,
    any_family: bool = False,
) -> LearnedModel:
    """A model of a device.

    Args:
        base: Fitted to another device, or to this one in another state.
        kernels: Measured on the new device; none is allowed.
        profiles: Networks measured there; none is allowed.
        spec: Target of the new device's kernels.
        device: The new device.
        any_family: Whether the devices may have other instruction sets.

    Raises:
        CostModelError: `base` was not fitted, was transferred itself, or is of another family of
            processors.
    """
    check(base, spec, any_family=any_family)
    start = _start(base, spec, device)
    known = _Known.of(kernels)
    fitted = _fitted(base, start, known)
    plain = _errors(base, start, known, _fitted)
    spread, trees = plain, False
    if len(known.rows) >= LEAST:
        grown = _errors(base, start, known, _with_trees)
        trees = float(np.mean(grown)) < float(np.mean(plain))
        spread = grown if trees else plain
    found = _with_trees(base, start, known) if trees else fitted
    width, label = _width(spread)
    found = replace(found, spread=width, spread_label=label)
    return _networks(base, found, profiles, spec).knowing(kernels)


def check(base: LearnedModel, spec: TargetSpec, *, any_family: bool = False) -> None:
    """Refuse what nothing can be learnt from; see `transfer`."""
    if base.base is not None:
        raise CostModelError(
            f"this model was itself transferred from {base.base.device}; transfer from that one, "
            "or from one that was fitted to its own device"
        )
    if base.device is None or not base.trees:
        raise CostModelError(
            "a model that was fitted to no device has nothing to transfer; fit one with `t3c fit`"
        )
    old, new = family(target_of(base.device)), family(spec)
    if old != new and not any_family:
        raise CostModelError(
            f"the model is of an {old!r} device, the target {spec.name!r} is {new!r}: their "
            "kernels differ, and what one tells about the other is not known. Fit a model of "
            "this device, or say that it is meant (--any-family)"
        )


def family(spec: TargetSpec) -> str:
    """Instruction set of a target: the first word of its name."""
    return spec.name.split("-")[0]


def spread_out(drawn: Sequence[tuple[Row, str]], count: int) -> list[tuple[Row, str]]:
    """A few of designed layers: every kind of kernel before any twice, of as many shapes as can be.

    Args:
        drawn: Layers with their groups.
        count: How many.
    """
    kinds: dict[str, list[tuple[Row, str]]] = {}
    for one in drawn:
        kinds.setdefault(kind_of(one[0]), []).append(one)
    total = {kind: len(rows) for kind, rows in kinds.items()}
    taken, used, found = dict.fromkeys(kinds, 0), dict[str, int](), list[tuple[Row, str]]()
    while len(found) < min(count, len(drawn)):
        # the square root: frequent kinds more often, rare ones at all
        kind = min(
            (k for k in kinds if kinds[k]),
            key=lambda k: ((taken[k] + 0.5) / math.sqrt(total[k]), k),
        )
        i = min(range(len(kinds[kind])), key=lambda i: used.get(kinds[kind][i][1], 0))
        one = kinds[kind].pop(i)
        taken[kind] += 1
        used[one[1]] = used.get(one[1], 0) + 1
        found.append(one)
    return found


def _start(base: LearnedModel, spec: TargetSpec, device: Device) -> LearnedModel:
    """The model without a measurement: the other device, times a factor."""
    old, new = _units(RooflineModel(base.constants)), _units(RooflineModel.of(spec))
    drawn = [row for row, _ in design(REFERENCE, spec.rank_step)]
    before, after = (
        np.array([float(work(row, constants) @ units) for row in drawn])
        for constants, units in ((base.constants, old), (spec.roofline, new))
    )
    factor = BELIEVED * float(np.median(np.log(after / before)))
    prior = {
        kind: tuple((1 - BLEND) * np.array(weights) + BLEND * old)
        for kind, weights in base.prior.items()
    }
    made = LearnedModel(spec.roofline, device, prior, base=replace(base, metered=None, measured={}))
    return _scaled(made, dict.fromkeys(prior, factor), np.zeros(len(old)))


def _units(model: RooflineModel) -> Numbers:
    """Seconds of one unit of each count."""
    return np.maximum(model.seconds_each(), 1e-18)


def _scaled(model: LearnedModel, offsets: Mapping[str, float], thetas: Numbers) -> LearnedModel:
    """The model with offsets of kinds (of the log of time) and factors of the roofline's terms."""
    prior = {
        kind: tuple(np.array(weights) * np.exp(thetas + offsets[kind] / SHARE))
        for kind, weights in model.prior.items()
    }
    return replace(model, prior=prior)


def _fitted(base: LearnedModel, start: LearnedModel, known: _Known) -> LearnedModel:
    """The most probable constants and offsets, given what was measured."""
    if not known.rows:
        return start
    kinds = list(start.prior)
    of = [kind if (kind := kind_of(row)) in start.prior else ALL for row in known.rows]
    pairs = list(zip(known.rows, of, strict=True))
    parts = np.stack([work(r, start.constants) * np.array(start.prior[k]) for r, k in pairs])
    marks = np.zeros((len(of), 3 + len(kinds)))  # the factor, two classes, kinds
    marks[:, 0] = 1
    for i, (row, kind) in enumerate(pairs):
        marks[i, 1 + isinstance(row.site, ConvSite)] = 1
        marks[i, 3 + kinds.index(kind)] = 1
    terms = parts.shape[1]
    deviations = np.array([*[THETA] * terms, FACTOR, CLASS, CLASS, *[KIND] * len(kinds)])
    target = np.log(known.times) - start.grown(known.rows)
    z = most_probable(parts, marks, target, SHARE, deviations, NOISE)
    thetas, factor, classes, own = np.split(z, [terms, terms + 1, terms + 3])
    offsets = {}
    for kind, offset in zip(kinds, own, strict=True):
        of_class = 0.0 if kind == ALL else classes[int(kind.startswith("conv"))]
        offsets[kind] = float(factor[0] + of_class + offset)
    return _scaled(start, offsets, thetas)


def most_probable(
    parts: Numbers,
    marks: Numbers,
    target: Numbers,
    share: float,
    deviations: Numbers,
    noise: float,
) -> Numbers:
    """Mode of z = (thetas, offsets) in target = share log(parts @ exp(thetas)) + marks @ offsets.

    Args:
        parts: Positive terms [rows, thetas].
        marks: Which offsets count [rows, offsets].
        target: Logarithms [rows].
        share: Exponent of the sum of terms.
        deviations: Of z before any row; its mean is 0.
        noise: Of a row; errors beyond twice of it count linearly.

    Source: Huber, Robust Statistics (1981), section 7.8: reweighted Gauss-Newton steps.
    """
    terms = parts.shape[1]
    z = np.zeros(len(deviations))
    for _ in range(STEPS if len(target) else 0):
        each = parts * np.exp(z[:terms])
        whole = np.maximum(each.sum(axis=1), 1e-12)
        slope = np.hstack([share * each / whole[:, None], marks])
        left = target - share * np.log(whole) - marks @ z[terms:]
        weights = 1 / np.maximum(1, np.abs(left) / (2 * noise)) / noise**2
        scaled = slope * weights[:, None]
        step = np.linalg.solve(
            scaled.T @ slope + np.diag(deviations**-2), scaled.T @ left - z / deviations**2
        )
        z = z + np.clip(step, -1, 1)
    return z


def _with_trees(base: LearnedModel, start: LearnedModel, known: _Known) -> LearnedModel:
    """The same with trees on what is left."""
    return _fitted(base, start, known).with_trees(known.rows, known.times, TREES, ROUNDS)


Fit = Callable[[LearnedModel, LearnedModel, _Known], LearnedModel]


def _errors(base: LearnedModel, start: LearnedModel, known: _Known, fit: Fit) -> Numbers:
    """Absolute log errors of every row by a fit that has not seen its shape."""
    errors = np.zeros(len(known.rows))
    names = list(dict.fromkeys(known.groups))
    part = {name: i % min(FOLDS, len(names)) for i, name in enumerate(names)}
    of = np.array([part[g] for g in known.groups])
    for number in sorted(set(part.values())):
        out = of == number
        model = fit(base, start, known.where(~out))
        predicted = model.predict(known.where(out).rows)
        errors[out] = np.abs(np.log(predicted) - np.log(known.times[out]))
    return errors


def _width(errors: Numbers) -> tuple[float, Label]:
    """Half-width of intervals, and whether it was seen or is assumed."""
    found = conformal(errors, COVERAGE)
    return (ASSUMED, Label.ESTIMATED) if math.isinf(found) else (found, Label.MEASURED)


def _networks(
    base: LearnedModel, model: LearnedModel, profiles: Sequence[ProfileRow], spec: TargetSpec
) -> LearnedModel:
    """Composition of networks: the other device's, with a factor inside layers and one outside."""
    if not base.network:
        return replace(model, network_spread=ASSUMED, network_spread_label=Label.ESTIMATED)
    old, new = RooflineModel(base.constants).constants, spec.roofline
    start = np.array(base.network)
    start[1:] *= old.f32_macs_s / new.f32_macs_s
    names = [p.network for p in profiles]
    parts = np.array([model.parts(p.layers, p.rest) for p in profiles]).reshape(-1, len(start))
    times = np.array([p.seconds.p50_s for p in profiles])
    errors = np.zeros(len(times))
    for name in dict.fromkeys(names):
        out = np.array([n == name for n in names])
        weights = _composed(start, parts[~out], times[~out])
        errors[out] = np.abs(np.log(parts[out] @ weights) - np.log(times[out]))
    width, label = _network_width(errors, names)
    return replace(
        model,
        network=tuple(_composed(start, parts, times).tolist()),
        network_spread=width,
        network_spread_label=label,
    )


def _network_width(errors: Numbers, names: Sequence[str]) -> tuple[float, Label]:
    """Half-width of networks' intervals; profiles of one network err alike and count as one.

    With fewer than nine networks it is Student's prediction interval of their largest errors, which
    takes these to be normal: an estimate.
    """
    worst = [float(errors[[n == name for n in names]].max()) for name in dict.fromkeys(names)]
    count = len(worst)
    if count > max(STUDENT_95):
        return _width(errors)
    if count not in STUDENT_95:
        return ASSUMED, Label.ESTIMATED
    size = math.sqrt(math.fsum(e**2 for e in worst) / count)
    return min(ASSUMED, STUDENT_95[count] * size * math.sqrt(1 + 1 / count)), Label.ESTIMATED


def _composed(start: Numbers, parts: Numbers, times: Numbers) -> Numbers:
    """Weights of a network's parts: those of the start, times a factor inside and one outside."""
    split = np.stack([parts[:, 0] * start[0], parts[:, 1:] @ start[1:]], axis=1)
    deviations = np.array([INSIDE, OUTSIDE])
    none = np.zeros((len(times), 0))
    factors = np.exp(most_probable(split, none, np.log(times), 1.0, deviations, NETWORK_NOISE))
    found: Numbers = start * np.array([factors[0], *[factors[1]] * (len(start) - 1)])
    return found
