"""What was tried against the defaults of compression on MiniLM, and what it is worth.

    python -m benchmarks.verdicts [--pairs 96] [--tokens 32] [--only PART]

Parts, each at equal bytes or at equal multiply-adds:

- repair: a low-rank branch on dense int4 (EoRA) against int4 and int8 in different layers, chosen
  by measured damage, and against low rank alone;
- shared: one input factor for queries, keys and values against one each, at uniform ranks and in
  plans by damage;
- compensation: `saes-svd` against `kronecker-svd`, at uniform ranks and in plans by damage;
- clipping: scales that clip, of rows of 8 bits and of groups of 4.

Statistics come from 320 halves of docstrings of the standard library, damage from 40 others, drift
from both halves of `--pairs` others, cut at `--tokens`. Drift is the mean L2 distance of unit
embeddings to float32, standard errors are over docstrings. Weights and activations of linear layers
are integers as the kernels multiply them; bytes are codes, scales and biases of linear layers, and
multiply-adds are theirs, as a share of dense. No result depends on the machine's load.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.factorizers import BATCH, CALIBRATION, STEP, Bench, tokenizer
from benchmarks.machine import describe
from t3c.controller import chain
from t3c.controller.calibrate import Moment, collect, factorize, round_weights
from t3c.controller.costs import storage_bytes
from t3c.controller.suffix import Suffix
from t3c.core.code_storage import CodeStorage
from t3c.core.codes import GROUP, Grouped, Matrix, quantize_groups, quantize_weight
from t3c.core.formats import Dense, Format, LowRank
from t3c.core.sites import LinearSite
from t3c.elastic import fake_quant
from t3c.elastic.factorize.base import Factors
from t3c.elastic.factorize.eora import EORA
from t3c.elastic.factorize.shared_input import SHARED_INPUT_SVD
from t3c.elastic.readers import same_input
from t3c.elastic.rounding import CLIPS, DAMPING, clipped, round_groups, round_rows

OUT = Path(__file__).resolve().parent / "results" / "verdicts.json"
BRANCH = (8, 16, 32, 64)
"""Ranks of a repair."""
IN_PLANS = ((64, 8), (32, 8), (16, 8), (64, 4), (32, 4))
"""(rank, bits) of repairs that plans may choose."""
UNIFORM = (0.75, 0.5, 0.25)
"""Of each layer's multiply-adds."""
MIXED = (0.85, 0.75, 0.57, 0.47)
"""Of all multiply-adds."""
OF_THREE = (0.9, 0.75, 0.6, 0.5)
"""Of the multiply-adds of queries, keys and values, where the rest is dense."""
MENU = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
"""Shares of a layer's multiply-adds that plans may choose."""
Formats = Mapping[str, Format]


@dataclass(frozen=True, slots=True)
class Point:
    """One choice, seen on held-out texts.

    Attributes:
        name: What it is.
        megabytes: Of linear layers, 10^6 bytes.
        macs: Multiply-adds of linear layers, as a share of dense.
        drift: Mean distance to float32.
        drift_se: Its standard error, over docstrings.
        agree: Share of first halves that find the same second half as in float32.
    """

    name: str
    megabytes: float
    macs: float
    drift: float
    drift_se: float
    agree: float


