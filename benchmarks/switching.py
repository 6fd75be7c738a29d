"""What a budget switch costs on a real artifact, and whether eight threads disturb each other.

    python benchmarks/switching.py [--artifact folder]

Lowers MiniLM unless an artifact is given. Measures the median time of `set_budget` between
far-apart budgets, the bytes that all switches copied, the addresses of the weights before and
after, and lets eight threads switch and call at once: every result must equal that of the profile
that the call ran, bit for bit. Results go to benchmarks/switching.json.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
THREADS = 8
CALLS = 25
SWITCHES = 10_000


def main() -> None:
    """Lower or load, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--artifact", type=Path, help="lowered before; else MiniLM is lowered now")
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
        os.environ[name] = "1"
    sys.path.insert(0, str(HERE.parent))
    import t3c
    from examples import models

    model, inputs = models.minilm()
    with tempfile.TemporaryDirectory() as scratch:
        artifact = options.artifact or t3c.lower(
            model, "x86", inputs, Path(scratch) / "minilm", plan_seconds=15, calls=20
        )
        record = {
            "command": " ".join(["python", "benchmarks/switching.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **measure(t3c.load(artifact), tuple(x.numpy() for x in inputs)),
        }
    print(json.dumps(record, indent=1))
    (HERE / "switching.json").write_text(json.dumps(record, indent=1) + "\n")


def measure(session: Any, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Switch times, bytes copied, and mistakes under concurrency."""
    import numpy as np

    names = [p.name for p in session.profiles]
    expected = {n: session.variants[n](*inputs)["last_hidden_state"] for n in names}
    budgets = [p.latency_ms for p in session.profiles]
    before = session.bytes_copied
    seconds = []
    for i in range(SWITCHES):
        budget = budgets[(0, -1)[i % 2]]
        start = time.perf_counter()
        session.set_budget(latency_ms=budget)
        seconds.append(time.perf_counter() - start)
    copied = session.bytes_copied - before
    wrong: list[str] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(CALLS):
            name = draw.choice(names)
            if not np.array_equal(
                session.variants[name](*inputs)["last_hidden_state"], expected[name]
            ):
                wrong.append(name)
            session.set_budget(latency_ms=draw.choice(budgets))
            result = session(*inputs)["last_hidden_state"]
            if not any(np.array_equal(result, want) for want in expected.values()):
                wrong.append("current")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "switches": SWITCHES,
        "median_us": float(np.median(seconds) * 1e6),
        "p95_us": float(np.quantile(seconds, 0.95) * 1e6),
        "bytes_copied_by_switches": copied,
        "threads": THREADS,
        "calls": 2 * THREADS * CALLS,
        "wrong_results": len(wrong),
    }


if __name__ == "__main__":
    main()
