"""The learned policy on MiniLM: does it pick as the chain does, and does looking at inputs pay?

    python -m benchmarks.policy [--artifact folder]

Measures the drift of docstrings in every profile of the library against torch float32, trains the
policy on budgets alone and with input summaries (t3c.controller.fit_policy), and compares both with
the chain on docstrings that neither training nor floors saw. Results go to benchmarks/policy.json.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from benchmarks.budgets import token
from benchmarks.libraries import inputs, library, one_thread

HERE = Path(__file__).resolve().parent
FITTED, HELD_OUT = 128, 96
"""Docstrings: half of the first decide the floors."""
SKIP = 348
"""Docstrings before them; the library was calibrated on some."""
PAIRS = 10_000
PRICES = (0.5, 1.0, 1.5, 2.0)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--artifact", type=Path, help="lowered before; else MiniLM, kept in build/")
    options = parser.parse_args()
    one_thread()
    from benchmarks import machine

    found = {**machine.describe(), **run(library("minilm", options.artifact))}
    print(json.dumps(found, indent=1))
    (HERE / "policy.json").write_text(json.dumps(found, indent=1) + "\n")


def run(folder: Path) -> dict[str, Any]:
    """Everything."""
    import numpy as np

    import t3c
    from t3c.controller.fit_policy import fit
    from t3c.runtime.policy import PolicySelector, decision_seconds, summarize

    session = t3c.load(folder, hashes=False, threads=1)
    chain = session.manifest.chain
    calls = inputs("minilm", SKIP + FITTED + HELD_OUT)[SKIP:]
    drifts = np.array(drift_of(session, calls))
    summaries = np.array([summarize([x.numpy() for x in call]) for call in calls])
    start = time.perf_counter()
    policy, report = fit(chain, drifts[:FITTED])
    seconds = time.perf_counter() - start
    selector = PolicySelector(chain, policy)
    draw = random.Random(0)
    budgets = [token(draw, session.profiles) for _ in range(1000)]
    feasible = [b for b in budgets if session.explain(b).profile is not None]
    once, again = (decision_seconds(selector, feasible) for _ in range(2))
    return {
        "docstrings": {"fitted": FITTED, "held_out": HELD_OUT},
        "drift_by_profile": dict(zip(session.variants, drifts.mean(0).tolist(), strict=True)),
        "budgets_alone": {
            "parameters": policy.parameters,
            "training_seconds": seconds,
            "proxy_rank_correlation": report.proxy_rank_correlation,
            "exact_before_snapping": report.exact_before_snapping,
            "differs_from_exhaustive_search": sum(
                selector.select(b).name != session.explain(b).profile for b in feasible
            ),
            "budgets": len(feasible),
            "snapping_gap": dict(zip(session.variants, report.snapping_gap, strict=True)),
            "decision_us": {
                "first": float(np.median(once) * 1e6),
                "repeated": float(np.median(again) * 1e6),
            },
            **monotone(selector, session, draw),
        },
        "with_summaries": [
            looking(chain, session, drifts, summaries, calls[-1], price) for price in PRICES
        ],
    }


def looking(
    chain: Any, session: Any, drifts: Any, summaries: Any, call: Any, price: float
) -> dict[str, Any]:
    """One price of time: drift and time of the policy on new inputs, and of the chain."""
    import numpy as np

    from t3c.controller.fit_policy import fit
    from t3c.core.budget import Budget
    from t3c.runtime.policy import PolicySelector, decision_seconds

    policy, report = fit(chain, drifts[:FITTED], summaries=summaries[:FITTED], time_price=price)
    selector, last = PolicySelector(chain, policy), len(chain) - 1
    times = np.array([p.latency_ms for p in chain])
    everything = Budget(latency_ms=float(times[-1]))
    chosen = [selector.index(everything, x) for x in summaries[FITTED:]]
    rows = drifts[FITTED:]
    drift = float(np.mean([row[k] for row, k in zip(rows, chosen, strict=True)]))
    taken = float(times[chosen].mean())
    at_equal_time = float(np.interp(taken, times, rows.mean(0)))
    arrays = [x.numpy() for x in call]
    return {
        "time_price": price,
        "parameters": policy.parameters,
        "chosen_without_a_limit": {n: chosen.count(k) for k, n in enumerate(session.variants)},
        "mean_ms": taken,
        "mean_drift": drift,
        "chain_drift_at_equal_mean_ms": at_equal_time,
        "objective_by_profile": report.objective,
        "floors": list(policy.floors),
        "falls_back_to_the_chain": sum(floor == k for k, floor in enumerate(policy.floors)),
        "profiles": last + 1,
        "decision_us": float(
            np.median(decision_seconds(selector, [everything] * 500, arrays)) * 1e6
        ),
    }


def monotone(selector: Any, session: Any, draw: random.Random) -> dict[str, int]:
    """Pairs of budgets whose larger one is placed or snapped lower."""
    import t3c

    before = after = 0

    def index(budget: Any) -> int:
        try:
            return int(selector.index(budget))
        except t3c.InfeasibleBudget:
            return -1

    for _ in range(PAIRS):
        low = token(draw, session.profiles)
        more: dict[str, Any] = {
            n: v * draw.choice([1.0, draw.uniform(1.0, 1.5)]) for n, v in low.components.items()
        }
        high = t3c.Budget(**more)
        before += selector.policy.position(low) > selector.policy.position(high)
        after += index(low) > index(high)
    return {"pairs": PAIRS, "falls_before_snapping": before, "falls_after_snapping": after}


def drift_of(session: Any, calls: list[tuple[Any, ...]]) -> list[list[float]]:
    """[inputs][profiles]: L2 distance of all token embeddings to torch float32's."""
    import numpy as np
    import torch

    from examples import models

    model, _ = models.minilm()
    found = []
    with torch.inference_mode():
        for call in calls:
            want = model(*call).last_hidden_state.numpy()
            given = [x.numpy() for x in call]
            found.append(
                [
                    float(np.linalg.norm(variant(*given)["last_hidden_state"] - want))
                    for variant in session.variants.values()
                ]
            )
    return found


if __name__ == "__main__":
    main()
