"""What a call costs beside its kernels, what it allocates, and what a second thread brings.

    python -m benchmarks.overhead FOLDER [--before FOLDER] [--threads 2] [--name minilm-16]

FOLDER is an artifact that `t3c.lower` kept as `checks`: its library has traces. For its smallest
and its largest profile: a call of the session with numpy and with torch inputs, the native function
alone, the sum of its kernels (the cycle counter between them costs some time itself); memory that a
warm call asks for; the same call on one thread and on several, kernel by kernel. `--before` is
another artifact of the same network, called in turn. Results go to
benchmarks/results/overhead.json, one entry for each name.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.turns import quiet
from t3c.core.probe import Trace
from t3c.runtime import tvm_vm
from t3c.runtime.entry import NativeEntry
from t3c.runtime.session import Session, load
from t3c.runtime.weights import aligned_copy, aligned_empty

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "overhead.json"
SECONDS = 8.0
"""Of each part."""


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--before", type=Path, help="the same network, built otherwise")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", help="of the entry; default: the folder's")
    parser.add_argument("--lock", type=Path, help="held while timing")
    parser.add_argument("--allocations", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.allocations:
        print(json.dumps(allocations(load(options.artifact, hashes=False, threads=1))))
        return
    command = f"python -m benchmarks.overhead {options.artifact.name}"
    record: dict[str, Any] = {"machine": machine.describe() | {"command": command}}
    with quiet(options.lock, [0]):
        record["calls"] = calls(options.artifact, options.before)
    record["allocations"] = count(options.artifact)
    with quiet(options.lock, list(range(options.threads))):
        record["threads"] = scaling(options.artifact, options.threads)
    stored = json.loads(OUT.read_text()) if OUT.exists() else {}
    stored[options.name or options.artifact.name] = record
    OUT.write_text(json.dumps(stored, indent=1) + "\n")
    shown = {
        **record,
        "threads": {n: {**t, "kernels": "..."} for n, t in record["threads"].items()},
    }
    print(json.dumps(shown, indent=1))


def calls(artifact: Path, before: Path | None) -> dict[str, Any]:
    """Microseconds of a call by who asks, interleaved."""
    session = load(artifact, hashes=False, threads=1)
    other = None if before is None else load(before, hashes=False, threads=1)
    given = example(session)
    found = {}
    for name, trace in ends(artifact).items():
        runs: dict[str, Callable[[], Any]] = {
            "session, numpy": _call(session, name, given),
            "session, torch": _call(session, name, _torch(given)),
            "function alone": _alone(session, name, given),
        }
        if other is not None:
            runs["before"] = _call(other, name, given)
        times = in_turn(runs)
        kernels = np.sum(session.trace(trace, name, given, 200)[50:], axis=1)
        row = {key: quantiles(value) for key, value in times.items()}
        row["sum of kernels"] = quantiles(kernels.tolist())
        whole, alone = row["session, numpy"]["p50_us"], row["function alone"]["p50_us"]
        row["beside the function"] = {"us": whole - alone, "share": (whole - alone) / whole}
        if other is not None:
            row["ratio to before"] = {"p50": whole / row["before"]["p50_us"]}
        found[name] = row
    return found


def scaling(artifact: Path, threads: int) -> dict[str, Any]:
    """One thread against several: whole calls in turn, then kernel by kernel."""
    one, many = (load(artifact, hashes=False, threads=n) for n in (1, threads))
    given = example(one)
    found = {}
    for name, trace in ends(artifact).items():
        times = in_turn({"1": _call(one, name, given), str(threads): _call(many, name, given)})
        single, several = (np.median(times[key]) for key in ("1", str(threads)))
        seen: tuple[list[Any], list[Any]] = ([], [])
        for _ in range(15):
            for session, rows in zip((one, many), seen, strict=True):
                rows += session.trace(trace, name, given, 3)[1:]
        alone, together = (np.median(np.array(rows), axis=0) for rows in seen)
        table: dict[str, dict[str, float]] = {}
        for kernel, a, b in zip(trace.kernels, alone, together, strict=True):
            row = table.setdefault(kernel, {"calls": 0, "one_us": 0.0, "many_us": 0.0})
            row["calls"] += 1
            row["one_us"] += float(a) * 1e6
            row["many_us"] += float(b) * 1e6
        for row in table.values():
            row["gain"] = row["one_us"] / max(row["many_us"], 1e-9)
        listed = sorted(table.items(), key=lambda item: -item[1]["many_us"])
        found[name] = {
            "p50_us": {"1": float(single) * 1e6, str(threads): float(several) * 1e6},
            "gain": float(single / several),
            "kernels": dict(listed),
        }
    return found


def count(artifact: Path) -> dict[str, Any]:
    """Run `allocations` in a process whose malloc counts."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "allocations.so"
        source = HERE / "allocations.c"
        subprocess.run(
            ["cc", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True
        )
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.overhead", str(artifact), "--allocations"],
            env=os.environ | {"LD_PRELOAD": str(library)},
            capture_output=True,
            text=True,
            check=True,
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def allocations(session: Session) -> dict[str, Any]:
    """Calls of malloc and its kin, and their bytes, in one warm call."""
    counter = ctypes.CDLL(None)
    number = ctypes.c_long.in_dll(counter, "allocations_count")
    size = ctypes.c_long.in_dll(counter, "allocations_bytes")
    given = example(session)
    found = {}
    for name in (session.profiles[0].name, session.profiles[-1].name):
        row = {}
        for key, run in {
            "function alone": _alone(session, name, given),
            "session, numpy": _call(session, name, given),
        }.items():
            for _ in range(20):
                run()
            start = number.value, size.value
            for _ in range(100):
                run()
            row[key] = {
                "allocations": (number.value - start[0]) / 100,
                "bytes": (size.value - start[1]) / 100,
            }
        outputs = session.manifest.outputs
        row["outputs"] = {
            "allocations": len(outputs),
            "bytes": sum(int(np.prod(o.shape)) * np.dtype(o.dtype).itemsize for o in outputs),
        }
        found[name] = row
    return found


def ends(artifact: Path) -> dict[str, Trace]:
    """Traces of the smallest and the largest profile."""
    stored: Mapping[str, Any] = json.loads((artifact / "traces.json").read_text())
    names = list(stored)
    return {
        n: Trace(stored[n]["function"], tuple(stored[n]["kernels"]), tuple(stored[n]["sites"]))
        for n in dict.fromkeys((names[0], names[-1]))
    }


def example(session: Session) -> list[Any]:
    """Aligned inputs: noise, or small whole numbers."""
    source = np.random.default_rng(0)
    return [
        aligned_copy(
            source.integers(1, 2, s.shape).astype(s.dtype)
            if np.dtype(s.dtype).kind in "iub"
            else source.standard_normal(s.shape).astype(s.dtype)
        )
        for s in session.manifest.inputs
    ]


def in_turn(runs: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of every call, one of each in turn."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(next(iter(times.values()))) < 20:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quiet tenth, 90th percentile and their gap; microseconds."""
    p10, p50, p90 = (float(np.quantile(seconds, q)) * 1e6 for q in (0.1, 0.5, 0.9))
    return {"p50_us": p50, "quiet_us": p10, "p90_us": p90, "gap_us": p90 - p50}


def _call(session: Session, name: str, given: Sequence[Any]) -> Callable[[], Any]:
    variant = session.variants[name]
    return lambda: variant(*given)


def _torch(given: Sequence[Any]) -> list[Any]:
    import torch

    return [torch.from_numpy(array) for array in given]


def _alone(session: Session, name: str, given: Sequence[Any]) -> Callable[[], Any]:
    """The entry with everything prepared."""
    entry = session.variants[name]._entry  # pyright: ignore[reportPrivateUsage]
    assert isinstance(entry, NativeEntry)
    compiled = next(p for p in session.manifest.profiles if p.profile.name == name)
    arena = tvm_vm.share(aligned_empty((max(1, compiled.arena_bytes or 0),), np.dtype("u1")))
    specs = session.manifest.outputs
    outputs = [tvm_vm.share(aligned_empty(s.shape, np.dtype(s.dtype))) for s in specs]
    inputs = [tvm_vm.share(array) for array in given]
    return lambda: entry.run(inputs, arena, *outputs)


if __name__ == "__main__":
    main()
