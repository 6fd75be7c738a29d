"""Fair timing: contestants take turns in random order, each after a call that does not count."""

import fcntl
import os
import random
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[], Any]
Spent = tuple[float, float]
SLOW = 2.0
"""A contestant slower than this multiple of the fastest rival takes every fourth turn only."""
EVERY = 4
LEAST = 5
PRIORITY = -15


def take_turns(
    runs: Mapping[str, Run], seconds: float, most: int, rivals: Collection[str] = ()
) -> dict[str, list[Spent]]:
    """(wall, processor) seconds of every counted call.

    Processor time is that of the whole process: it counts a peer's workers, and does not count
    other programs that took the core meanwhile.

    Args:
        runs: Name -> call without arguments.
        seconds: About how long it may take.
        most: Most calls of each.
        rivals: Who decides what is slow: see `SLOW`; empty: everybody.
    """
    first = {name: min(_call(run)[1] for _ in range(2)) for name, run in runs.items()}
    limit = SLOW * min(first[name] for name in rivals or runs)
    found: dict[str, list[Spent]] = {name: [] for name in runs}
    order, source = list(runs), random.Random(0)
    began = time.perf_counter()
    turn = 0
    while turn < most and (turn < LEAST or time.perf_counter() - began < seconds):
        source.shuffle(order)
        for name in order:
            if first[name] <= limit or turn % EVERY == 0:
                _call(runs[name])
                found[name].append(_call(runs[name]))
        turn += 1
    return found


def _call(run: Run) -> Spent:
    start, busy = time.perf_counter(), time.process_time()
    run()
    busy = time.process_time() - busy
    return time.perf_counter() - start, busy


def summary(spent: Sequence[Spent]) -> dict[str, float]:
    """Median, 90th and 95th percentile, gap of 90th to median, quiet tenth; milliseconds."""
    wall, busy = zip(*spent, strict=True)
    p10, p50, p90, p95 = (float(np.quantile(wall, q)) * 1e3 for q in (0.1, 0.5, 0.9, 0.95))
    return {
        "cpu_ms": float(np.median(busy)) * 1e3,
        "p50_ms": p50,
        "quiet_ms": p10,
        "p90_ms": p90,
        "p95_ms": p95,
        "gap_ms": p90 - p50,
        "calls": len(spent),
    }


@contextmanager
def quiet(lock: Path | None, cpus: Sequence[int]) -> Generator[None]:
    """Hold the lock, with every thread of this process on these processors, first in their queue.

    Args:
        lock: A file that other work on this machine locks, too; None: none.
        cpus: Processors; empty: leave it to the system.
    """
    handle = None if lock is None else lock.open("a")
    try:
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        for task in map(int, os.listdir("/proc/self/task")):
            if cpus:
                os.sched_setaffinity(task, cpus)
            with suppress(OSError):  # the superuser's right
                os.setpriority(os.PRIO_PROCESS, task, PRIORITY)
        before = _group_priority(PRIORITY)
        try:
            yield
        finally:
            _group_priority(before)
    finally:
        if handle is not None:
            handle.close()


def _group_priority(nice: int) -> int:
    """Set that of the shell session, which shares processors with others first; the old one."""
    group = Path("/proc/self/autogroup")
    before = 0
    with suppress(OSError, ValueError):
        before = int(group.read_text().split()[-1])
        group.write_text(str(nice))
    return before
