"""How much the outputs of the whole model move when one site changes its format: the damage table.

Damage is relative and squared: sum ||y - y_original||^2 / sum ||y_original||^2 over all float
outputs, with fake-quantized weights and activations at that site and the float original elsewhere.
Damages of several sites add up well (their sum predicts whole plans to about 5 %).
"""

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from torch import Tensor, fx

from t3c.controller.calibrate import one_thread_each
from t3c.controller.gradients import look
from t3c.controller.ledger import Ledger, Origin, Reading, Samples
from t3c.controller.progress import Progress, silent
from t3c.controller.suffix import Suffix
from t3c.core.errors import T3CError
from t3c.core.formats import Dense, Format
from t3c.core.profile import Label
from t3c.elastic.model import ElasticModel

Batch = tuple[Tensor, ...]
PROBES = 4
"""Random projections of the outputs behind the estimates."""
Job = tuple[str, Format]
"""One entry: site and format."""
Menu = Mapping[str, Sequence[Format]]
"""Site name -> formats on its menu, dense first, then falling."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Damage of one format at one site.

    Attributes:
        damage: Relative squared drift of the outputs, never less than that of a larger format.
        label: Measured, or estimated: the error of the site's own outputs, weighed by gradients,
            times a gain measured with other formats of the site (or, if there was no time for
            any, at the nearest site that was measured).
        batches: Batches behind it; 0 when estimated.
    """

    damage: float
    label: Label
    batches: int


@dataclass(frozen=True, slots=True)
class DamageTable:
    """Damage of every format on the menu.

    Attributes:
        entries: Site name -> format -> entry.
        seconds: What measuring took.
    """

    entries: Mapping[str, Mapping[Format, Entry]]
    seconds: float

    def damage(self, formats: Mapping[str, Format]) -> float:
        """Predicted relative squared drift of a whole plan: the sum over its sites."""
        return sum(self.entries[site][fmt].damage for site, fmt in formats.items())

    def count(self, label: Label) -> int:
        """Entries with that label."""
        return sum(e.label is label for row in self.entries.values() for e in row.values())


class _Bench:
    """Measures entries until a deadline, one in each thread at a time.

    Every torch operator runs on one thread, so that no value depends on how many threads there are.
    """

    def __init__(self, elastic: ElasticModel, workers: int, deadline: float) -> None:
        self.suffix = Suffix(elastic)
        self.deadline = deadline
        self.samples: Samples = {}
        self.ledger: Ledger | None = None
        self.progress: Progress = silent
        self._twins = [self.suffix, *(self.suffix.twin() for _ in range(workers - 1))]
        self._idle: SimpleQueue[Suffix] = SimpleQueue()
        for twin in self._twins:
            self._idle.put(twin)

    def over(self) -> bool:
        return time.monotonic() >= self.deadline

    def load(self, batch: Batch, number: int) -> None:
        self.suffix.load(batch)
        self._follow()
        energy = self.suffix.energy()
        if not math.isfinite(energy) or (number == 0 and energy == 0):
            raise T3CError(
                f"the model's outputs are all zero or not finite on calibration batch {number}; "
                "drift relative to them means nothing"
            )

    def local(self, slopes: Mapping[fx.Node, Sequence[Tensor]], menu: Menu) -> dict[Job, float]:
        """`Suffix.local` of every entry, on the loaded batch."""
        self.suffix.weigh(slopes)
        self._follow()
        found: dict[Job, float] = {}
        with ThreadPoolExecutor(len(self._twins)) as pool:
            rows = pool.map(self._local, menu, menu.values())
            for done, (site, row) in enumerate(zip(menu, rows, strict=True)):
                self.progress("measuring layers", done, len(menu))
                found |= {(site, fmt): x for fmt, x in zip(menu[site], row, strict=True)}
        self.suffix.weigh({})
        self._follow()
        return found

    def measure(self, number: int, jobs: Sequence[Job], done: int, total: int) -> None:
        """Measure entries on the loaded batch, as many as the deadline allows."""
        energy = self.suffix.energy()
        waiting = iter(jobs)
        with ThreadPoolExecutor(len(self._twins)) as pool:
            running: dict[Future[float], Job] = {}
            while True:
                while len(running) <= len(self._twins) and not self.over():
                    job = next(waiting, None)
                    if job is None:
                        break
                    running[pool.submit(self._drift, *job)] = job
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._keep(running.pop(future), number, future.result(), energy)
                    done += 1
                    self.progress("measuring damage", done, total)

    def _follow(self) -> None:
        for twin in self._twins[1:]:
            twin.follow(self.suffix)

    @contextmanager
    def _one(self) -> Generator[Suffix]:
        """A twin that no other thread uses."""
        suffix = self._idle.get()
        try:
            yield suffix
        finally:
            self._idle.put(suffix)

    def _drift(self, site: str, fmt: Format) -> float:
        with self._one() as suffix, suffix.elastic.using({site: fmt}):
            return suffix.drift(site)

    def _local(self, site: str, formats: Sequence[Format]) -> list[float]:
        found: list[float] = []
        with self._one() as suffix:
            for fmt in formats:
                with suffix.elastic.using({site: fmt}):
                    found.append(suffix.local(site))
        return found

    def _keep(self, job: Job, number: int, drift: float, energy: float) -> None:
        _check(*job, drift)
        if self.ledger is None:
            self.samples.setdefault(job, {})[number] = (drift, energy)
        else:
            self.ledger.add(*job, number, drift, energy)


