"""Measures layers and small networks on this machine, fits the cost model, and judges it.

    python -m benchmarks.cost_model [--again] [--minutes 6]

Rows go into results/cost_model.jsonl, which a later call goes on with; `--again` begins anew. The
model is judged on shapes and networks that it has not seen, beside a roofline with the target's
constants, one fitted to the same rows, and a table of measured layers whose times are summed.
Results go to cost_model.json beside this file, the predictions to cost_model.svg.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks import machine
from t3c import targets
from t3c.core.formats import CP, Dense, LowRank, Tucker2
from t3c.core.sites import LinearSite
from t3c.cost_models.base import Row
from t3c.cost_models.dataset import Dataset
from t3c.cost_models.design import design
from t3c.cost_models.learned import LearnedModel
from t3c.cost_models.scores import NOISE, report
from t3c.measurement.run import measure_on
from t3c.report import plots, tables
from t3c.targets.base import TargetSpec

HERE = Path(__file__).resolve().parent
PAIRS = 10_000
WANTED = {
    "networks' error at most": 0.12,
    "networks' rank correlation at least": 0.97,
    "coverage at least": 0.87,
    "coverage at most": 0.93,
    "sign at least": 0.95,
}


def main() -> None:
    """Measure, fit, judge, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, default=HERE / "results" / "cost_model.jsonl")
    parser.add_argument("--minutes", type=float, default=6.0, help="for measuring; 0: no limit")
    parser.add_argument("--again", action="store_true", help="measure everything anew")
    parser.add_argument("--judge", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=HERE / "cost_model.json")
    options = parser.parse_args()
    if options.again:
        options.rows.unlink(missing_ok=True)
    spec = targets.detect_host()
    start = time.monotonic()
    told: list[str] = []
    if options.judge:
        rows = Dataset.read(options.rows)
    else:
        rows = measure_on("local", options.rows, minutes=options.minutes, say=told.append)
    measured = time.monotonic()
    model = LearnedModel.learn(rows, spec)
    fitted = time.monotonic()
    judged = report(rows, spec)
    found = judged.to_json()
    record = {
        "schema": 1,
        "what": "on held-out shapes and networks: error, correlation of predicted medians, share "
        f"of intervals that hold, share of right signs against dense (beyond {NOISE:g})",
        "machine": machine.describe(),
        "device": rows.device.to_json(),
        "rows": about(rows),
        "seconds": {"measure": round(measured - start, 1), "fit": round(fitted - measured, 1)},
        "told": told,
        "scores": found,
        "pairs": PAIRS,
        "pairs_not_monotone": not_monotone(replace(model, measured={}), spec),
        "wanted": WANTED,
        "met": met(found),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    plots.predictions(judged.guesses(), options.out.with_suffix(".svg"), "left out of the fit")
    show(record)


def about(rows: Dataset) -> dict[str, Any]:
    """How many rows, and how quiet the machine was."""
    samples = [*(k.seconds for k in rows.kernels), *(p.seconds for p in rows.profiles)]
    return {
        "kernels": len(rows.kernels),
        "profiles": len(rows.profiles),
        "networks": len({p.network for p in rows.profiles}),
        "load": round(float(np.median([s.load for s in samples])), 2),
        "p90_over_p50": round(float(np.median([s.p90_s / s.p50_s for s in samples])), 3),
        "dropped": round(sum(s.dropped for s in samples) / sum(s.samples for s in samples), 4),
    }


def not_monotone(model: LearnedModel, spec: TargetSpec) -> int:
    """Random pairs in which more rank, bits or batch is predicted to take less time."""
    rng = np.random.default_rng(0)
    drawn = [row for row, _ in design(4000, spec.rank_step, seed=1)]
    small = [drawn[int(i)] for i in rng.integers(len(drawn), size=PAIRS)]
    large = [larger(row, rng) for row in small]
    pairs = zip(model.predict(small), model.predict(large), strict=True)
    return sum(a > b for a, b in pairs)


def larger(row: Row, rng: np.random.Generator) -> Row:
    """The row with more rank, bits or batch."""
    more = int(rng.integers(1, 200))
    match int(rng.integers(3)), row.format:
        case 0, LowRank(rank):
            return replace(row, format=replace(row.format, rank=rank + more))
        case 0, Tucker2(rank_in, rank_out):
            return replace(row, format=Tucker2(rank_in + more, rank_out + more))
        case 0, CP(rank):
            return replace(row, format=CP(rank + more))
        case 1, Dense(4) | LowRank(_, 4):
            return replace(row, format=replace(row.format, bits=8))
        case _:
            times = int(rng.integers(2, 6))
            if isinstance(row.site, LinearSite):
                return replace(row, site=replace(row.site, rows=times * row.site.rows))
            return replace(row, site=replace(row.site, batch=times * row.site.batch))


def met(found: dict[str, Any]) -> dict[str, bool]:
    """Which of the wishes came true."""
    low, high = WANTED["coverage at least"], WANTED["coverage at most"]
    mine = {kind: scores["learned"] for kind, scores in found.items()}
    networks = mine["networks"]
    return {
        "networks' error": networks["mape"] <= WANTED["networks' error at most"],
        "networks' rank correlation": networks["spearman"]
        >= WANTED["networks' rank correlation at least"],
        **{f"{kind}' coverage": low <= mine[kind]["coverage"] <= high for kind in mine},
        **{f"{kind}' sign": mine[kind]["sign"] >= WANTED["sign at least"] for kind in mine},
        **{
            f"{kind} nearer than {name}": mine[kind]["mape"] < other["mape"]
            for kind, scores in found.items()
            for name, other in scores.items()
            if name != "learned"
        },
    }


def show(record: dict[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console

    console = Console(width=140)
    for kind, scores in record["scores"].items():
        lines = [{"model": name, **score} for name, score in scores.items()]
        console.print(tables.plain(lines, f"{kind} that were left out"))
    console.print(record["rows"], record["met"])
    console.print(f"{record['pairs_not_monotone']} of {record['pairs']} pairs not monotone")


if __name__ == "__main__":
    main()
