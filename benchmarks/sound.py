"""Sound bounds against attacks: no drift may exceed one, and how far above the largest they are.

Small nets trained on synthetic classes; random points and projected gradients on ||dz||, of every
profile over every domain; the last net also as the compiled library.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import t3c
from t3c import elasticize
from t3c.certificate.sound import Ball, Box, Domain, sound_bounds
from t3c.certificate.sound.domain import Region
from t3c.certificate.sound.form import MODES
from t3c.controller.damage import DamageTable
from t3c.controller.grids import fit_grids
from t3c.controller.plan import Fixed, Plan
from t3c.core.formats import Dense, Format, LowRank, Tucker2
from t3c.core.profile import Profile, ProfileChain
from t3c.cost_models.base import Work
from t3c.elastic.model import ElasticModel
from t3c.elastic.snap import Snap

BATCH = 220
"""Attacks at a time."""
ROUNDS = 8
"""Batches in each domain: dealt out to its cells."""
STEPS = 10
"""Of projected gradient."""
LIBRARY = 1056
"""Inputs that the library runs in each profile, over all domains."""


class Conv(nn.Module):
    """Three convolutions, an addition, an average."""

    def __init__(self) -> None:
        """Its layers."""
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.c, self.l = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = torch.relu(self.b(torch.relu(self.a(x))))
        y: Tensor = self.l(torch.relu(x + self.c(x)).mean((2, 3)))
        return y


class Transformer(nn.Module):
    """One block with two heads and layer norms, an average over positions, a classifier."""

    def __init__(self, width: int) -> None:
        """Its layers."""
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.l = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        batch, length, width = x.shape
        h = self.one(x)
        q, k, v = (
            m(h).view(batch, length, 2, width // 2).transpose(1, 2)
            for m in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + self.b(nn.functional.gelu(self.a(self.two(x))))
        y: Tensor = self.l(x.mean(1))
        return y


@dataclass(frozen=True, slots=True)
class Subject:
    """A net to attack.

    Attributes:
        net: The module.
        shape: Of one input.
        formats: Of three profiles, smallest first.
        static: Whether activations lie on grids that are fixed on data.
        library: Whether the compiled library is attacked, too.
        domains: How many of the domains, narrow to wide.
        cells: Inputs around which domains lie.
        margins: Inputs whose margins are compared with their bounds.
    """

    net: nn.Module
    shape: tuple[int, ...]
    formats: list[dict[str, Format]]
    static: bool = False
    library: bool = False
    domains: int = 3
    cells: int = 8
    margins: int = 16


@dataclass(slots=True)
class Attack:
    """What was found.

    Attributes:
        worst: Largest drift.
        count: Points that were tried, each climb as one.
        inputs: Where the climbs ended.
    """

    worst: float = 0.0
    count: int = 0
    inputs: list[Tensor] = field(default_factory=list)


def subjects() -> dict[str, Subject]:
    """Name -> net."""
    first, second, last = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
    mlp = nn.Sequential(first, nn.ReLU(), second, nn.GELU(), last)
    d = Dense(8)

    def formats(sites: str, changed: str, *options: Format) -> list[dict[str, Format]]:
        return [{**dict.fromkeys(sites, d), **dict.fromkeys(changed, f)} for f in options]

    core = formats("abcl", "c", Tucker2(4, 4), Tucker2(10, 10), d)
    return {
        "mlp": Subject(mlp, (16,), formats("024", "2", LowRank(4), LowRank(12), d)),
        "conv": Subject(Conv(), (1, 8, 8), core),
        "conv, static grids": Subject(Conv(), (1, 8, 8), core, static=True),
        "attention": Subject(
            Transformer(16), (5, 16), formats("qkvoabl", "qkvoab", LowRank(4), LowRank(10), d)
        ),
        "attention, library": Subject(
            Transformer(64),
            (3, 64),
            formats("qkvoabl", "qkvoab", LowRank(16), LowRank(32), d),
            library=True,
            domains=1,
            cells=1,
            margins=0,
        ),
    }


def trained(net: nn.Module, means: Tensor) -> float:
    """Train on noisy copies of each class's mean; the accuracy on fresh ones."""
    adam = torch.optim.Adam(net.parameters(), 3e-3)

    def draw() -> tuple[Tensor, Tensor]:
        y = torch.randint(0, len(means), (256,))
        return means[y] + 0.7 * torch.randn(256, *means.shape[1:]), y

    for _ in range(200):
        x, y = draw()
        loss = nn.functional.cross_entropy(net(x), y)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    x, y = draw()
    return float((net(x).argmax(1) == y).float().mean())