def measure(
    elastic: ElasticModel,
    batches: Sequence[Batch],
    menu: Menu,
    *,
    seconds: float = math.inf,
    progress: Progress = silent,
    workers: int | None = None,
    table: Path | None = None,
) -> DamageTable:
    """Measure as many entries on as many batches as fit in `seconds`; estimate the rest.

    First one format of every site on the first batch; its time decides how many formats and
    batches follow: at least two formats on one batch before more batches, up to four batches
    before every format. With `table`, every format on one batch comes before the next batch, and
    a later call goes on where this one ended, however it ended.

    Args:
        elastic: The calibrated model.
        batches: Flat inputs, as the graph takes them.
        menu: What may become of each site.
        seconds: Time to spend; it is overrun by an entry, and by the local errors if too short.
        progress: Told after each entry.
        workers: Entries measured at the same time, each on one thread; None: torch's threads.
        table: File of the table; see `t3c.controller.ledger`. None: nothing is written.

    Raises:
        T3CError: No batches, the original outputs are all zero, a damage is not finite, or `table`
            is damaged or of something else.
        ValueError: `workers` is below 1.
    """
    if not batches:
        raise T3CError("the damage table needs at least one batch of inputs; got none")
    if workers is not None and workers < 1:
        raise ValueError(f"{workers} workers; the damage table needs at least 1")
    start = time.monotonic()
    with one_thread_each() as threads, ExitStack() as stack:
        ledger = None
        if table is not None:
            origin = Origin.of(elastic, batches, menu)
            ledger = stack.enter_context(Ledger(table, origin, menu))
            if ledger.done is not None:
                return DamageTable(_entries(menu, {}, ledger.done), time.monotonic() - start)
        bench = _Bench(elastic, threads if workers is None else workers, start + seconds)
        bench.progress = progress
        if ledger is not None:
            bench.ledger, bench.samples = ledger, ledger.samples
        local: dict[Job, float] = {}
        bench.load(batches[0], 0)
        if math.isfinite(seconds):
            seen = look(elastic, batches[0], list(menu), range(PROBES))
            local = bench.local({call.node: call.slopes for call in seen}, menu)
        _fill(bench, batches, list(_levels(menu)))
        found = {job: Reading.of(samples) for job, samples in bench.samples.items()}
        whole = all(
            job in found and found[job].batches == len(batches)
            for job in ((site, fmt) for site, row in menu.items() for fmt in row)
        )
        if ledger is not None and whole:
            ledger.finish()
    progress("measuring damage", 1, 1)
    return DamageTable(_entries(menu, local, found), time.monotonic() - start)


