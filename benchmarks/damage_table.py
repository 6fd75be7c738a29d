"""The damage table of MiniLM with one and two workers, and what level swaps gain on top of it.

Workers take turns on one calibration text; processor seconds stand beside seconds, because other
programs on the machine stretch the latter. Swaps are scored on calibration texts and judged on
texts that nothing was fitted to. ``python -m benchmarks.damage_table`` writes damage_table.json in
about four minutes of an idle core.
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from examples import docstrings, models
from examples.demo_minilm import _tokenizer  # pyright: ignore[reportPrivateUsage]
from t3c.api import elasticize
from t3c.certificate.observed import observed
from t3c.controller.calibrate import collect, factorize, round_weights
from t3c.controller.damage import DamageTable, measure
from t3c.controller.plan import largest, menu_of, plan
from t3c.cost_models import cost_model
from t3c.elastic.model import ElasticModel
from t3c.targets import get

FITTED = 16
FRESH = 24
ROUNDS = 2
SWAPS = 48
"""Whole plans that swaps may measure, for four profiles."""
TARGET = "x86-vnni"
Batch = tuple[torch.Tensor, ...]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("all", "workers", "swaps"), default="all")
    part = parser.parse_args().part
    torch.set_num_threads(1)
    model, _ = models.minilm()
    tokens = _tokenizer()
    calls = [tokens(text) for text, _ in docstrings.halves(FITTED + FRESH)]
    elastic = elasticize(model, calls[0])
    batches = [elastic.captured.flatten(call, {}) for call in calls]
    where = Path(__file__).with_suffix(".json")
    found: dict[str, Any] = json.loads(where.read_text()) if where.exists() else {}
    found["command"] = "python -m benchmarks.damage_table"
    if part in ("all", "workers"):
        found["workers"] = workers(elastic, batches[:FITTED])
    if part in ("all", "swaps"):
        found["swaps"] = swaps(elastic, batches[:FITTED], batches[FITTED:])
    where.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def workers(elastic: ElasticModel, batches: list[Batch]) -> dict[str, Any]:
    """Seconds of the whole table on one text, by workers, in turns."""
    spec = get(TARGET)
    gate = menu_of(elastic, spec, cost_model(spec), 8, 1)
    menu = {s: [d.format for d in gate if d.site == s and d.kept] for s in elastic.sites}
    seen = collect(elastic, batches[:4])
    factorize(elastic, seen, most=largest(menu))
    round_weights(elastic, seen, menu)
    runs: list[dict[str, Any]] = []
    for _ in range(ROUNDS):
        for count in (1, 2):
            begun, spent = time.perf_counter(), time.process_time()
            table = measure(elastic, batches[4:5], menu, workers=count)
            runs.append(
                {
                    "workers": count,
                    "seconds": round(time.perf_counter() - begun, 2),
                    "processor_seconds": round(time.process_time() - spent, 2),
                    "load": round(os.getloadavg()[0], 1),
                    "sha256": _digest(table),
                }
            )
    return {"entries": sum(map(len, menu.values())), "runs": runs}


def swaps(elastic: ElasticModel, fitted: list[Batch], fresh: list[Batch]) -> dict[str, Any]:
    """Mean drift of every profile on fresh texts, from the chain as it is and after swaps."""
    rows: dict[str, dict[str, float]] = {}
    made: dict[str, Any] = {"texts": len(fresh), "budget": SWAPS}
    with tempfile.TemporaryDirectory() as folder:
        for name, budget in (("chain", 0), ("swapped", SWAPS)):
            chosen = plan(
                elastic,
                fitted,
                get(TARGET),
                profiles=4,
                table=Path(folder) / "table.jsonl",
                swaps=budget,
            )
            for profile in chosen.chain:
                row = rows.setdefault(profile.name, {})
                for data, texts in (("fitted", fitted), ("fresh", fresh)):
                    mean = observed(elastic, profile.formats, texts).relative
                    row[f"{name}_{data}"] = round(mean, 4)
            made["note"] = chosen.notes[-1] if budget else ""
    return made | {"relative_drift": rows}


def _digest(table: DamageTable) -> str:
    """Of every damage, to the last bit."""
    rows = [
        (site, str(fmt), entry.damage.hex())
        for site, row in table.entries.items()
        for fmt, entry in row.items()
    ]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


if __name__ == "__main__":
    main()