def attack(model: ElasticModel, formats: dict[str, Format], domain: Domain) -> Attack:
    """Random points and projected gradients in every cell.

    Args:
        model: Captured with `BATCH` inputs at a time.
        formats: Of the profile.
        domain: Of one input.
    """
    found = Attack()
    for number in range(ROUNDS):
        (region,) = domain.cells[number % len(domain.cells)]
        for drift, x, done in _climb(model, formats, region):
            found.worst = max(found.worst, float(drift.max()))
            found.count += len(x) * done
        found.inputs.append(x)
    return found


def _climb(
    model: ElasticModel, formats: dict[str, Format], region: Region
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(drifts, inputs, whether they count as new) at random points, then step by step."""

    def drift_of(x: Tensor) -> Tensor:
        before = model.graph(x)[0]
        with model.using(formats):
            found: Tensor = (model.graph(x)[0] - before).flatten(1).norm(dim=1)
        return found

    x = _random(region)
    with torch.no_grad():
        yield drift_of(x), x, 1
    for step in range(STEPS):
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(drift_of(x).sum(), x)
        with torch.no_grad():
            x = _moved(x, slope, region, 0.5 / (step + 1))
            yield drift_of(x), x, int(step == STEPS - 1)


def _random(region: Region) -> Tensor:
    """Of a box every second one a corner, of a ball all on the sphere."""
    if isinstance(region, Ball):
        turn = torch.randn(BATCH, *region.center.shape[1:])
        return _inside(region, region.center + region.radius * turn / _norm(turn))
    turn = torch.randn(BATCH, *region.low.shape[1:])
    x = region.low + (region.high - region.low) * torch.rand_like(turn)
    x[::2] = torch.where(turn[::2] > 0, region.high, region.low)
    return _inside(region, x)


def _moved(x: Tensor, slope: Tensor, region: Region, size: float) -> Tensor:
    if isinstance(region, Ball):
        return _inside(region, x + size * region.radius * slope / _norm(slope))
    return _inside(region, x + size * (region.high - region.low) * slope.sign())


def _inside(region: Region, x: Tensor) -> Tensor:
    """The nearest points of the region."""
    if isinstance(region, Box):
        return torch.minimum(torch.maximum(x, region.low), region.high)
    away = x - region.center
    shrink = (region.radius * (1 - 1e-6) / _norm(away)).clamp_max(1)
    inside: Tensor = region.center + away * shrink
    return inside


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = x.flatten(1).norm(dim=1).clamp_min(1e-12)
    return norm.reshape(-1, *[1] * (x.dim() - 1))


def wide(net: nn.Module, model: ElasticModel, example: Tensor) -> ElasticModel:
    """The same elastic model for `BATCH` inputs at a time: the same weights, factors and grids."""
    made = elasticize(net, (example.expand(BATCH, *example.shape[1:]).contiguous(),))
    made.set_grids(grids_of(model))
    for name, layer in model.layers.items():
        for factor in ("low", "high", "reduce", "core", "expand"):
            if isinstance(ours := getattr(layer, factor), Tensor):
                if not torch.equal(ours, made.layers[name].factor(factor)):
                    raise AssertionError(f"{name}:{factor} differs")
    return made


def grids_of(model: ElasticModel) -> dict[str, Any]:
    """Name -> grid, as `set_grids` takes them."""
    snaps = [m for m in model.graph.modules() if isinstance(m, Snap)]
    found = {snap.name: snap.grid for snap in snaps if snap.grid is not None}
    inner = {
        f"{name}:{factor}": grid
        for name, layer in model.layers.items()
        for factor, grid in layer.grids.items()
        if factor in ("low", "reduce", "core")
    }
    return {**found, **inner}


def measured(subject: Subject) -> dict[str, Any]:
    """Accuracy, attacks, violations and tightness of one net."""
    means = torch.randn(4, *subject.shape)
    accuracy = trained(subject.net, means)
    model = elasticize(subject.net.eval().requires_grad_(False), (means[:1],))
    data = [(means[i % 4][None] + 0.7 * torch.randn(1, *subject.shape),) for i in range(64)]
    names = ("tiny", "middle", "dense")
    chain = ProfileChain(
        tuple(Profile(n, f, 1, 1, 1) for n, f in zip(names, subject.formats, strict=True))
    )
    for fmts in subject.formats:  # grids need factors
        with model.using(fmts), torch.no_grad():
            model.graph(*data[0])
    if subject.static:
        model.set_grids(fit_grids(model, data))
    many = wide(subject.net, model, means[:1])
    domains = {
        "max 0.02 around data": Domain.around(data[: subject.cells], 0.02),
        "l2 0.1 around data": Domain.around(data[: subject.cells], 0.1, "l2"),
        "box of 64 inputs": Domain.of_data(data),
    }
    rows: list[dict[str, Any]] = []
    seen: dict[str, list[tuple[str, Tensor]]] = {name: [] for name in names}
    for title, domain in list(domains.items())[: subject.domains]:
        begin = time.perf_counter()
        best = sound_bounds(model, chain, domain)
        seconds = time.perf_counter() - begin
        others = {m: sound_bounds(model, chain, domain, mode=m) for m in MODES if m != "symbols"}
        for profile in chain:
            found = attack(many, dict(profile.formats), domain)
            seen[profile.name] += [(title, x) for x in torch.cat(found.inputs)[:, None]]
            row = _row(model, profile, best[profile.name], found, data)
            for mode, bounds in others.items():
                row["bounds"][mode] = _finite(bounds[profile.name].raw)
            row["violations"] = [
                mode for mode, value in row["bounds"].items() if value and found.worst > value
            ]
            rows.append({"domain": title, "profile": profile.name, **row, "seconds": seconds / 3})
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "accuracy": accuracy,
        "cells": subject.cells,
        "attacks": sum(row["attacks"] for row in rows),
        "attacks_per_profile": sum(row["attacks"] for row in rows) // len(names),
        "violations": sum(len(row["violations"]) for row in rows),
        "labels": labels(model, chain, data[: subject.margins]) if subject.margins else None,
        "rows": rows,
    }
    if subject.library:
        result["library"] = library(model, chain, data, seen, rows)
    return result


def _row(
    model: ElasticModel,
    profile: Profile,
    bound: Any,
    found: Attack,
    data: list[tuple[Tensor]],
) -> dict[str, Any]:
    drifts = []
    with torch.no_grad():
        for (x,) in data:
            before = model.graph(x)[0]
            with model.using(profile.formats):
                drifts.append(float((model.graph(x)[0] - before).norm()))
    median = statistics.median(drifts)
    return {
        "status": bound.status,
        "reason": bound.reason,
        "attacks": found.count,
        "largest_drift": found.worst,
        "median_drift_of_data": median,
        "bounds": {"best": _finite(bound.raw)},
        "tightness": _finite(bound.raw / found.worst),
        "over_median": _finite(bound.raw / median),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def labels(
    model: ElasticModel, chain: ProfileChain, data: list[tuple[Tensor]]
) -> dict[str, dict[str, int]]:
    """Of some inputs, how many labels cannot flip: sqrt(2) times the bound is below the margin."""
    kept = {p.name: {"inputs": len(data), "certified": 0, "flipped": 0} for p in chain}
    for (x,) in data:
        bounds = sound_bounds(model, chain, Domain.around([(x,)], 0.0))
        with torch.no_grad():
            z = model.graph(x)[0]
            margin = float(z.topk(2).values.diff().abs())
            for p in chain:
                safe = math.sqrt(2) * bounds[p.name].raw < margin
                with model.using(p.formats):
                    flip = bool(model.graph(x)[0].argmax() != z.argmax())
                kept[p.name]["certified"] += safe
                kept[p.name]["flipped"] += safe and flip
    return kept


def library(
    model: ElasticModel,
    chain: ProfileChain,
    data: list[tuple[Tensor]],
    seen: dict[str, list[tuple[str, Tensor]]],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """The compiled library at the ends of climbs: what it drifts, against the same bounds."""

    def planner(elastic: ElasticModel, *_: Any, **__: Any) -> Plan:
        none = Fixed(0.0, Work(), 0, 0, 1)
        drift = {p.name: 0.0 for p in chain}
        return Plan(chain, (), DamageTable({}, 0.0), drift, (), (), elastic.sites, none)

    with tempfile.TemporaryDirectory() as folder:
        artifact = t3c.lower(
            model,
            "x86",
            model.example_inputs,
            Path(folder) / "net",
            calibration=data,
            planner=planner,
            calls=0,
            say=lambda line: None,
        )
        session = t3c.load(artifact)
        domains = len(rows) // len(chain.profiles)
        made: dict[str, Any] = {"target": "x86", "profiles": {}}
        for profile in chain:
            session.set_profile(profile.name)
            made["profiles"][profile.name] = [
                _run(model, session, profile, row, seen[profile.name], LIBRARY // domains)
                for row in rows
                if row["profile"] == profile.name
            ]
    every = [row for rows in made["profiles"].values() for row in rows]
    made["inputs_per_profile"] = sum(row["inputs"] for row in every) // len(chain.profiles)
    made["violations"] = sum(row["violations"] for row in every)
    return made


def _run(
    model: ElasticModel,
    session: Any,
    profile: Profile,
    row: dict[str, Any],
    seen: list[tuple[str, Tensor]],
    count: int,
) -> dict[str, Any]:
    ends = [x for title, x in seen if title == row["domain"]]
    chosen = ends[:: max(1, len(ends) // count)][:count]
    bound = row["bounds"]["best"]
    ours: list[float] = []
    apart: list[float] = []
    with torch.no_grad():
        for x in chosen:
            before = model.graph(x)[0]
            with model.using(profile.formats):
                reference = model.graph(x)[0]
            got = session(x)
            ours.append(float((got - before).norm()))
            apart.append(float((got - reference).norm()))
    return {
        "domain": row["domain"],
        "inputs": len(chosen),
        "largest_drift": max(ours),
        "largest_distance_to_reference": max(apart),
        "bound": bound,
        "violations": sum(bound is not None and value > bound for value in ours),
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument(
        "--only", nargs="*", default=None, help="nets to measure again; all by default"
    )
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    chosen = {n: s for n, s in subjects().items() if given.only is None or n in given.only}
    found = {}
    for name, subject in chosen.items():
        torch.manual_seed(0)
        begin = time.perf_counter()
        found[name] = measured(subject)
        found[name]["seconds"] = round(time.perf_counter() - begin, 1)
        kept = given.only is not None and given.out.exists()
        earlier = json.loads(given.out.read_text())["nets"] if kept else {}
        nets = {**earlier, **found}
        ordered = {n: nets[n] for n in subjects() if n in nets}
        result = {"command": "python -m benchmarks.sound", "nets": ordered}
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
