"""How far the rules of the kernel families are from tuned schedules, on this machine, one thread.

    python benchmarks/tuning.py [--target x86-vnni] [--minutes 20] [--networks vit_b16 ...] [--ship]

Takes every distinct operator that has schedules of ViT-B/16, BERT-base and ResNet-50, dense and at
a few ranks, searches for --minutes, and writes for each the time of the rule's kernel and of the
tuned one, both from one contest (t3c.codegen.tune). A second run goes on where the first one ended.
With --ship the records become those of the package.
"""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from t3c import targets
from t3c.api import elasticize
from t3c.codegen.families import families_of, scheduled
from t3c.codegen.kernels.schedule import Op
from t3c.codegen.tune.machine import this_machine
from t3c.codegen.tune.network import operators, tune
from t3c.codegen.tune.records import Record, read, shipped, write
from t3c.codegen.tune.search import RECORDS, WORTH
from t3c.core.formats import Dense
from t3c.passes.pipeline import lowering_graph
from t3c.targets.base import TargetSpec

NETWORKS = ("vit_b16", "bert_base", "resnet50")
LINEAR_RANKS = (64, 128, 256)
OUT = Path(__file__).with_suffix(".json")


def dense_operators(network: str, spec: TargetSpec) -> dict[Op, int]:
    """Operators of the network with every layer dense, and how often one call runs them."""
    model, inputs = getattr(import_module("examples.models"), network)()
    elastic = elasticize(model, inputs)
    formats = dict.fromkeys(elastic.sites, Dense(8))
    program = torch.export.export(lowering_graph(elastic.graph), inputs, strict=False)
    codes = {site: elastic.codes(site, {fmt}) for site, fmt in formats.items()}
    return operators(program, elastic.sites, codes, {"max": formats}, spec)


def factorized(op: Op) -> list[Op]:
    """Operators of a factorized linear layer, at ranks that save multiply-adds."""
    if op.kind == "dense":
        m, n, k = op["m"], op["n"], op["k"]
        ranks = [r for r in LINEAR_RANKS if r * (n + k) < 0.7 * n * k]
        return [Op.of("low_rank", op.epilogue, m=m, n=n, k=k, r=r) for r in ranks]
    return []


def main() -> None:
    """Search, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="The families' rules against tuned schedules.")
    parser.add_argument("--target", default="x86-vnni")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--folder", type=Path, default=Path("build/tune"), help="of the trials")
    parser.add_argument("--ship", action="store_true", help="make them the package's records")
    options = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = "1"  # read when the first parallel loop runs
    spec = targets.get(options.target)
    found: dict[str, dict[Op, int]] = {}
    for network in options.networks:
        dense = dense_operators(network, spec)
        extra = {op: 0 for d in dense for op in factorized(d)}
        found[network] = extra | dense
    calls: dict[Op, int] = {}
    for ops in found.values():
        for op, count in ops.items():
            calls[op] = calls.get(op, 0) + max(1, count)
    folder = options.folder / spec.name
    tune(calls, spec, folder, options.minutes, shown, print)
    families = scheduled(families_of(spec))
    machine = this_machine()
    records = read(folder / RECORDS, families, machine, {f.name for f in families}).records
    if options.ship:
        for family in {f.name for f in families}:
            better = [r for r in records.values() if r.family == family and r.ratio < WORTH]
            write(shipped(family), machine, better)
    rows = [row(network, op, n, records) for network, ops in found.items() for op, n in ops.items()]
    for line in rows:
        print(f"{line['network']:10s} {line['calls']:3d} {line['op']:70s} {line['ratio']}")
    store(spec.name, {"rules_against_tuned": {"summary": summary(rows), "rows": rows}})


def row(network: str, op: Op, calls: int, records: Mapping[str, Record]) -> dict[str, Any]:
    """One line of the table; an operator that was not reached has no figures."""
    record = records.get(op.key)
    return {
        "network": network,
        "calls": calls,
        "op": op.key,
        "rule_us": round(record.us / record.ratio, 1) if record else None,
        "tuned_us": round(record.us, 1) if record else None,
        "ratio": round(record.ratio, 3) if record else None,
        "schedule": record.schedule.text if record else None,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many operators there are, how far the worst is, and each network's total."""
    known = [r for r in rows if r["ratio"] is not None]
    found: dict[str, Any] = {
        "operators": len({r["op"] for r in rows}),
        "measured": len({r["op"] for r in known}),
        "rule_more_than_15_percent_slower": sorted(
            {r["op"] for r in known if r["ratio"] < 1 / 1.15}
        ),
        "least_ratio": min((r["ratio"] for r in known), default=None),
    }
    for network in dict.fromkeys(r["network"] for r in known):
        dense = [r for r in known if r["network"] == network and r["calls"]]
        rule, tuned = (sum(r[k] * r["calls"] for r in dense) for k in ("rule_us", "tuned_us"))
        found[network] = {"rule_us": round(rule), "tuned_us": round(tuned)}
    return found


def stored(target: str, part: str) -> list[dict[str, Any]]:
    """Rows of an earlier run."""
    data = json.loads(OUT.read_text()) if OUT.exists() else {"targets": {}}
    rows: list[dict[str, Any]] = data["targets"].get(target, {}).get(part, {}).get("rows", [])
    return rows


def store(target: str, part: Mapping[str, Any]) -> None:
    """Put one result beside the others of its target."""
    data = json.loads(OUT.read_text()) if OUT.exists() else {"schema": 1, "targets": {}}
    words = sys.argv[1:]
    if "--folder" in words:  # where trials lie is the machine's business
        at = words.index("--folder")
        words = words[:at] + words[at + 2 :]
    stamp = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "machine": this_machine().key,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    results = data["targets"].setdefault(target, {})
    results |= {name: stamp | value for name, value in part.items()}
    OUT.write_text(json.dumps(data, indent=1) + "\n")


def shown(what: str, done: int, total: int) -> None:
    """A line that moves, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done} of {total} s", end="", file=sys.stderr)


if __name__ == "__main__":
    main()
