"""Measuring an artifact on the device where it runs, and keeping what its budgets need to be true.

A percentile from one process does not hold in the next one: memory lies elsewhere, and the clock
of the processor has another history. So profiles are timed in several processes of their own, and
the record is what the next process stays below (`t3c.core.conservative`).

    python -m t3c.runtime.record FOLDER INPUTS.safetensors CALLS WARMUP [THREADS]   one such process
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from t3c.core.artifact import Artifact, write_manifest
from t3c.core.conservative import RUNS, increasing, next_run
from t3c.core.errors import T3CError
from t3c.core.profile import Label, Timing
from t3c.runtime.session import load
from t3c.runtime.weights import Weights, write

PROCESSES = 5
CALLS = 60
WARMUP = 5


def record(
    artifact: Artifact,
    inputs: Mapping[str, Any],
    *,
    processes: int = PROCESSES,
    calls: int = CALLS,
    threads: int | None = None,
) -> Artifact:
    """Time all profiles in fresh processes and write the latencies into the artifact.

    Args:
        artifact: Its manifest is replaced, nothing else.
        inputs: Input name -> numpy array.
        processes: How many, 3 to 11, one after the other.
        calls: Timed calls of each profile in each process, interleaved; at least 20.
        threads: Of each call; None: see `load`.

    Raises:
        ValueError: Too few or too many processes or calls.
        T3CError: A process fails; the message ends with what it said.
    """
    if processes not in RUNS:
        raise ValueError(f"processes is {processes}; allowed are {RUNS.start} to {RUNS.stop - 1}")
    if calls < 20:
        raise ValueError(f"calls is {calls}; a 95th percentile needs at least 20")
    runs = [samples(artifact, inputs, calls, threads=threads) for _ in range(processes)]
    kept = []
    for compiled in artifact.manifest.profiles:
        name = compiled.profile.name
        count = runs[0].threads
        latency = _timing([run.seconds[name] for run in runs], count)
        kept.append(replace(compiled, profile=replace(compiled.profile, latency=latency)))
    manifest = replace(artifact.manifest, profiles=increasing(kept))
    write_manifest(artifact.path, manifest)
    return Artifact(artifact.path, manifest)


class Run:
    """What one process measured.

    Attributes:
        seconds: Profile name -> seconds of every call.
        threads: Of each call.
    """

    def __init__(self, found: Mapping[str, Any]) -> None:
        """Take what the process printed."""
        self.seconds: dict[str, list[float]] = found["seconds"]
        self.threads: int = found["threads"]


def samples(
    artifact: Artifact,
    inputs: Mapping[str, Any],
    calls: int,
    *,
    warmup: int = WARMUP,
    threads: int | None = None,
) -> Run:
    """Seconds of calls of every profile, interleaved, in a process of their own.

    Args:
        artifact: What is measured.
        inputs: Input name -> numpy array.
        calls: Of each profile.
        warmup: Calls before, not timed.
        threads: Of each call; None: see `load`.

    Raises:
        T3CError: The process fails; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inputs.safetensors"
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in inputs.items()}
        write(file, arrays)
        words = [str(artifact.path), str(file), str(calls), str(warmup)]
        words += [] if threads is None else [str(threads)]
        command = [sys.executable, "-m", "t3c.runtime.record", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise T3CError(f"timing in a process of its own failed: {done.stderr.strip()[-500:]}")
    return Run(json.loads(done.stdout))


def _timing(runs: Sequence[Sequence[float]], threads: int) -> Timing:
    """The median of all calls, and what the 95th percentile of the next run stays below."""
    p50 = float(np.median(np.concatenate(runs)))
    p95 = next_run([float(np.percentile(run, 95)) for run in runs])
    return Timing(p50, max(p50, p95), Label.MEASURED, sum(map(len, runs)), threads)


def main(words: Sequence[str]) -> None:
    """Measure and print; see the head of this file."""
    folder, file, calls, warmup, *threads = words
    session = load(folder, hashes=False, threads=int(threads[0]) if threads else None)
    inputs = {name: np.array(value) for name, value in Weights(file).items()}
    names = [profile.name for profile in session.profiles]
    seconds = session.samples(names, inputs, int(calls), int(warmup))
    print(json.dumps({"seconds": seconds, "threads": session.threads}))


if __name__ == "__main__":
    main(sys.argv[1:])
