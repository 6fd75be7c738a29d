"""Measure designed layers and small networks on one or several devices, into a dataset."""

import gc
import hashlib
import json
import os
import platform
import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

import numpy as np

import t3c.codegen
from t3c import targets
from t3c.codegen.build import is_host
from t3c.codegen.families import families_of
from t3c.core.errors import CostModelError, TargetError
from t3c.core.profile import Label
from t3c.cost_models.base import Row
from t3c.cost_models.dataset import (
    Dataset,
    KernelRow,
    Measured,
    ProfileRow,
    Sample,
    energy_key,
    kernel_key,
    profile_key,
    row_json,
)
from t3c.cost_models.design import design
from t3c.cost_models.device import Device, this_device
from t3c.cost_models.meters import AbstractMeter
from t3c.cost_models.transfer import spread_out
from t3c.measurement.energy import meter_units
from t3c.measurement.hosts import Host, connect
from t3c.measurement.units import (
    MIXED,
    SHARES,
    TOGETHER,
    Function,
    Unit,
    build_network,
    build_shard,
)
from t3c.measurement.zoo import NETWORKS
from t3c.runtime.threads import available_cores
from t3c.targets.base import TargetSpec

Progress = Callable[[str, int, int], None]
PROFILES = ("dense", *SHARES, *(f"mixed{i}" for i in range(MIXED)))
SHARD = 40
"""Layers of a unit."""
BATCH = 6
"""Units that are timed in turns."""
ROUNDS = 8
"""Turns of the units of a batch."""
FEW_NETWORKS = tuple(NETWORKS)[:4]
"""Networks that adapt a model of another device."""
FEW_FROM = 480
"""Designed layers that a few are chosen from."""
SHARD_CALLS, PROFILE_CALLS = 6, 8
"""Calls in a turn."""
TRACES = 2
"""Traced calls of a profile in a turn."""
INTERRUPTED = 2.0
"""A call that took so many times the lower quartile did not have the processor for itself."""
METERED = "joules"
"""First word of the names of units that are metered."""
BUILD_SHARE = 0.75
"""Of the time, what building may take; what is built by then is measured."""


