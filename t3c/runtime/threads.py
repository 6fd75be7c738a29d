"""How many threads a call uses: counted from what the process may use, fixed per session.

TVM keeps a pool of workers for each calling thread. Left alone, it takes half of the logical
processors, binds its workers to fixed processors (outside the process's own mask, too), binds the
caller, and spins for a tenth of a second after each call. Here nothing is bound, so that workers
run where the process may run, and they sleep after half a millisecond without work, so that
torch's threads get the processors back.
"""

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from t3c.runtime import tvm_vm

SPINS = 2000
"""Looks for work before a worker sleeps: about half a millisecond, longer than what lies between
two parallel kernels of a call. Waking it up takes 5 to 50 us."""
WORKERS = 8
"""Workers of a pool, at least, where there are so many processors: a pool never grows, so a session
with more threads than the thread's first one, or one in a wider mask, would be left with fewer."""
_SHARE_ALL = -3
_CPU = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")

os.environ.setdefault("TVM_BIND_THREADS", "0")
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", str(SPINS))


def default_threads(recorded: int | None = None) -> int:
    """Threads of a call where the user names none.

    ``TVM_NUM_THREADS`` or ``OMP_NUM_THREADS``; else as many as latencies were recorded with, so
    that budgets mean what they say, but no more than the physical cores that this process may use.

    Args:
        recorded: What latencies were recorded with; None: there are none, and all cores count.
    """
    for name in ("TVM_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    cores = available_cores()
    return cores if recorded is None else min(recorded, cores)


def available_cores() -> int:
    """Physical cores in the process's mask, but no more than its control group pays for."""
    if hasattr(os, "sched_getaffinity"):
        cores = physical_cores(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    own = Path("/proc/self/cgroup")
    quota = cgroup_cores(own.read_text()) if own.is_file() else None
    return max(1, cores if quota is None else min(cores, int(quota)))


def physical_cores(processors: Iterable[int], topology: Path = _CPU) -> int:
    """Cores that logical processors belong to: two hyperthreads are one core.

    Args:
        processors: Numbers of logical processors.
        topology: Folder of the kernel's description of them.
    """
    cores = set[str]()
    for number in processors:
        siblings = topology / f"cpu{number}" / "topology" / "thread_siblings_list"
        cores.add(siblings.read_text().strip() if siblings.is_file() else str(number))
    return len(cores)


def cgroup_cores(membership: str, root: Path = _CGROUP) -> float | None:
    """Processor time that a control group may use, in processors; None without a limit.

    Args:
        membership: Content of /proc/self/cgroup.
        root: Where control groups are mounted.
    """
    found = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folders = [root / path.strip("/"), *(root / path.strip("/")).parents]
            limits = [f / "cpu.max" for f in folders if f == root or root in f.parents]
            texts = [file.read_text().split() for file in limits if file.is_file()]
            found += [int(t[0]) / int(t[1]) for t in texts if t[0] != "max"]
        elif "cpu" in controllers.split(","):
            folder = root / "cpu" / path.strip("/")
            quota, period = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
            if quota.is_file() and int(quota.read_text()) > 0:
                found.append(int(quota.read_text()) / int(period.read_text()))
    return min(found, default=None)


class _Pool(threading.local):
    """The calling thread's pool, as this module left it."""

    workers = 0
    used = 0


_pool = _Pool()


def use(count: int) -> None:
    """Let kernels that the calling thread runs use `count` threads, itself among them."""
    if _pool.used == count:
        return
    if _pool.workers == 0:
        _pool.workers = max(count, min(WORKERS, os.cpu_count() or 1))
        _configure(_pool.workers)
    _configure(min(count, _pool.workers))
    _pool.used = count


def _configure(count: int) -> None:
    tvm_vm.configure_pool(_SHARE_ALL, count, [str(i) for i in range(count)])
