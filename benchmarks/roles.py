"""What chains for several objectives and for roles are worth on MiniLM.

    python -m benchmarks.roles [--seconds 40] [--libraries] [--only CHAIN]

Chains of eight profiles for latency, for bytes and for both at once; and for latency with one
format for all layers of a role. Every profile of each is run in torch on held-out docstrings; drift
is compared at equal predicted latency and at equal bytes, by interpolation along the chains. With
--libraries the two chains for latency are compiled as well: bytes and seconds of their libraries.
--only makes one chain again and keeps what is recorded of the others. Results go to
benchmarks/roles.json.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.libraries import inputs, one_thread

HERE = Path(__file__).resolve().parent
CALIBRATION, HELD = 24, 24
"""Docstrings that chains are planned on, and others that they are judged on."""
SHARES = (0.9, 0.8, 0.7, 0.6)
"""Of the dense network's cost, where chains are compared."""
CHAINS: dict[str, dict[str, Any]] = {
    "latency": {},
    "latency, roles share": {"share": True},
    "latency+bytes": {"objective": "latency+bytes"},
    "bytes": {"objective": "bytes"},
}


def main() -> None:
    """Plan, judge, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="for each damage table")
    parser.add_argument("--libraries", action="store_true")
    parser.add_argument("--only", choices=list(CHAINS))
    options = parser.parse_args()
    one_thread()
    from benchmarks import machine

    found = {**machine.describe(), **run(options.seconds, options.libraries, options.only)}
    print(json.dumps(found, indent=1))
    (HERE / "roles.json").write_text(json.dumps(found, indent=1) + "\n")


def run(seconds: float, libraries: bool, only: str | None) -> dict[str, Any]:
    """Everything."""
    import torch

    from examples import models
    from t3c import targets
    from t3c.api import elasticize
    from t3c.controller.plan import plan
    from t3c.core.objective import parse_objective

    torch.set_num_threads(1)
    calls = inputs("minilm", CALIBRATION + HELD)
    model, _ = models.minilm()
    spec = targets.detect_host()
    found: dict[str, Any] = {"target": spec.name, "docstrings": [CALIBRATION, HELD], "chains": {}}
    if only is not None:
        found["chains"] = json.loads((HERE / "roles.json").read_text())["chains"]
    for name, given in CHAINS.items():
        if only not in (None, name):
            continue
        elastic = elasticize(model, calls[0], tables=True)
        batches = [elastic.captured.flatten(call, {}) for call in calls]
        asked = {**given, "objective": parse_objective(given.get("objective", "latency"))}
        start = time.perf_counter()
        made = plan(elastic, batches[:CALIBRATION], spec, seconds=seconds, **asked)
        took = time.perf_counter() - start
        row = judged(elastic, made, batches[CALIBRATION:])
        row |= {"plan_seconds": round(took, 1), "load_average": os.getloadavg()[0]}
        if libraries and "bytes" not in name:
            row |= compiled(elastic, made, spec)
        found["chains"][name] = row
        print(name, json.dumps(row), flush=True)
    return {**found, **compared(found["chains"])}


def judged(elastic: Any, made: Any, held: Sequence[Any]) -> dict[str, Any]:
    """Costs and mean relative drift of every profile, and how many kernels the chain has."""
    import torch

    from t3c.elastic.roles import alike
    from t3c.elastic.shadow import relative

    rows = []
    shape = {name: names[0] for names in alike(elastic) for name in names}
    kernels = {(shape[s], str(f)) for p in made.chain for s, f in p.formats.items()}
    with torch.inference_mode(), elastic.using(None):
        want = [elastic.graph(*batch)[0] for batch in held]
    for profile in made.chain:
        with torch.inference_mode(), elastic.using(profile.formats):
            drifts = [
                float(relative(elastic.graph(*batch)[0], y))
                for batch, y in zip(held, want, strict=True)
            ]
        rows.append(
            {
                "profile": profile.name,
                "predicted_ms": profile.latency.p50_s * 1e3,
                "megabytes": profile.storage_bytes / 1e6,
                "macs": profile.macs,
                "drift": sum(drifts) / len(drifts),
            }
        )
    return {"profiles": rows, "role_formats": len(kernels)}


def compiled(elastic: Any, made: Any, spec: Any) -> dict[str, Any]:
    """Bytes of the library and of its code, and how long it took."""
    from t3c.api import _build  # pyright: ignore[reportPrivateUsage]

    start = time.perf_counter()
    built = _build(elastic, made, spec, None, {})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.so"
        built.save(file)
        size = file.stat().st_size
    return {"library_bytes": size, "compile_seconds": round(time.perf_counter() - start, 1)}


def compared(chains: dict[str, Any]) -> dict[str, Any]:
    """Drift of every chain at shares of the dense network's time, and of its bytes."""
    import numpy as np

    found: dict[str, Any] = {}
    for what in ("predicted_ms", "megabytes"):
        dense = max(c["profiles"][-1][what] for c in chains.values())
        for share in SHARES:
            row = {}
            for name, chain in chains.items():
                xs = np.maximum.accumulate([p[what] for p in chain["profiles"]])
                reach = xs[0] <= share * dense
                ys = [p["drift"] for p in chain["profiles"]]
                row[name] = float(np.interp(share * dense, xs, ys)) if reach else None
            found[f"drift at {share:.0%} of {what}"] = row
    return {"compared": found}


if __name__ == "__main__":
    main()
