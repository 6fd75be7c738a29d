"""What MiniLM loses at every size and at every share of its multiply-adds, without training.

    python -m benchmarks.frontier [--pairs 152] [--only bytes]

A sentence encoder (MiniLM, mean over tokens, unit length) is planned for multiply-adds and for
bytes by the parts of `t3c.controller.plan.plan`, on all data and without a time limit, so that a
busy machine changes nothing. It is compared with dense post-training quantization at equal cost:
int8 with a scale per row, int4 in groups of 64, each rounded to nearest and with error feedback.
Drift is the mean L2 distance of unit embeddings to float32, on docstrings of the standard library
that nothing else used; agree is how often a first half finds the same second half as in float32.
Weights and activations of linear layers are integers, multiplied in torch exactly as the kernels do
it (`t3c.lower` proves that). Plans for bytes come twice: with nested codes, those of 8 bits
containing those of 4, and with an array for each width (`t3c.lower(..., codes="independent")`);
each is compared with every baseline of its size and with the best one that fits into its bytes.
Embedding tables, norms and attention are float32 everywhere and count nowhere.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import describe
from examples import demo_minilm, docstrings, models
from t3c.api import elasticize
from t3c.controller import chain
from t3c.controller.calibrate import collect, factorize, round_weights
from t3c.controller.costs import storage_bytes
from t3c.controller.damage import DamageTable, Entry, Menu, measure
from t3c.controller.plan import largest, menu_of, options_of
from t3c.core.code_storage import CodeStorage
from t3c.core.formats import Dense, Format, LowRank
from t3c.core.gate import GateRow
from t3c.core.objective import Objective
from t3c.core.sites import LinearSite
from t3c.cost_models import cost_model
from t3c.elastic.model import ElasticModel
from t3c.targets import get

RESULTS = Path(__file__).resolve().parent / "results"
BATCH = 8
"""Texts of one call; every row has its own scale, so it changes no number."""
CALIBRATION, TABLE = 320, 16
"""Texts behind the factors; others behind the damage table."""
SHARES = (0.85, 0.75, 0.66, 0.57, 0.47)
"""Of the multiply-adds of dense linear layers."""
SIZES = (0.85, 0.7, 0.45, 0.38)
"""Of the bytes of dense int8, beside those of dense int8 and dense int4 themselves."""
WANTED = {0.75: 0.26, 0.57: 0.43}
"""Share of the multiply-adds -> drift that it shall cost at most."""
TARGET, PROFILES = "x86-vnni", 8
"""What the menu is made for."""
WORKERS = 2
"""Entries of the damage table that are measured at the same time."""
PARTS = ("macs", "bytes")
Batch = tuple[Tensor, ...]


class Encoder(nn.Module):
    """Mean of the token vectors that are no padding, at unit length: [batch, width]."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap a model that gives `last_hidden_state`."""
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit embeddings of ids and mask [batch, tokens]."""
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).float()
        mean = (hidden * weight).sum(1) / weight.sum(1)
        unit: Tensor = mean / mean.norm(dim=1, keepdim=True)
        return unit


@dataclass(frozen=True, slots=True)
class Point:
    """One plan, seen on held-out texts.

    Attributes:
        name: What it is.
        macs_share: Of the multiply-adds of dense linear layers.
        megabytes: Codes, scales and biases of the linear layers, 10^6 bytes.
        drift: Mean distance to float32.
        drift_se: Its standard error.
        agree: Share of queries with float32's answer.
        agree_se: Its standard error.
        predicted: Drift that the damage table predicts; None for what is not planned.
    """

    name: str
    macs_share: float
    megabytes: float
    drift: float
    drift_se: float
    agree: float
    agree_se: float
    predicted: float | None = None


class Judge:
    """Embeds held-out pairs and compares with float32.

    Attributes:
        drifts: Name -> distance of every text.
    """

    def __init__(self, elastic: ElasticModel, batches: Sequence[Batch]) -> None:
        """Embed all texts in float32."""
        self.batches = batches
        self.full = sum(site.macs(Dense(8)) for site in elastic.sites.values())
        self.reference = self.embed(elastic, None)
        self.drifts: dict[str, Tensor] = {}

    def embed(self, elastic: ElasticModel, formats: Mapping[str, Format] | None) -> Tensor:
        """Unit embeddings of all texts."""
        with torch.inference_mode(), elastic.using(formats):
            return torch.cat([elastic.graph(*batch)[0] for batch in self.batches])

    def __call__(
        self,
        name: str,
        elastic: ElasticModel,
        formats: Mapping[str, Format],
        predicted: float | None = None,
        codes: CodeStorage = CodeStorage.INDEPENDENT,
    ) -> Point:
        """The point of a plan."""
        found = self.embed(elastic, formats)
        drift = (found - self.reference).norm(dim=1)
        self.drifts[name] = drift
        agree = (_answers(found) == _answers(self.reference)).double()
        point = Point(
            name,
            macs_of(elastic, formats) / self.full,
            bytes_of(elastic, formats, codes) / 1e6,
            float(drift.mean()),
            _error(_pairs(drift)),
            float(agree.mean()),
            _error(agree),
            predicted,
        )
        print(
            f"{name:28} macs {point.macs_share:.3f}  MB {point.megabytes:6.2f}  "
            f"drift {point.drift:.4f} +- {point.drift_se:.4f}  "
            f"agree {point.agree:.3f} +- {point.agree_se:.3f}",
            flush=True,
        )
        return point

    def versus(self, ours: Point, dense: Point) -> dict[str, Any]:
        """Ours less dense, text by text."""
        apart = self.drifts[ours.name] - self.drifts[dense.name]
        return {
            "ours": ours.name,
            "dense": dense.name,
            "megabytes": [ours.megabytes, dense.megabytes],
            "drift": [ours.drift, dense.drift],
            "difference": float(apart.mean()),
            "difference_se": _error(_pairs(apart)),
        }


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=152, help="held-out docstrings, in fours")
    parser.add_argument("--only", choices=list(PARTS), help="the other part stays as recorded")
    parser.add_argument("--tables", type=Path, help="folder of damage tables, to go on with")
    parser.add_argument("--out", type=Path, default=RESULTS / "frontier.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = PARTS if options.only is None else (options.only,)
    result = json.loads(options.out.read_text()) if options.only else {}
    result |= run(options.pairs, options.tables, parts)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, options.out.with_suffix(".svg"))


def run(pairs: int, tables: Path | None, parts: Sequence[str]) -> dict[str, Any]:
    """Plan, observe, compare."""
    began = time.monotonic()
    if tables is not None:
        tables.mkdir(parents=True, exist_ok=True)
    held, other = texts(pairs)
    calibration = batches_of(other[:CALIBRATION])
    unseen = batches_of(other[CALIBRATION : CALIBRATION + TABLE])
    encoder = Encoder(models.minilm()[0]).eval()
    plain, elastic = (elasticize(encoder, calibration[0]) for _ in range(2))
    judge = Judge(plain, batches_of(held))
    whole = {bits: dict.fromkeys(plain.sites, Dense(bits)) for bits in (8, 4)}
    nearest = [judge(f"dense int{b}, nearest", plain, whole[b]) for b in (8, 4)]
    spec = get(TARGET)
    rows = {
        objective: menu_of(elastic, spec, cost_model(spec), PROFILES, objective=objective)
        for objective in (Objective.MACS, Objective.BYTES)
    }
    menus = {objective: menu(part) for objective, part in rows.items()}
    both = {name: [f for m in menus.values() for f in m[name]] for name in elastic.sites}
    seen = collect(elastic, calibration)
    factorize(elastic, seen, most=largest(both))

    def measured(menu: Menu, name: str) -> DamageTable:
        table = None if tables is None else tables / f"{name}.table"
        return measure(elastic, unseen, menu, workers=WORKERS, table=table)

    found: dict[str, Any] = {}
    round_weights(elastic, seen, {name: [Dense(8)] for name in elastic.sites})
    top = judge("dense int8, error feedback", elastic, whole[8])
    if "macs" in parts:
        round_weights(elastic, seen, menus[Objective.MACS])
        damage = measured(menus[Objective.MACS], "macs")
        steps = chain.path(options_of(rows[Objective.MACS], damage))
        limits = [share * steps[0].cost for share in SHARES]
        points = ours(judge, elastic, steps, "macs", limits, CodeStorage.INDEPENDENT)
        uniform = judge("low rank, half everywhere", elastic, halved(elastic))
        found |= {"macs": [asdict(p) for p in (top, *points)], "uniform": asdict(uniform)}
        found["wanted"] = [wanted(points, *pair) for pair in WANTED.items()]
    if "bytes" in parts:
        round_weights(elastic, seen, {name: [Dense(4)] for name in elastic.sites})
        bottom = judge("dense int4, error feedback", elastic, whole[4])
        dense = (*nearest, top, bottom)
        found |= {"dense": [asdict(p) for p in dense], "bytes": {}}
        found |= {"equal_bytes": {}, "best_dense_that_fits": {}}
        entries: dict[str, dict[Format, Entry]] = {name: {} for name in elastic.sites}
        for codes in CodeStorage:
            # as `plan` does: nested codes of 4 bits make up for those before them
            again = calibration if codes is CodeStorage.NESTED else ()
            round_weights(elastic, seen, menus[Objective.BYTES], batches=again, stored=codes)
            # the second time only dense codes are others: entries of factors are those of before
            part = {
                n: [f for f in row if isinstance(f, Dense) or f not in entries[n]]
                for n, row in menus[Objective.BYTES].items()
            }
            damage = measured(part, f"bytes-{codes}")
            entries = {n: {**row, **damage.entries[n]} for n, row in entries.items()}
            priced = menu_of(
                elastic, spec, cost_model(spec), PROFILES, objective=Objective.BYTES, stored=codes
            )
            options = options_of(priced, DamageTable(entries, damage.seconds))
            for name, value in for_bytes(judge, elastic, options, codes, dense).items():
                found[name][codes] = value
    made = {
        "machine": describe(),
        "held_out_texts": sum(len(ids) for ids, _ in judge.batches),
        "calibration_texts": CALIBRATION,
        "table_texts": TABLE,
        "formats": {str(o): sum(len(m) for m in x.values()) for o, x in menus.items()},
        "seconds": time.monotonic() - began,
    }
    model = "all-MiniLM-L6-v2, 128 tokens, pooled; 36 linear layers"
    return {"model": model} | {f"run of {part}": made for part in parts} | found


def for_bytes(
    judge: Judge,
    elastic: ElasticModel,
    options: chain.Options,
    codes: CodeStorage,
    dense: Sequence[Point],
) -> dict[str, Any]:
    """The chain for bytes, beside what is dense: at its bytes, and the best within ours."""
    sizes = {d.megabytes for d in dense}
    top = max(sizes)
    sizes |= {share * top for share in SIZES}
    steps = chain.path(options, dense_first=True)
    limits = [1e6 * size for size in sorted(sizes, reverse=True)]
    points = ours(judge, elastic, steps, f"{codes}, bytes", limits, codes)
    equal = [(next(p for p in points if p.megabytes <= d.megabytes), d) for d in dense]
    fits = [(p, best(p, dense)) for p in points if p.megabytes >= min(d.megabytes for d in dense)]
    return {
        "bytes": [asdict(p) for p in points],
        "equal_bytes": [judge.versus(*pair) for pair in equal],
        "best_dense_that_fits": [judge.versus(*pair) for pair in fits],
    }


def wanted(points: Sequence[Point], share: float, limit: float) -> dict[str, Any]:
    """Whether the first plan at or below a share of the multiply-adds drifts little enough."""
    point = next(p for p in points if p.macs_share <= share)
    met = point.drift <= limit
    return {"macs_share": share, "at_most": limit, "drift": point.drift, "met": met}


def best(point: Point, dense: Sequence[Point]) -> Point:
    """The dense network that drifts least of those that take no more bytes."""
    return min((d for d in dense if d.megabytes <= point.megabytes), key=lambda d: d.drift)


def menu(rows: Sequence[GateRow]) -> dict[str, list[Format]]:
    """Site name -> the formats that the gate keeps."""
    found: dict[str, list[Format]] = {}
    for row in rows:
        if row.kept:
            found.setdefault(row.site, []).append(row.format)
    return found


def ours(
    judge: Judge,
    elastic: ElasticModel,
    path: Sequence[chain.Plan],
    what: str,
    limits: Sequence[float],
    codes: CodeStorage,
) -> list[Point]:
    """The first plan of the path at or below each cost."""
    points = []
    for limit in limits:
        chosen = next((p for p in path if p.cost <= limit * (1 + 1e-9)), path[-1])
        name = f"ours, {what} {chosen.cost / path[0].cost:.3f}"
        points.append(judge(name, elastic, chosen.formats, chosen.drift, codes))
    return points


def texts(pairs: int) -> tuple[list[str], list[str]]:
    """(halves of held-out docstrings, halves of others), in a fixed random order."""
    found = docstrings.halves()
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    held, other = order[:pairs], order[pairs:]
    return [t for i in held for t in found[i]], [t for i in other for t in found[i]]


def batches_of(wanted: Sequence[str]) -> list[Batch]:
    """Calls of `BATCH` texts; the last one is left out where it is not full."""
    tokens = demo_minilm._tokenizer()
    calls = [tokens(text) for text in wanted[: len(wanted) // BATCH * BATCH]]
    groups = [calls[at : at + BATCH] for at in range(0, len(calls), BATCH)]
    return [tuple(torch.cat(part) for part in zip(*group, strict=True)) for group in groups]


def halved(elastic: ElasticModel) -> dict[str, Format]:
    """Every layer at the rank that halves its multiply-adds, int8, a multiple of 16."""
    return {
        name: LowRank(round(site.n * site.k / (site.n + site.k) / 2 / 16) * 16)
        for name, site in elastic.sites.items()
        if isinstance(site, LinearSite)
    }


def macs_of(elastic: ElasticModel, formats: Mapping[str, Format]) -> int:
    """Multiply-adds of the linear layers."""
    return sum(site.macs(formats[name]) for name, site in elastic.sites.items())


def bytes_of(elastic: ElasticModel, formats: Mapping[str, Format], codes: CodeStorage) -> int:
    """Bytes of the linear layers."""
    sites, nested = elastic.sites.items(), codes is CodeStorage.NESTED
    return sum(storage_bytes(site, formats[name], nested=nested) for name, site in sites)


def _answers(embedded: Tensor) -> Tensor:
    """For every first half, the place of the second half nearest to it."""
    return (embedded[0::2] @ embedded[1::2].T).argmax(1)


def _error(values: Tensor) -> float:
    """Standard error of the mean of independent values."""
    return float(values.double().std()) / math.sqrt(len(values))


def _pairs(values: Tensor) -> Tensor:
    """Means over both halves of every docstring, which are not independent."""
    return values.reshape(-1, 2).mean(1)


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Drift over the share of multiply-adds, and over bytes."""
    import matplotlib
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 4), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    curves = (
        (panels[0], "macs_share", "ours", result["macs"]),
        *((panels[1], "megabytes", f"ours, {name}", x) for name, x in result["bytes"].items()),
    )
    for plot, of, label, rows in curves:
        bars = {"yerr": [1.96 * r["drift_se"] for r in rows], "capsize": 2}
        plot.errorbar(
            [r[of] for r in rows], [r["drift"] for r in rows], fmt="o-", label=label, **bars
        )
    hollow = {"color": "0.2", "fillstyle": "none", "markersize": 10, "zorder": 4}
    for plot, of, label in (
        (panels[0], "macs_share", "multiply-adds of linear layers / dense"),
        (panels[1], "megabytes", "linear layers, MB"),
    ):
        for row, marker in zip(result["dense"], "sD^v", strict=True):
            plot.plot(row[of], row["drift"], marker, label=row["name"], **hollow)
        plot.set(xlabel=label)
        plot.grid(visible=True, linewidth=0.3)
    row = result["uniform"]
    panels[0].plot(row["macs_share"], row["drift"], "x", color="0.4", label=row["name"])
    for row in result["wanted"]:
        panels[0].plot(row["macs_share"], row["at_most"], "_", color="C3", markersize=14)
    panels[0].set(ylabel="drift: mean L2 distance to float32")
    panels[1].legend(fontsize=8)
    figure.suptitle(
        f"MiniLM, {result['run of bytes']['held_out_texts']} held-out texts, no training", size=10
    )
    with matplotlib.rc_context({"svg.hashsalt": "t3c"}):
        figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