def _fill(bench: _Bench, batches: Sequence[Batch], levels: Sequence[list[Job]]) -> None:
    """Measure until everything is measured or the time is over; batch 0 is loaded."""
    first = levels[0] if levels else []
    depth, width, begin = len(levels), len(batches), time.monotonic()
    if bench.ledger is None:
        all_jobs = sum(map(len, levels)) * width
        bench.measure(0, first, 0, all_jobs if bench.deadline == math.inf else len(first))
        depth, width = _extent(depth, width, time.monotonic() - begin, bench.deadline)
    jobs = [job for level in levels[:depth] for job in level]
    for number, batch in enumerate(batches[:width]):
        todo = [job for job in jobs if number not in bench.samples.get(job, {})]
        if bench.over():
            break
        if number and todo:
            bench.load(batch, number)
        bench.measure(number, todo, (number + 1) * len(jobs) - len(todo), width * len(jobs))


def _extent(levels: int, batches: int, one: float, deadline: float) -> tuple[int, int]:
    """How many levels to measure on how many batches, when one level of one batch takes `one`."""
    left = deadline - time.monotonic()
    if not math.isfinite(left):
        return levels, batches
    passes = max(0.0, left) / max(one, 1e-9) + 1
    depth = min(levels, max(2, int(passes / min(batches, 4))))
    return depth, max(1, min(batches, int(passes / max(1, depth))))


def _levels(menu: Menu) -> Iterator[list[Job]]:
    """Entries in the order of their worth: a middle format of each site, its smallest, the others.

    Within a level, sites come in strides, so that a level cut short still covers the whole depth.
    """
    names = list(menu)
    stride = max(1, math.isqrt(len(names)))
    spread = [name for first in range(stride) for name in names[first::stride]]
    ranked = {name: _ranked(menu[name]) for name in names}
    for level in range(max((len(r) for r in ranked.values()), default=0)):
        yield [(name, ranked[name][level]) for name in spread if level < len(ranked[name])]


def _ranked(formats: Sequence[Format]) -> list[Format]:
    """The formats of one site, most telling first."""
    low = [fmt for fmt in formats if not isinstance(fmt, Dense)]
    if not low:
        return list(formats)
    middle = low[len(low) // 2]
    first = [middle] + [fmt for fmt in (low[-1], low[0]) if fmt != middle]
    first = list(dict.fromkeys(first))
    rest = [fmt for fmt in formats if fmt not in first]
    return [*first, *rest]


def _entries(
    menu: Menu, local: Mapping[Job, float], found: Mapping[Job, Reading]
) -> dict[str, dict[Format, Entry]]:
    """Measured entries, estimates for the others, and no damage that falls with rank."""
    known = {
        site: [
            (local.get((site, f), 0.0), found[site, f].damage) for f in row if (site, f) in found
        ]
        for site, row in menu.items()
    }
    names = list(menu)
    out: dict[str, dict[Format, Entry]] = {}
    for place, site in enumerate(names):
        points = known[site]
        if not points:  # no time for this site: the nearest measured one stands in
            near = sorted(names, key=lambda n: abs(names.index(n) - place))
            points = next((known[n] for n in near if known[n]), [])
        row: dict[Format, Entry] = {}
        floor = 0.0
        for fmt in menu[site]:
            seen = found.get((site, fmt))
            value = _scaled(local[site, fmt], points) if seen is None else seen.damage
            _check(site, fmt, value)
            floor = max(floor, value)
            label = Label.ESTIMATED if seen is None else Label.MEASURED
            row[fmt] = Entry(floor, label, 0 if seen is None else seen.batches)
        out[site] = row
    return out


def _check(site: str, fmt: Format, damage: float) -> None:
    """Refuse a damage that is no number: it would pass every comparison, or none."""
    if not math.isfinite(damage):
        raise T3CError(
            f"site {site!r} as {fmt}: the damage is not finite ({damage}); its weights or factors "
            "overflow on the calibration data: check them, or leave the layer out by exclude"
        )


def _scaled(error: float, points: Sequence[tuple[float, float]]) -> float:
    """Damage at a local error, from measured (local error, damage) pairs.

    Straight lines between them in log-log, constant gain outside; without any, the error itself.
    """
    usable = sorted((e, d) for e, d in points if 0 < e < math.inf and 0 < d < math.inf)
    if error <= 0.0:
        return 0.0
    if not usable or not error < math.inf:
        return error
    errors, damages = [e for e, _ in usable], [d for _, d in usable]
    if error <= errors[0]:
        return damages[0] / errors[0] * error
    if error >= errors[-1]:
        return damages[-1] / errors[-1] * error
    return float(np.exp(np.interp(np.log(error), np.log(errors), np.log(damages))))