@dataclass(frozen=True, slots=True)
class Job:
    """One unit to build.

    Attributes:
        name: Of the unit.
        rows: Layers of a shard; empty for a network.
        groups: Of each row.
    """

    name: str
    rows: tuple[Row, ...] = ()
    groups: tuple[str, ...] = ()

    def keys(self, threads: int) -> list[str]:
        """Keys of the rows that it gives."""
        if self.rows:
            metered = self.name.startswith(METERED)
            keys = [kernel_key(row) for row in self.rows]
            return [energy_key(key) for key in keys] if metered else keys
        return [profile_key(self.name, profile, threads) for profile in PROFILES]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        kernels: How many layers, about.
        networks: Names of networks of the zoo.
        joules: How many of the layers are metered, too, where there is a meter.
        few: Whether the layers are spread over all kinds of kernels and over shapes, one of a shape
            as far as there are shapes: for a model of another device that is transferred.
    """

    kernels: int = 480
    networks: tuple[str, ...] = tuple(NETWORKS)
    few: bool = False
    joules: int = 160

    def metered(self, spec: TargetSpec, threads: int) -> list[Job]:
        """Shards whose functions repeat one layer, for a meter that sees nothing shorter."""
        shards = [job for job in self.jobs(spec, threads) if job.rows]
        found, count = [], 0
        for job in shards:
            if count < self.joules:
                name = job.name.replace("layers", METERED)
                found.append(Job(name, job.rows, job.groups))
                count += len(job.rows)
        return found

    def jobs(self, spec: TargetSpec, threads: int) -> list[Job]:
        """Shards and networks in turns.

        Raises:
            ValueError: A network is not in the zoo.
        """
        if unknown := [name for name in self.networks if name not in NETWORKS]:
            raise ValueError(f"no network {unknown[0]!r}; there are {', '.join(NETWORKS)}")
        families = families_of(spec)
        drawn = design(
            max(self.kernels, FEW_FROM) if self.few else self.kernels,
            spec.rank_step,
            four=families.linear.grouped is not None,
            codes=families.conv.static,
            threads=threads,
        )
        if self.few:
            drawn = spread_out(drawn, self.kernels)
        shards = []
        for i in range(0, len(drawn), SHARD):
            rows, groups = zip(*drawn[i : i + SHARD], strict=True)
            text = json.dumps([row_json(row) for row in rows], sort_keys=True)
            digest = hashlib.sha256(text.encode()).hexdigest()[:8]
            shards.append(Job(f"layers-{digest}", rows, groups))
        networks = [Job(name) for name in self.networks]
        mixed = []
        while shards or networks:
            mixed += [jobs.pop(0) for jobs in (networks, shards) if jobs]
        return mixed


def measure(
    out: Path,
    device: Device,
    spec: TargetSpec,
    hosts: Sequence[Host],
    *,
    minutes: float = 10.0,
    plan: Plan | None = None,
    workers: int | None = None,
    folder: Path | None = None,
    source: Device | None = None,
    meter: AbstractMeter | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> Dataset:
    """Measure what a dataset lacks.

    Libraries are built first, so that building does not disturb; they stay in a folder for the next
    run. Rows are written as soon as a batch of units is measured.

    Args:
        out: File of the dataset; one that exists is gone on with.
        device: What the hosts are.
        spec: Target of the kernels.
        hosts: Where units run; several work in parallel.
        minutes: Time for all, about; 0: no limit.
        plan: What to measure; None: the default.
        workers: Processes that build; 0: this one; None: a core each.
        folder: Of built units; None: the user's cache.
        source: Whose model will be transferred, for the head of a new dataset; None: nobody's.
        meter: Measures energy on this machine; None, or one that estimates: no energy is measured.
        progress: Called with (what, done, total).
        say: Told every remark.

    Returns:
        The dataset.

    Raises:
        CostModelError: The dataset is damaged or of another device, or no host is left.
        LoweringError: A unit cannot be built.
    """
    start = time.monotonic()
    limit = start + 60 * minutes if minutes > 0 else float("inf")
    report = progress or (lambda *_: None)
    dataset = Dataset.open(out, device, say, source)
    wanted = Plan() if plan is None else plan
    jobs = wanted.jobs(spec, device.threads)
    missing = [j for j in jobs if any(k not in dataset.rows for k in j.keys(device.threads))]
    where = (_cache(spec) if folder is None else folder).absolute()
    where.mkdir(parents=True, exist_ok=True)
    until = start + BUILD_SHARE * (limit - start)
    count = available_cores() if workers is None else workers
    units = _built(missing, spec, device.threads, where, until, count, report)
    if len(units) < len(missing):
        say(f"{len(units)} of {len(missing)} units were built in time; run again to go on")
    # What is built late is measured nevertheless: it takes far less time than building.
    limit = max(limit, time.monotonic() + (1 - BUILD_SHARE) * 60 * minutes)
    batches = [units[i : i + BATCH] for i in range(0, len(units), BATCH)]
    _Farm(dataset, device, batches, limit, report, say).run(hosts)
    if meter is not None and meter.label is Label.MEASURED:
        if len(hosts) > 1 or not hosts[0].here:
            say(f"the meter {meter.name!r} is of this machine; energy of others is not measured")
        else:
            lacking = [
                job
                for job in (*wanted.metered(spec, device.threads), *(j for j in jobs if not j.rows))
                if any(key not in dataset.rows for key in _energies(job, device.threads))
            ]
            now = time.monotonic()
            until = now + BUILD_SHARE * (limit - now)
            found = _built(lacking, spec, device.threads, where, until, count, report)
            if len(found) < len(lacking):
                say(
                    f"{len(lacking) - len(found)} of {len(lacking)} units to meter were not built "
                    "in time; run again to go on"
                )
            meter_units(dataset, found, hosts[0], meter, limit, report, say)
    return dataset


def _energies(job: Job, threads: int) -> list[str]:
    """Keys of the energies that a job gives."""
    return job.keys(threads) if job.rows else [energy_key(key) for key in job.keys(threads)]


def measure_on(
    device: str,
    out: Path,
    *,
    minutes: float = 10.0,
    threads: int = 1,
    target: str | None = None,
    name: str | None = None,
    key: str = "",
    plan: Plan | None = None,
    workers: int | None = None,
    folder: Path | None = None,
    source: Device | None = None,
    meter: AbstractMeter | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> Dataset:
    """Measure on devices that are given as text; see `measure` and `hosts.connect`.

    Args:
        device: Where.
        out: File of the dataset.
        minutes: Time for all, about; 0: no limit.
        threads: Threads of a call.
        target: Name of the target; None: this machine's best.
        name: What to call remote devices, which must all be of one kind; None: they are this
            machine.
        key: Of RPC servers that are named one by one.
        plan: See `measure`.
        workers: See `measure`.
        folder: See `measure`.
        source: See `measure`.
        meter: See `measure`.
        progress: See `measure`.
        say: See `measure`.
    """
    spec = targets.detect_host() if target is None else targets.get(target)
    if spec.kind != "llvm":
        raise TargetError(f"target {spec.name!r} is no CPU; kernels are measured on CPUs only")
    found = this_device(spec, threads)
    if name is not None:
        found = replace(found, cpu=name, features=tuple(sorted(spec.features)))
    elif not is_host(spec) or not spec.features <= targets.cpu_features():
        raise TargetError(
            f"target {spec.name!r} is not this machine: name the device (--name), so that its rows "
            "are not taken for another's"
        )
    return measure(
        out,
        found,
        spec,
        connect(device, key),
        minutes=minutes,
        plan=plan,
        workers=workers,
        folder=folder,
        source=source,
        meter=meter,
        progress=progress,
        say=say,
    )


def _built(
    jobs: Sequence[Job],
    spec: TargetSpec,
    threads: int,
    where: Path,
    until: float,
    workers: int,
    report: Progress,
) -> list[Unit]:
    """Units of jobs, in order, as far as they are built before the time is over."""
    found: dict[str, Unit] = {}
    waiting = []
    for job in jobs:
        unit = Unit.read(where / job.name)
        if unit is None:
            waiting.append(job)
        else:
            found[job.name] = unit
    arguments = [(job, spec, threads, where / job.name) for job in waiting]
    if workers == 0:
        for i, one in enumerate(arguments):
            report("build", i, len(arguments))
            if time.monotonic() < until:
                found[one[0].name] = _build(one)
    elif waiting:
        with _quiet_workers(), ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            futures: dict[Future[Unit], str] = {
                pool.submit(_build, a): a[0].name for a in arguments
            }
            try:
                left = max(0.0, until - time.monotonic())
                done = as_completed(futures, None if left == float("inf") else left)
                for i, future in enumerate(done):
                    found[futures[future]] = future.result()
                    report("build", i + 1, len(arguments))
            except TimeoutError:
                pass
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        for future, name in futures.items():
            if name not in found and future.done() and not future.cancelled():
                found[name] = future.result()
    return [found[job.name] for job in jobs if job.name in found]


@contextmanager
def _quiet_workers() -> Generator[None]:
    """Workers that start in here use one thread each for torch."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _build(given: tuple[Job, TargetSpec, int, Path]) -> Unit:
    job, spec, threads, path = given
    gc.disable()  # kernel text becomes large trees; looking for cycles in them takes long
    try:
        if job.rows:
            copies = TOGETHER if job.name.startswith(METERED) else 1
            return build_shard(job.name, job.rows, job.groups, spec, path, copies)
        return build_network(NETWORKS[job.name], spec, threads, path)
    finally:
        gc.enable()


