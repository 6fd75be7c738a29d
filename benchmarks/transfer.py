"""How many measurements does the cost model of a new device need, where another's model helps?

    python -m benchmarks.transfer [--device x86-avx2-1t ...] [--minutes 8] [--judge]

The old device is that of results/cost_model.jsonl: x86-vnni, one thread. New ones are made of the
same machine: kernels for AVX2 alone, or two threads. Their rows go into
results/transfer_DEVICE.jsonl, which a later call goes on with.

A third of the new device's shapes and four of its networks are held out: no fit sees them on either
device. Of the other shapes so many layers are measured, spread over the kinds of kernels. Several
draws of what is held out are averaged. Rivals see the same rows: the old model times one factor, a
roofline with the target's constants, one that is fitted, and a model of these rows alone. Results
go to transfer.json beside this file.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks import machine
from benchmarks.cost_model import about, not_monotone
from t3c import targets
from t3c.cost_models.dataset import Dataset, KernelRow, ProfileRow
from t3c.cost_models.device import target_of
from t3c.cost_models.learned import LearnedModel
from t3c.cost_models.roofline import RooflineModel
from t3c.cost_models.scores import rivals, score
from t3c.cost_models.transfer import spread_out, transfer
from t3c.measurement.run import Plan, measure_on
from t3c.measurement.zoo import NETWORKS
from t3c.report import tables
from t3c.targets.base import TargetSpec

HERE = Path(__file__).resolve().parent
OLD = HERE / "results" / "cost_model.jsonl"
DEVICES = {"x86-avx2-1t": ("x86-avx2", 1), "x86-vnni-2t": ("x86-vnni", 2)}
"""Name -> (target, threads)."""
PLAN = Plan(kernels=200, networks=tuple(NETWORKS)[:10])
COUNTS = {0: 0, 5: 0, 10: 1, 20: 2, 40: 4, 80: 6}
"""Measured layers -> measured networks."""
DRAWS = 4
HELD_NETWORKS = 4


def main() -> None:
    """Measure, transfer, judge, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--minutes", type=float, default=8.0, help="for measuring, each device")
    parser.add_argument("--units", type=Path, help="folder of built units; else the user's cache")
    parser.add_argument("--judge", action="store_true", help="measure nothing")
    parser.add_argument("--measure", action="store_true", help="judge nothing")
    parser.add_argument("--out", type=Path, default=HERE / "transfer.json")
    options = parser.parse_args()
    told: list[str] = []
    found: dict[str, Any] = {}
    for name in options.device:
        target, threads = DEVICES[name]
        rows = HERE / "results" / f"transfer_{name}.jsonl"
        if not options.judge:
            measure_on(
                "local",
                rows,
                minutes=options.minutes,
                threads=threads,
                target=target,
                plan=PLAN,
                folder=None if options.units is None else options.units / name,
                say=told.append,
            )
        if not options.measure:
            found[name] = judge(Dataset.read(OLD), Dataset.read(rows), targets.get(target))
    if options.measure:
        print(*told, sep="\n")
        return
    record = {
        "schema": 1,
        "what": "on shapes and networks of the new device that no model has seen: error and rank "
        f"correlation of predicted medians, share of intervals that hold; mean of {DRAWS} draws",
        "machine": machine.describe(),
        "told": told,
        "devices": found,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    show(record)


def judge(old: Dataset, new: Dataset, spec: TargetSpec) -> dict[str, Any]:
    """Tables over the number of measurements, for one new device."""
    each = [one_draw(old, new, spec, seed) for seed in range(DRAWS)]
    tables_of: dict[str, Any] = {}
    for kind in ("kernels", "networks"):
        tables_of[kind] = {
            count: {
                model: {
                    key: round(float(np.mean([d[kind][count][model][key] for d in each])), 4)
                    for key in scores
                }
                for model, scores in each[0][kind][count].items()
            }
            for count in each[0][kind]
        }
    model = transfer(
        LearnedModel.learn(old, target_of(old.device)),
        new.kernels[:40],
        new.profiles[:20],
        spec,
        new.device,
    )
    return {
        "device": new.device.to_json(),
        "from": old.device.to_json(),
        "rows": about(new),
        "held_out": each[0]["held_out"],
        "pairs_not_monotone": not_monotone(model, spec),
        **tables_of,
    }


def one_draw(old: Dataset, new: Dataset, spec: TargetSpec, seed: int) -> dict[str, Any]:
    """Everything for one choice of what is held out."""
    rng = np.random.default_rng(seed)
    groups = list(dict.fromkeys(k.group for k in new.kernels))
    out = {groups[int(i)] for i in rng.permutation(len(groups))[: len(groups) // 3]}
    held = [k for k in new.kernels if k.group in out]
    pool = {k.row: k for k in new.kernels if k.group not in out}
    names = list(dict.fromkeys(p.network for p in new.profiles))
    order = [names[int(i)] for i in rng.permutation(len(names))]
    nets_out, nets_in = order[:HELD_NETWORKS], order[HELD_NETWORKS:]
    held_nets = [p for p in new.profiles if p.network in nets_out]
    base = without(old, held, nets_out)
    chosen = [
        pool[r] for r, _ in spread_out([(k.row, k.group) for k in pool.values()], max(COUNTS))
    ]
    found: dict[str, Any] = {"kernels": {}, "networks": {}}
    found["held_out"] = {"kernels": len(held), "profiles": len(held_nets)}
    for count, several in COUNTS.items():
        seen = chosen[:count]
        known = [p for p in new.profiles if p.network in nets_in[:several]]
        model = transfer(base, seen, known, spec, new.device)
        found["kernels"][count] = on_kernels(base, model, seen, held, spec)
        found["networks"][count] = on_networks(base, model, seen, known, held_nets, spec)
    return found


def without(old: Dataset, held: list[KernelRow], networks: list[str]) -> LearnedModel:
    """The old device's model, of shapes and networks that are not held out."""
    shapes = {replace(k.row.site, name="") for k in held}
    kernels = [k for k in old.kernels if replace(k.row.site, name="") not in shapes]
    model = replace(LearnedModel.of(target_of(old.device)), device=old.device).fit_groups(
        [k.row for k in kernels], [k.seconds.p50_s for k in kernels], [k.group for k in kernels]
    )
    return model.fit_profiles([p for p in old.profiles if p.network not in networks])


def on_kernels(
    base: LearnedModel,
    model: LearnedModel,
    seen: list[KernelRow],
    held: list[KernelRow],
    spec: TargetSpec,
) -> dict[str, dict[str, float]]:
    """Scores of all contestants on held-out layers."""
    asked, times = [k.row for k in held], np.array([k.seconds.p50_s for k in held])
    ends = np.array(model.predict_interval(asked))
    guesses = {"transferred": model.predict(asked), **rivals(base, seen, asked, spec)}
    found = scored(times, guesses)
    found["transferred"] |= {
        "coverage": covered(times, ends),
        "half_width": float(np.exp(model.spread) - 1),
    }
    return found


def on_networks(
    base: LearnedModel,
    model: LearnedModel,
    seen: list[KernelRow],
    known: list[ProfileRow],
    held: list[ProfileRow],
    spec: TargetSpec,
) -> dict[str, dict[str, float]]:
    """Scores of all contestants on held-out networks."""
    times = np.array([p.seconds.p50_s for p in held])
    ratios = [p.seconds.p50_s / base.predict_network(p.layers, p.rest) for p in known] or [
        k.seconds.p50_s / base.predict([k.row])[0] for k in seen
    ]
    factor = float(np.median(ratios)) if ratios else 1.0
    plain = RooflineModel.of(spec)
    guesses = {
        "transferred": [model.predict_network(p.layers, p.rest) for p in held],
        "other device, one factor": [factor * base.predict_network(p.layers, p.rest) for p in held],
        "roofline": [
            sum(plain.predict(p.layers)) + plain.predict_rest(p.rest, p.layers[0].threads)
            for p in held
        ],
    }
    if len(seen) >= 5:
        alone = LearnedModel.of(spec).fit_groups(
            [k.row for k in seen], [k.seconds.p50_s for k in seen], [k.group for k in seen]
        )
        alone = alone.fit_profiles(known)
        guesses["fitted alone"] = [alone.predict_network(p.layers, p.rest) for p in held]
    found = scored(times, guesses)
    ends = np.array([model.predict_network_interval(p.layers, p.rest) for p in held])
    found["transferred"] |= {
        "coverage": covered(times, ends),
        "half_width": float(np.exp(model.network_spread) - 1),
    }
    return found


def scored(times: Any, guesses: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Error and rank correlation of each."""
    found = {}
    for name, values in guesses.items():
        one = score(times, np.array(values), list(range(len(times))))
        found[name] = {"mape": one.mape, "spearman": one.spearman}
    return found


def covered(times: Any, ends: Any) -> float:
    """Share of times between their ends."""
    return float(np.mean((ends[:, 0] <= times) & (times <= ends[:, 1])))


def show(record: dict[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console

    console = Console(width=160)
    for name, one in record["devices"].items():
        for kind in ("kernels", "networks"):
            lines = [
                {"measured": count, "model": model, **scores}
                for count, models in one[kind].items()
                for model, scores in models.items()
            ]
            console.print(tables.plain(lines, f"{name}: {kind} that were left out"))
        console.print(name, one["rows"], "pairs not monotone:", one["pairs_not_monotone"])


if __name__ == "__main__":
    main()