@dataclass(frozen=True, slots=True)
class Repair:
    """Dense int4 with a branch of this rank, of 8 or 4 bits."""

    rank: int
    bits: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Formats of layers that read one tensor, and which of them share their input factor."""

    formats: tuple[tuple[str, Format], ...]
    shares: tuple[str, ...] = ()


class Judge:
    """MiniLM with its texts, statistics and branches.

    Attributes:
        bench: The model and the held-out texts.
        moments: Statistics of the calibration texts.
        points: What was seen, in order.
        drifts: Name -> drift of every docstring.
        repairs: Site -> branch that is added to its output now.
    """

    def __init__(self, pairs: int, tokens: int) -> None:
        """Capture, embed in float32, look at the calibration texts."""
        from examples import docstrings

        self.bench = Bench(pairs, tokens)
        self.elastic = self.bench.elastic
        found = docstrings.halves()
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
        begin = pairs + CALIBRATION // 2
        texts = [half for i in order[begin : begin + BATCH // 2] for half in found[i]]
        self.unseen = self.elastic.captured.flatten(tokenizer(tokens)(texts), {})
        self.moments = collect(self.elastic, self.bench.calibration)
        self.sites = {n: cast(LinearSite, s) for n, s in self.elastic.sites.items()}
        self.full = sum(site.macs(Dense(8)) for site in self.sites.values())
        self.points: list[Point] = []
        self.drifts: dict[str, Tensor] = {}
        with torch.no_grad(), self.elastic.using(None):
            self.whole = self.elastic.graph(*self.unseen)[0]

    def see(self, name: str, formats: Formats, size: float, macs: float) -> Point:
        """Judge what is in force together with `formats`."""
        got, want = self.bench.embed(formats), self.bench.original
        half = self.bench.count
        found, was = ((z[:half] @ z[half:].T).argmax(1) for z in (got, want))
        drift = (got - want).norm(dim=1).double().reshape(2, half).mean(0)
        self.drifts[name] = drift
        point = Point(
            name,
            round(size / 1e6, 3),
            round(macs / self.full, 4),
            round(float(drift.mean()), 5),
            round(_error(drift), 5),
            round(float((found == was).double().mean()), 4),
        )
        self.points.append(point)
        print(json.dumps(asdict(point)), flush=True)
        return point

    def plain(self, name: str, formats: Formats) -> Point:
        """Judge formats whose costs are their own."""
        return self.see(name, formats, self.bytes_of(formats), self.macs_of(formats))

    def versus(self, one: str, other: str) -> dict[str, Any]:
        """Drift of one less that of the other, docstring by docstring."""
        apart = self.drifts[one] - self.drifts[other]
        costs = {p.name: p for p in self.points}
        return {
            "one": one,
            "other": other,
            "megabytes": [costs[one].megabytes, costs[other].megabytes],
            "macs": [costs[one].macs, costs[other].macs],
            "difference": round(float(apart.mean()), 5),
            "difference_se": round(_error(apart), 5),
        }

    def bytes_of(self, formats: Formats) -> float:
        """Bytes of formats, each alone."""
        return sum(storage_bytes(self.sites[name], fmt) for name, fmt in formats.items())

    def macs_of(self, formats: Formats) -> float:
        """Multiply-adds of formats, each alone."""
        return sum(self.sites[name].macs(fmt) for name, fmt in formats.items())

    def all(self, fmt: Format) -> dict[str, Format]:
        """One format everywhere."""
        return dict.fromkeys(self.sites, fmt)

    def damage(self, formats: Formats) -> float:
        """Squared drift on the texts of the damage table, relative to the original's energy."""
        with torch.no_grad(), self.elastic.using(formats):
            got = self.elastic.graph(*self.unseen)[0]
        return float((got - self.whole).square().sum() / self.whole.square().sum())


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--pairs", type=int, default=96, help="held-out docstrings, two halves each"
    )
    parser.add_argument("--tokens", type=int, default=32, help="of each half")
    parser.add_argument("--only", choices=list(PARTS), help="the other parts stay as recorded")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(options.out.read_text()) if options.only else {}
    for part in PARTS if options.only is None else (options.only,):
        began, used = time.monotonic(), time.process_time()
        judge = Judge(options.pairs, options.tokens)
        comparisons = PARTS[part](judge)
        result[part] = {
            "machine": describe(),
            "model": f"all-MiniLM-L6-v2, {options.tokens} tokens, unit embeddings",
            "held_out_docstrings": options.pairs,
            "held_out_texts": 2 * options.pairs,
            "calibration_texts": CALIBRATION,
            "damage_texts": BATCH,
            "seconds": round(time.monotonic() - began, 1),
            "processor_seconds": round(time.process_time() - used, 1),
            "points": [asdict(p) for p in judge.points],
            "comparisons": comparisons,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")


# --- a repair of dense int4 ---------------------------------------------------------------------


class Repairs:
    """Branches on dense int4 layers; added to their outputs while `of` names them."""

    def __init__(self, judge: Judge, *, outputs: bool = True) -> None:
        """Split what the 4-bit codes of every layer lose.

        Args:
            judge: The model.
            outputs: Whether the metric is two-sided.
        """
        self.judge = judge
        self.of: dict[str, Repair] = {}
        self._factors: dict[str, Factors] = {}
        self._codes: dict[tuple[str, Repair], tuple[fake_quant.Codes, fake_quant.Codes]] = {}
        self._hooks = []
        for name, layer in judge.elastic.layers.items():
            moment = judge.moments[name]
            gains = moment.directions() if outputs else None
            q, scale = layer.codes_of("weight", 4)
            self._factors[name] = EORA.repair(
                layer.weight,
                Grouped(q.numpy(), scale.numpy()),
                moment.mean(),
                gains=gains,
                ranks=(max(BRANCH),),
            )
            self._hooks.append(layer.register_forward_hook(self._adds(name)))

    def remove(self) -> None:
        """Leave the layers as they were."""
        for hook in self._hooks:
            hook.remove()

    def _adds(self, name: str) -> Callable[..., Tensor]:
        def add(_: object, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            if name not in self.of:
                return y
            low, high = self.codes(name, self.of[name])
            return y + fake_quant.linear(fake_quant.linear(inputs[0], low), high)

        return add

    def codes(self, name: str, repair: Repair) -> tuple[fake_quant.Codes, fake_quant.Codes]:
        """Codes of both factors, made for this rank; those of `low` with error feedback."""
        if (name, repair) not in self._codes:
            low = self._factors[name]["low"][: repair.rank]
            high = self._factors[name]["high"][:, : repair.rank].numpy()
            mean = self.judge.moments[name].mean()
            made: Iterable[Matrix | Grouped]
            if repair.bits == 8:
                made = round_rows(low, mean), quantize_weight(high)
            else:
                made = round_groups(low, mean, search=True), quantize_groups(high)
            first, second = ((torch.from_numpy(m.q), torch.from_numpy(m.scale)) for m in made)
            self._codes[name, repair] = first, second
        return self._codes[name, repair]

    @contextmanager
    def using(self, choice: Mapping[str, Format | Repair]) -> Generator[dict[str, Format]]:
        """Add the branches inside the block; gives the formats of the layers below them."""
        self.of = {name: c for name, c in choice.items() if isinstance(c, Repair)}
        try:
            yield {n: Dense(4) if isinstance(c, Repair) else c for n, c in choice.items()}
        finally:
            self.of = {}

    def see(self, name: str, choice: Mapping[str, Format | Repair]) -> Point:
        """Judge a choice."""
        sites = self.judge.sites
        size = sum(_bytes(sites[n], c) for n, c in choice.items())
        macs = sum(_macs(sites[n], c) for n, c in choice.items())
        with self.using(choice) as formats:
            return self.judge.see(name, formats, size, macs)

    def table(self) -> dict[str, list[chain.Option]]:
        """Site -> dense int8, repairs and dense int4, with bytes and damage."""
        judge = self.judge
        suffix = Suffix(judge.elastic)
        suffix.load(judge.unseen)
        found: dict[str, list[chain.Option]] = {}
        menu: list[Format | Repair] = [Dense(8), *(Repair(*r) for r in IN_PLANS), Dense(4)]
        for name, site in judge.sites.items():
            row = []
            for choice in menu:
                with self.using({name: choice}) as formats, judge.elastic.using(formats):
                    damage = suffix.drift(name) / suffix.energy()
                row.append(_option(choice, _bytes(site, choice), damage))
            found[name] = sorted(row, key=lambda option: -option.cost)
        return found


def repair(judge: Judge) -> list[dict[str, Any]]:
    """EoRA against mixes of int4 and int8 and against low rank, at equal bytes."""
    elastic, sites = judge.elastic, judge.sites
    factorize(elastic, judge.moments)
    menu: dict[str, list[Format]] = {
        name: [Dense(8), Dense(4), *(LowRank(_ranks(site), bits) for bits in (8, 4))]
        for name, site in sites.items()
    }
    round_weights(  # as plans for bytes do, each width for itself
        elastic,
        judge.moments,
        menu,
        batches=judge.bench.calibration,
        stored=CodeStorage.INDEPENDENT,
    )
    repairs = Repairs(judge)
    repairs.see("dense int8", judge.all(Dense(8)))
    repairs.see("dense int4", judge.all(Dense(4)))
    uniform = [
        repairs.see(f"int4 + rank {rank} int{bits}", dict.fromkeys(sites, Repair(rank, bits)))
        for bits in (8, 4)
        for rank in BRANCH
    ]
    table = repairs.table()
    mixes = {n: [o for o in row if not isinstance(o.format, Repair)] for n, row in table.items()}
    found = []
    for point in uniform:
        plan = _within(chain.path(mixes), 1e6 * point.megabytes)
        mixed = f"int4 and int8 by damage, {plan.cost / 1e6:.2f} MB"
        if mixed not in judge.drifts:
            repairs.see(mixed, plan.formats)
            better = f"int4, repairs and int8 by damage, {plan.cost / 1e6:.2f} MB"
            repairs.see(better, _within(chain.path(table), plan.cost).formats)
            found.append(judge.versus(better, mixed))
        found.append(judge.versus(point.name, mixed))
    for bits in (8, 4):
        low = f"low rank int{bits} alone"
        repairs.see(low, _fitting(judge, bits, judge.bytes_of(judge.all(Dense(4)))))
        found.append(judge.versus(low, "dense int4"))
    repairs.remove()
    one_sided = Repairs(judge, outputs=False)
    for rank in (16, 64):
        name = f"int4 + rank {rank} int8, inputs only"
        one_sided.see(name, dict.fromkeys(sites, Repair(rank, 8)))
        found.append(judge.versus(name, f"int4 + rank {rank} int8"))
    one_sided.remove()
    return found


def _bytes(site: LinearSite, choice: Format | Repair) -> int:
    """Bytes of a site; the bias counts once."""
    if not isinstance(choice, Repair):
        return storage_bytes(site, choice)
    branch = storage_bytes(site, LowRank(choice.rank, choice.bits)) - 4 * site.n
    return storage_bytes(site, Dense(4)) + branch


def _macs(site: LinearSite, choice: Format | Repair) -> int:
    """Multiply-adds of a site."""
    if not isinstance(choice, Repair):
        return site.macs(choice)
    return site.macs(Dense(4)) + site.macs(LowRank(choice.rank))


def _ranks(site: LinearSite) -> int:
    """The largest rank with 4-bit codes that is no larger than the dense layer."""
    return int(site.n * site.k / (site.n + site.k)) // STEP * STEP


def _fitting(judge: Judge, bits: int, size: float) -> dict[str, Format]:
    """Low ranks everywhere, one share of each layer's break-even, within these bytes."""
    for percent in range(100, 0, -1):
        chosen: dict[str, Format] = {
            name: LowRank(max(STEP, percent * _ranks(site) // 100 // STEP * STEP), bits)
            for name, site in judge.sites.items()
        }
        if judge.bytes_of(chosen) <= size:
            return chosen
    raise ValueError(f"no low rank takes at most {size} bytes; allow more")


# --- one input factor for queries, keys and values ----------------------------------------------


class Thirds:
    """Queries, keys and values of every block, with factors of their own and shared ones."""

    def __init__(self, judge: Judge) -> None:
        """Make both, at full rank, and their codes."""
        self.judge = judge
        self.groups = [g for g in same_input(judge.elastic) if len(g) == 3]
        if not self.groups:
            raise ValueError("no three layers of this model read one tensor; nothing is shared")
        self.suffix = Suffix(judge.elastic)
        self.suffix.load(judge.unseen)
        self._options: dict[tuple[str, str], list[chain.Option]] = {}
        self._made: dict[tuple[str, tuple[str, ...]], tuple[Factors, Matrix, Matrix]] = {}
        for group in self.groups:
            for name in group:
                layer, moment = judge.elastic.layers[name], judge.moments[name].mean()
                factors = {f: layer.factor(f).detach().clone() for f in ("low", "high")}
                self._keep(name, (), factors, round_rows(factors["low"], moment))
            for shares in (group, group[:2]):
                self._share(shares)

    def _share(self, names: tuple[str, ...]) -> None:
        moments = [self.judge.moments[n] for n in names]
        whole = Moment(sum(m.total for m in moments), None, sum(m.rows for m in moments))  # type: ignore[arg-type]
        gains = [m.gains for m in moments]
        if any(g is None for g in gains):
            raise ValueError(f"no gradient reaches {names}; their outputs cannot be weighed")
        weights = [self.judge.elastic.layers[n].weight for n in names]
        made = SHARED_INPUT_SVD.together(
            weights, whole.mean(), gains=[cast(Tensor, g) for g in gains]
        )
        low = round_rows(made[0]["low"], whole.mean())
        for name, factors in zip(names, made, strict=True):
            self._keep(name, names, factors, low)

    def _keep(self, name: str, shares: tuple[str, ...], factors: Factors, low: Matrix) -> None:
        high = quantize_weight(factors["high"].detach().numpy())
        self._made[name, shares] = factors, low, high

    def install(self, layout: Layout) -> None:
        """Give its factors and their codes to each layer."""
        for name, fmt in layout.formats:
            if isinstance(fmt, LowRank):
                shares = layout.shares if name in layout.shares else ()
                factors, low, high = self._made[name, shares]
                self.judge.elastic.set_factors(name, factors)
                self.judge.elastic.layers[name].set_codes("low", low)
                self.judge.elastic.layers[name].set_codes("high", high)

    def cost(self, layout: Layout) -> tuple[float, float]:
        """(bytes, multiply-adds); what is shared counts once."""
        formats = dict(layout.formats)
        size, macs = self.judge.bytes_of(formats), self.judge.macs_of(formats)
        for name in layout.shares[1:]:
            site, rank = self.judge.sites[name], int(formats[name].ranks[0])
            size -= rank * (site.k + 4)
            macs -= site.rows * rank * site.k
        return size, macs

    def see(self, name: str, layouts: Iterable[Layout], rest: Formats) -> Point:
        """Judge layouts of all groups, with formats of all other layers."""
        size, macs, formats = self.judge.bytes_of(rest), self.judge.macs_of(rest), dict(rest)
        for layout in layouts:
            self.install(layout)
            size, macs = (a + b for a, b in zip((size, macs), self.cost(layout), strict=True))
            formats |= dict(layout.formats)
        return self.judge.see(name, formats, size, macs)

    def apart(self, group: tuple[str, ...], share: float) -> Layout:
        """Every layer at its own factors."""
        ranks = [(name, LowRank(_rank(self.judge.sites[name], share))) for name in group]
        return Layout(tuple(ranks))

    def together(self, group: tuple[str, ...], share: float, count: int = 3) -> Layout:
        """The first `count` layers at a shared factor with this share of their multiply-adds."""
        sites = [self.judge.sites[name] for name in group[:count]]
        outputs, k = sum(site.n for site in sites), sites[0].k
        rank = max(STEP, int(share * outputs * k / (outputs + k)) // STEP * STEP)
        rank = min(rank, k)
        rest: list[tuple[str, Format]] = [(name, Dense(8)) for name in group[count:]]
        shared: list[tuple[str, Format]] = [(name, LowRank(rank)) for name in group[:count]]
        return Layout((*shared, *rest), group[:count])

    def rows(self, kinds: str) -> dict[str, list[chain.Option]]:
        """Group -> layouts with multiply-adds and damage, of kinds 'apart', 'shared' or 'both'."""
        return {
            group[0]: sorted(
                [
                    o
                    for kind in ("apart", "shared")
                    if kinds in (kind, "both")
                    for o in self.options(group, kind)
                ],
                key=lambda option: -option.cost,
            )
            for group in self.groups
        }

    def options(self, group: tuple[str, ...], kind: str) -> list[chain.Option]:
        """Layouts of one kind; those apart are the best ones by the damage of single layers."""
        if (group[0], kind) not in self._options:
            make = self._apart_options if kind == "apart" else self._shared_options
            self._options[group[0], kind] = make(group)
        return self._options[group[0], kind]

    def _shared_options(self, group: tuple[str, ...]) -> list[chain.Option]:
        dense = Layout(tuple((name, Dense(8)) for name in group))
        layouts = [dense, *(self.together(group, s, n) for n in (3, 2) for s in MENU)]
        found = []
        for layout in layouts:
            self.install(layout)
            damage = self.judge.damage(dict(layout.formats))
            found.append(_option(layout, self.cost(layout)[1], damage))
        return found

    def _apart_options(self, group: tuple[str, ...]) -> list[chain.Option]:
        singles = {name: self.singles(name) for name in group}
        return [
            _option(Layout(tuple(plan.formats.items())), plan.cost, plan.damage)
            for plan in chain.path(singles)
        ]

    def singles(self, name: str) -> list[chain.Option]:
        """Formats of one layer with its own factors, with multiply-adds and damage."""
        site, found = self.judge.sites[name], []
        menu: list[Format] = [Dense(8), *(LowRank(_rank(site, share)) for share in MENU)]
        for fmt in menu:
            if any(name in group for group in self.groups):
                self.install(Layout(((name, fmt),)))
            with self.judge.elastic.using({name: fmt}):
                damage = self.suffix.drift(name) / self.suffix.energy()
            found.append(_option(fmt, site.macs(fmt), damage))
        return found


def shared(judge: Judge) -> list[dict[str, Any]]:
    """One input factor for queries, keys and values, at equal multiply-adds."""
    elastic, sites = judge.elastic, judge.sites
    factorize(elastic, judge.moments)
    round_weights(
        elastic,
        judge.moments,
        {n: [Dense(8), LowRank(site.full_rank)] for n, site in sites.items()},
    )
    thirds = Thirds(judge)
    inside = {name for group in thirds.groups for name in group}
    others = {name: Dense(8) for name in sites if name not in inside}
    found = []
    judge.plain("dense int8", judge.all(Dense(8)))
    for share in UNIFORM:
        names = [f"q, k, v at {share}, {kind}" for kind in ("apart", "shared")]
        thirds.see(names[0], [thirds.apart(g, share) for g in thirds.groups], others)
        thirds.see(names[1], [thirds.together(g, share) for g in thirds.groups], others)
        found.append(judge.versus(names[1], names[0]))
    rows = {kind: thirds.rows(kind) for kind in ("apart", "shared", "both")}
    for share in OF_THREE:
        limit = share * chain.path(rows["apart"])[0].cost
        for kind, row in rows.items():
            plan = _within(chain.path(row), limit)
            limit = min(limit, plan.cost) if kind == "apart" else limit  # no more than those apart
            thirds.see(f"q, k, v by damage at {share}, {kind}", _layouts(plan), others)
        found += [
            judge.versus(*(f"q, k, v by damage at {share}, {kind}" for kind in (one, "apart")))
            for one in ("shared", "both")
        ]
    rest = {name: thirds.singles(name) for name in others}
    for share in MIXED:
        limit = share * judge.full
        for kind in ("apart", "both"):
            plan = _within(chain.path({**rows[kind], **rest}), limit)
            limit = min(limit, plan.cost)
            formats = {name: plan.formats[name] for name in others}
            thirds.see(f"all by damage at {share}, {kind}", _layouts(plan), formats)
        names = [f"all by damage at {share}, {kind}" for kind in ("both", "apart")]
        found.append(judge.versus(*names) | {"groups that share": _sharing(plan)})
    return found


def _layouts(plan: chain.Plan) -> list[Layout]:
    return [x for x in cast(Mapping[str, Any], plan.formats).values() if isinstance(x, Layout)]


def _sharing(plan: chain.Plan) -> int:
    return sum(bool(layout.shares) for layout in _layouts(plan))


def _rank(site: LinearSite, share: float) -> int:
    """The rank with this share of a layer's multiply-adds, a multiple of STEP."""
    return max(STEP, int(share * site.n * site.k / (site.n + site.k)) // STEP * STEP)


# --- compensation of upstream errors ------------------------------------------------------------


def compensation(judge: Judge) -> list[dict[str, Any]]:
    """`saes-svd` against `kronecker-svd`, at equal multiply-adds."""
    mixed: Mapping[float, Formats] = {}
    for name in ("kronecker-svd", "saes-svd"):
        for layer in judge.elastic.layers.values():
            layer.set_thin(name)
        factorize(judge.elastic, judge.moments, batches=judge.bench.calibration)
        mixed = mixed or judge.bench.plans(MIXED)  # of the first one, for both
        for share in UNIFORM:
            judge.plain(f"{name}, every layer at {share}", judge.bench.uniform(share, 8))
        for share in MIXED:
            judge.plain(f"{name}, by damage at {share}", mixed[share])
    cases = [f"every layer at {s}" for s in UNIFORM] + [f"by damage at {s}" for s in MIXED]
    return [judge.versus(f"saes-svd, {c}", f"kronecker-svd, {c}") for c in cases]


# --- scales that clip ---------------------------------------------------------------------------


def clipping(judge: Judge) -> list[dict[str, Any]]:
    """Scales of 8-bit rows and of 4-bit groups, to nearest and with error feedback."""
    Made = Matrix | Grouped
    makers: dict[str, Callable[[Tensor, Tensor], Made]] = {
        "int8, nearest": lambda w, m: quantize_weight(w.numpy()),
        "int8, nearest, clipped": lambda w, m: _rows(w, m, feedback=False),
        "int8, feedback": round_rows,
        "int8, feedback, clipped": lambda w, m: _rows(w, m, feedback=True),
        "int4, nearest, no clipping": lambda w, m: _groups(w, (1.0,)),
        "int4, nearest, two scales": lambda w, m: quantize_groups(w.numpy()),
        "int4, nearest, 14 scales": lambda w, m: _groups(w, CLIPS),
        "int4, feedback, two scales": round_groups,
        "int4, feedback, 14 scales": lambda w, m: round_groups(w, m, search=True),
    }
    for name, make in makers.items():
        for site, layer in judge.elastic.layers.items():
            layer.set_codes("weight", make(layer.weight.detach(), judge.moments[site].mean()))
        judge.plain(name, judge.all(Dense(8 if name.startswith("int8") else 4)))
    pairs = [
        ("int8, nearest, clipped", "int8, nearest"),
        ("int8, feedback, clipped", "int8, feedback"),
        ("int4, nearest, two scales", "int4, nearest, no clipping"),
        ("int4, nearest, 14 scales", "int4, nearest, two scales"),
        ("int4, feedback, 14 scales", "int4, feedback, two scales"),
    ]
    return [judge.versus(*pair) for pair in pairs]


def _groups(weight: Tensor, shares: Sequence[float]) -> Grouped:
    """4-bit codes to nearest; of these scales the one of least squared error."""
    parts = [weight[:, at : at + GROUP].float() for at in range(0, weight.shape[1], GROUP)]
    scales = [clipped(part, torch.ones(part.shape[1]), shares=shares) for part in parts]
    q = [torch.round(p / s[:, None]).clamp(-8, 7) for p, s in zip(parts, scales, strict=True)]
    return Grouped(torch.cat(q, 1).to(torch.int8).numpy(), torch.stack(scales, 1).numpy())


def _rows(weight: Tensor, moment: Tensor, *, feedback: bool) -> Matrix:
    """8-bit codes whose scale is, of 14 shares, the one that costs least where errors count.

    Costs are squared errors, with feedback divided by the squared pivots as the rounding does.
    """
    w = weight.float().clone()
    rows = moment.double().clone()
    rows.diagonal().add_(DAMPING * float(rows.diagonal().mean()))
    upper = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(rows)), upper=True
    ).float()
    pivots = upper.diagonal() if feedback else torch.ones(w.shape[1])
    peak = w.abs().amax(1)
    scale, least = torch.ones_like(peak), torch.full_like(peak, math.inf)
    for share in CLIPS:
        step = torch.where(peak > 0, share * peak / 127, torch.ones_like(peak))
        off = torch.round(w / step[:, None]).clamp(-127, 127) * step[:, None] - w
        cost = (off / pivots).square().sum(1)
        scale, least = torch.where(cost < least, step, scale), torch.minimum(cost, least)
    q = torch.round(w / scale[:, None]).clamp(-127, 127)
    for j in range(w.shape[1] if feedback else 0):
        q[:, j] = torch.round(w[:, j] / scale).clamp(-127, 127)
        error = (w[:, j] - q[:, j] * scale) / upper[j, j]
        w[:, j + 1 :] -= torch.outer(error, upper[j, j + 1 :])
    return Matrix(q.to(torch.int8).numpy(), scale.numpy())


# --- what parts share ---------------------------------------------------------------------------


def _option(choice: object, cost: float, damage: float) -> chain.Option:
    """The chain only hands its formats on, whatever they are."""
    return chain.Option(cast(Format, choice), float(cost), damage)


def _within(path: Sequence[chain.Plan], cost: float) -> chain.Plan:
    """The first plan that costs at most this; the last one if there is none."""
    return next((p for p in path if p.cost <= cost * (1 + 1e-9)), path[-1])


def _error(values: Tensor) -> float:
    """Standard error of the mean of independent values."""
    return float(values.double().std()) / math.sqrt(len(values))


PARTS: Mapping[str, Callable[[Judge], list[dict[str, Any]]]] = {
    "repair": repair,
    "shared": shared,
    "compensation": compensation,
    "clipping": clipping,
}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
