"""One network in one process: `prepare` its files, or `time` its contestants. Called by run.py."""

import argparse
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.contestants import PEERS, PREPARE, Bind, Contestant, Setting
from benchmarks.networks import ALL, HELD_OUT, Network
from benchmarks.turns import quiet, summary, take_turns

TRIAL_CALLS = 7


def main() -> None:
    """Parse and run one stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=("prepare", "time"))
    parser.add_argument("network", choices=ALL)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--isa", default="native")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--cpus", type=int, nargs="*", default=[])
    parser.add_argument("--only", nargs="*", default=list(PEERS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    net = ALL[options.network]
    folder = options.folder / net.name
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(folder, options.threads, options.isa)
    if options.stage == "prepare":
        prepare(net, setting, options.only)
    else:
        torch.set_num_threads(options.threads)
        with torch.inference_mode():
            record = measure(net, setting, options)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


def prepare(net: Network, setting: Setting, only: list[str]) -> None:
    """Run every step that has not succeeded before; a failure is kept as the reason."""
    for step, run in PREPARE.items():
        tag = f"{step}-{setting.isa}" if step == "ours" else step
        done, failed = (setting.folder / f"{tag}.{end}" for end in ("done", "failed"))
        if done.exists() or (step in PEERS and step not in only):
            continue
        began = time.perf_counter()
        failed.unlink(missing_ok=True)
        try:
            run(net, setting)
            done.write_text(f"{time.perf_counter() - began:.0f} s\n")
        except Exception as error:  # whatever a peer raises becomes a line of the table
            traceback.print_exc()
            failed.write_text(_reason(error))
        print(f"{net.name} {tag}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def measure(net: Network, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Load everybody, choose settings, time in turns, compare outputs."""
    inputs = [net.draw(i) for i in HELD_OUT]
    binds: dict[str, Bind] = {}
    lines: dict[str, dict[str, Any]] = {}
    absent: dict[str, str] = {}
    for family in options.only:
        reasons = [f.read_text() for f in setting.folder.glob(f"{family}*.failed")]
        try:
            found = list(PEERS[family](net, setting))
        except Exception as error:
            absent[family] = " ".join([*reasons, _reason(error)])
            continue
        for contestant in found:
            bind, trials, refused = _best(contestant, inputs[0])
            line = {"kind": contestant.kind, "note": contestant.note, "trials_ms": trials}
            if bind is None:
                why = [contestant.note, *reasons, *(f"{k}: {v}" for k, v in refused.items())]
                absent[contestant.name] = " ".join(filter(None, why))
                continue
            if refused:
                line["refused"] = refused
            binds[contestant.name], lines[contestant.name] = bind, line
    answers = {
        name: [np.array(bind(x)(), np.float32, copy=True) for x in inputs]
        for name, bind in binds.items()
    }
    runs = {name: bind(inputs[0]) for name, bind in binds.items()}
    for run in runs.values():
        run()
    with quiet(options.lock, options.cpus):
        load = machine.describe()["load_average"]
        rivals = [name for name in runs if lines[name]["kind"] == "int8"]
        seconds = take_turns(runs, options.seconds, options.calls, rivals)
    want = answers["torch fp32"] if "torch fp32" in answers else None
    rows = [
        {
            "name": name,
            **lines[name],
            **summary(seconds[name]),
            **_quality(answers[name], want, net.top1),
        }
        for name in runs
    ]
    for key, column in (("ratio", "p50_ms"), ("quiet_ratio", "quiet_ms"), ("cpu_ratio", "cpu_ms")):
        best = min((r[column] for r in rows if r["kind"] == "int8"), default=None)
        for row in rows:
            row[key] = None if best is None else row[column] / best
    return {
        "schema": 1,
        "network": net.name,
        "title": net.title,
        "isa": setting.isa,
        "threads": setting.threads,
        "machine": {**machine.describe(), "load_average": load},
        "profiles": {} if "t3c max" not in runs else _profiles(setting),
        "rows": rows,
        "absent": absent,
    }


def _best(
    contestant: Contestant, inputs: tuple[Any, ...]
) -> tuple[Bind | None, dict[str, float], dict[str, str]]:
    """The fastest candidate of a short trial, the trials (milliseconds), and who failed."""
    made: dict[str, Bind] = {}
    refused: dict[str, str] = {}
    for how, make in contestant.candidates.items():
        try:
            bind = make()
            bind(inputs)()
            made[how] = bind
        except Exception as error:
            refused[how] = _reason(error)
    if len(made) < 2:
        return next(iter(made.values()), None), {}, refused
    runs: dict[str, Callable[[], Any]] = {how: bind(inputs) for how, bind in made.items()}
    seconds = take_turns(runs, 10.0, TRIAL_CALLS)
    trials = {how: summary(s)["cpu_ms"] for how, s in seconds.items()}
    return made[min(trials, key=lambda how: trials[how])], trials, refused


def _quality(got: list[Any], want: list[Any] | None, top1: bool) -> dict[str, float | None]:
    if want is None:
        return {"error": None, "top1": None}
    pairs = list(zip(got, want, strict=True))
    error = np.mean([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])
    told_apart = top1 and len({int(b.argmax(-1).flat[0]) for b in want}) > 1
    same = np.mean([np.mean(a.argmax(-1) == b.argmax(-1)) for a, b in pairs])
    return {"error": float(error), "top1": float(same) if told_apart else None}


def _profiles(setting: Setting) -> dict[str, Any]:
    from t3c.core.artifact import Artifact

    found = Artifact.read(setting.folder / f"ours-{setting.isa}").manifest.profiles
    most = found[-1].profile.macs
    return {
        f"t3c {c.profile.name}": {
            "macs": c.profile.macs,
            "share": c.profile.macs / most,
            "parity": None if c.parity is None else c.parity.relative,
        }
        for c in found
    }


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[
        :300
    ]


if __name__ == "__main__":
    main()
