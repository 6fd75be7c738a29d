"""Ours against torch, ONNX Runtime and OpenVINO, whole networks, one command.

    python -m benchmarks [network ...] [--isa native|vnni|avx2] [--threads 1] [--seconds 60]

Each network gets a process of its own: first one that lowers, exports and quantizes into --folder
(what is there already is kept), then one that times. All contestants run in that one process, warm,
on the same input and threads, in random order turn by turn; see docs/benchmarks.md for the rules.
Results go to benchmarks/results/<isa>-<threads>t/<network>.json, a table to standard output, and a
picture of all networks beside them.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ISAS = ("native", "vnni", "avx2")


def main() -> None:
    """Parse, run every network, draw."""
    sys.path.insert(0, str(HERE.parent))
    from benchmarks.contestants import PEERS, environment
    from benchmarks.networks import ALL

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", help=f"default: all of {', '.join(ALL)}")
    parser.add_argument("--isa", choices=ISAS, default="native", help="most that peers may use")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing, each network")
    parser.add_argument("--calls", type=int, default=200, help="most calls of each contestant")
    parser.add_argument("--only", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--folder", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--lock", type=Path, help="held while timing; other work may wait for it")
    parser.add_argument("--cpus", type=int, nargs="*", default=[], help="processors while timing")
    options = parser.parse_args()
    unknown = sorted(set(options.networks) - set(ALL))
    if unknown:
        parser.error(f"no network {', '.join(unknown)}; there are {', '.join(ALL)}")
    results = HERE / "results" / f"{options.isa}-{options.threads}t"
    results.mkdir(parents=True, exist_ok=True)
    for name in options.networks or ALL:
        common = [name, "--folder", str(options.folder.resolve()), "--isa", options.isa]
        common += ["--threads", str(options.threads), "--only", *options.only]
        out = results / f"{name}.json"
        timing = ["--seconds", str(options.seconds), "--calls", str(options.calls)]
        timing += ["--out", str(out), "--cpus", *map(str, options.cpus)]
        timing += [] if options.lock is None else ["--lock", str(options.lock.resolve())]
        env = environment(options.isa, options.threads, options.folder.resolve())
        for arguments in (["prepare", *common], ["time", *common, *timing]):
            command = [sys.executable, "-m", "benchmarks.one", *arguments]
            done = subprocess.run(command, env=env, cwd=HERE.parent, check=False)
            if done.returncode != 0:
                print(f"{name}: `{arguments[0]}` ended with {done.returncode}", file=sys.stderr)
                break
        else:
            show(json.loads(out.read_text()))
    from benchmarks.picture import draw

    draw(results, results / "networks.png")


def show(record: dict[str, Any]) -> None:
    """Print the table of one network, fastest first."""
    from rich.console import Console

    from t3c.report import tables

    shown = ("p50_ms", "quiet_ms", "cpu_ms", "p90_ms", "p95_ms", "gap_ms")
    shown += ("ratio", "quiet_ratio", "cpu_ratio", "error")
    rows = [
        {"": row["name"]} | {key: row[key] for key in shown} | {"top1": row["top1"]}
        for row in sorted(record["rows"], key=lambda row: row["p50_ms"])
    ]
    title = f"{record['title']}, {record['isa']}, {record['threads']} thread(s)"
    Console(width=160).print(tables.plain(rows, title))
    for name, why in record["absent"].items():
        print(f"absent: {name}: {why}")


if __name__ == "__main__":
    main()