@dataclass(slots=True)
class _Farm:
    """Hosts that take batches of units off one queue."""

    dataset: Dataset
    device: Device
    batches: Sequence[Sequence[Unit]]
    limit: float
    report: Progress
    say: Callable[[str], None]
    _queue: queue.Queue[Sequence[Unit]] = field(default_factory=queue.Queue)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _left: int = 0
    _failed: list[Exception] = field(default_factory=list)

    def run(self, hosts: Sequence[Host]) -> None:
        """Measure all batches, or those that the time allows.

        Raises:
            CostModelError: Batches are left and no host is.
        """
        for batch in self.batches:
            self._queue.put(batch)
        self._left = len(self.batches)
        if len(hosts) == 1:
            self._work(hosts[0])
        else:
            workers = [threading.Thread(target=self._work, args=(host,)) for host in hosts]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        if self._left and time.monotonic() < self.limit:
            why = f": {self._failed[-1]}" if self._failed else ""
            raise CostModelError(
                f"no device is left, {self._left} batches are not measured{why}. Rows so far are "
                f"in {self.dataset.path}; run again to go on"
            )
        if self._left:
            self.say(f"{self._left} batches are left for the time; run again to go on")

    def _work(self, host: Host) -> None:
        """Take batches until none is left, or the host fails; then another host takes its batch."""
        while self._left and time.monotonic() < self.limit:
            try:
                batch = self._queue.get(timeout=0.05)
            except queue.Empty:
                continue  # another host may still hand its batch back
            try:
                rows = timed(batch, host, self.device.threads)
            except Exception as error:  # TVM raises what it likes
                self._queue.put(batch)
                self._failed.append(error)
                if host.here:
                    raise
                first = str(error).strip().splitlines()[-1][:200]
                self.say(f"{host.name} failed and is left out: {first}")
                return
            with self._lock:
                self.dataset.append(rows, self.device)
                self._left -= 1
                done = len(self.batches) - self._left
            self.report("measure", done, len(self.batches))


def timed(units: Sequence[Unit], host: Host, threads: int) -> list[Measured]:
    """Time units in turns: every kernel of every shard, every profile of every network.

    Args:
        units: What to time.
        host: Where.
        threads: Threads of a call.
    """
    host.use_threads(threads)
    loaded = [host.load(unit) for unit in units]
    calls: dict[tuple[int, int], list[float]] = {}
    kernels: dict[tuple[int, int], list[np.ndarray[tuple[int], np.dtype[np.float64]]]] = {}
    load, mhz = [], []
    for _ in range(ROUNDS):
        load.append(os.getloadavg()[0])
        mhz.append(frequency())
        for i, one in enumerate(loaded):
            for j, function in enumerate(one.unit.functions):
                count = TRACES if function.call else SHARD_CALLS
                found = [one.kernels(function) for _ in range(count)]
                kernels.setdefault((i, j), []).extend(found)
                if function.call:
                    calls.setdefault((i, j), []).extend(one.calls(function, PROFILE_CALLS))
    note = {
        "load": round(float(np.median(load)), 2) if host.here else -1.0,
        "mhz": round(float(np.median(mhz)), 1) if host.here else 0.0,
    }
    rows: list[Measured] = []
    for i, one in enumerate(loaded):
        for j, function in enumerate(one.unit.functions):
            parts = np.array(kernels[i, j])
            if function.call:
                inside = np.median(parts, axis=0)[np.array(function.of_call) >= 0].sum()
                rows.append(
                    ProfileRow(
                        one.unit.name,
                        function.profile,
                        function.rows,
                        function.rest,
                        sample(calls[i, j], **note),
                        round(float(inside), 9),
                    )
                )
            else:
                rows += _kernel_rows(function, parts, note)
    return rows


def _kernel_rows(
    function: Function,
    parts: np.ndarray[tuple[int, int], np.dtype[np.float64]],
    note: Mapping[str, float],
) -> list[Measured]:
    """One row for each layer of a function; `parts` is seconds [calls, kernels]."""
    of_call = np.array(function.of_call)
    return [
        KernelRow(
            layer,
            sample(parts[:, of_call == i].sum(1).tolist(), **note),
            function.weight_bytes[i],
            function.groups[i],
        )
        for i, layer in enumerate(function.rows)
    ]


def sample(seconds: Sequence[float], *, load: float = -1.0, mhz: float = 0.0) -> Sample:
    """Percentiles of measured calls, without those that were interrupted."""
    quarter = float(np.quantile(seconds, 0.25))
    kept = [s for s in seconds if s <= INTERRUPTED * quarter]
    p50, p90, p95 = (round(float(q), 10) for q in np.percentile(kept, (50, 90, 95)))
    return Sample(
        p50,
        p90,
        p95,
        len(kept),
        len(seconds) - len(kept),
        load,
        mhz,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def frequency(
    scaling: Path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"),
    cpuinfo: Path = Path("/proc/cpuinfo"),
) -> float:
    """MHz of the first processor, as the system tells; 0: it does not."""
    if scaling.exists():
        return int(scaling.read_text()) / 1e3
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == "cpu MHz":
            return float(value)
    return 0.0


def _cache(spec: TargetSpec) -> Path:
    """Folder of units, for this target and exactly these kernels."""
    base = os.environ.get("XDG_CACHE_HOME")
    root = (Path(base) if base else Path.home() / ".cache") / "t3c" / "measure"
    total = hashlib.sha256(f"{spec.name} {spec.mcpu} {platform.python_version()}".encode())
    here = Path(t3c.codegen.__file__).parent
    own = [Path(__file__).with_name(f"{name}.py") for name in ("units", "zoo")]
    for file in sorted([*here.rglob("*.py"), *here.rglob("*.jsonl"), *own]):
        total.update(file.read_bytes())
    return root / f"{spec.name}-{total.hexdigest()[:12]}"


__all__ = ["Plan", "frequency", "measure", "measure_on", "sample", "timed"]
