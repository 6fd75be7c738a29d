"""What energy a device used: counters of the processor or the GPU, else counted operations.

Every meter has ``read()``, joules that rise, so that the governor takes any of them. Counters tick:
`per_call` begins on a tick and goes on for so many that one more or less does not matter.
"""

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, final

from t3c.core.codes import GROUP
from t3c.core.errors import TargetError
from t3c.core.profile import Label
from t3c.cost_models.base import Row, Work
from t3c.cost_models.energy import EnergyModel
from t3c.cost_models.rails import (
    HWMON,
    AbstractPower,
    HwmonPower,
    Integral,
    JtopPower,
    permit,
    rails_of,
)

POWERCAP = Path("/sys/class/powercap")
LEAST_PERIODS = 10
"""Updates of a counter that a measurement takes at least."""
_DOMAINS = ("package", "dram")
"""Zones that together are a processor with its memory; cores are part of their package."""


class AbstractMeter(ABC):
    """Joules since the meter was made.

    Attributes:
        name: For messages.
        label: ``measured`` or ``estimated``.
        period_s: Seconds between updates of the counter; 0: every reading is fresh.
    """

    name: ClassVar[str]
    label: ClassVar[Label]
    period_s: ClassVar[float]

    @abstractmethod
    def read(self) -> float:
        """Joules so far; never less than before."""


@final
@dataclass(slots=True)
class RaplMeter(AbstractMeter):
    """Running average power limit counters: processor packages and their memory.

    They count everything that runs on the machine. A counter that passed its range begins again at
    0; it must be read at least once in between, which takes minutes at full power.
    Source: Linux, Documentation/power/powercap; Intel SDM 3B, 16.10.3: updated about every ms.

    Attributes:
        zones: Folders of the counters.
    """

    name: ClassVar[str] = "rapl"
    label: ClassVar[Label] = Label.MEASURED
    period_s: ClassVar[float] = 1e-3

    zones: tuple[Path, ...]
    _last: list[int] = field(default_factory=list)
    _ranges: list[int] = field(default_factory=list)
    _total_uj: int = 0

    def __post_init__(self) -> None:
        """Begin at 0.

        Raises:
            TargetError: There is no counter, or no right to read it.
        """
        if not self.zones:
            raise TargetError("no RAPL counter on this machine; energy can only be estimated")
        self._last = [counter(zone) for zone in self.zones]
        self._ranges = [int((z / "max_energy_range_uj").read_text()) for z in self.zones]

    def read(self) -> float:
        """See `AbstractMeter`."""
        for i, zone in enumerate(self.zones):
            now = counter(zone)
            step = now - self._last[i]
            self._total_uj += step if step >= 0 else step + self._ranges[i]
            self._last[i] = now
        return self._total_uj / 1e6


def rapl_zones(root: Path = POWERCAP) -> tuple[Path, ...]:
    """Folders of the counters of packages and memory, as Linux lists them."""
    found = []
    for zone in sorted(root.glob("intel-rapl:*")):
        name = zone / "name"
        if (zone / "energy_uj").exists() and name.exists():
            if name.read_text().startswith(_DOMAINS):
                found.append(zone)
    return tuple(found)


def counter(zone: Path) -> int:
    """Microjoules that a counter shows.

    Raises:
        TargetError: There is no right to read it.
    """
    try:
        return int((zone / "energy_uj").read_text())
    except PermissionError as error:
        raise TargetError(f"no right to read {zone}/energy_uj: {_permit(zone)}") from error


def _permit(zone: Path) -> str:
    """How to get the right to read a counter."""
    return (
        f"Linux lets root alone read it (it can tell secrets of other programs apart); where only "
        f"you use this machine: sudo chmod a+r {zone}/energy_uj, until the next start"
    )


@final
class NvmlMeter(AbstractMeter):
    """The energy counter of NVIDIA GPUs, Volta and later.

    Source: NVML reference, nvmlDeviceGetTotalEnergyConsumption: mJ since the driver was loaded; the
    power behind it is sampled about every 100 ms.
    """

    name: ClassVar[str] = "nvml"
    label: ClassVar[Label] = Label.MEASURED
    period_s: ClassVar[float] = 0.1

    def __init__(self, device: int = 0, library: Any = None) -> None:
        """Open a GPU.

        Args:
            device: Its number.
            library: The module ``pynvml``; None: the installed one.

        Raises:
            TargetError: The module, the driver or the counter is missing.
        """
        try:
            self._nvml: Any = import_module("pynvml") if library is None else library
        except ImportError as error:
            raise TargetError("NVML needs the package nvidia-ml-py: pip install it") from error
        try:
            self._nvml.nvmlInit()
            self._device = self._nvml.nvmlDeviceGetHandleByIndex(device)
            self._start = self._count()
        except self._nvml.NVMLError as error:
            raise TargetError(f"GPU {device} has no energy counter: {error}") from error

    def read(self) -> float:
        """See `AbstractMeter`."""
        return (self._count() - self._start) / 1e3

    def _count(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device))


class _RailsMeter(AbstractMeter):
    """Rails of a Jetson: everything on the module, sampled by a thread."""

    label: ClassVar[Label] = Label.MEASURED

    def __init__(self, power: AbstractPower) -> None:
        """Begin to sample."""
        self._sum = Integral(power, self.period_s)

    def read(self) -> float:
        """See `AbstractMeter`."""
        return self._sum.read()

    def close(self) -> None:
        """Stop sampling."""
        self._sum.close()


@final
class HwmonMeter(_RailsMeter):
    """The INA3221 itself.

    Source of the period: reading a rail takes two transfers of I2C, some tenths of a ms each; the
    chip converts in 1.1 ms a channel, averaged as the board's driver sets it.
    """

    name: ClassVar[str] = "rails"
    period_s: ClassVar[float] = 0.01

    def __init__(self, root: Path = HWMON) -> None:
        """Find the rails; see `HwmonPower`."""
        super().__init__(HwmonPower(root))


@final
class JtopMeter(_RailsMeter):
    """The service of jetson-stats. Source of the period: what we ask of it; it samples for all."""

    name: ClassVar[str] = "jtop"
    period_s: ClassVar[float] = 0.5

    def __init__(self, library: Any = None) -> None:
        """Connect; see `JtopPower`."""
        super().__init__(JtopPower(library, self.period_s))


@final
@dataclass(slots=True)
class EstimatedMeter(AbstractMeter):
    """Counted operations and bytes, times the cost of each; the caller tells what ran.

    Attributes:
        model: Joules of an operation and of a byte, with their source.
    """

    name: ClassVar[str] = "operations and bytes"
    label: ClassVar[Label] = Label.ESTIMATED
    period_s: ClassVar[float] = 0.0

    model: EnergyModel = field(default_factory=EnergyModel)
    _joules: float = 0.0

    def estimate(self, layers: Sequence[Row], rest: Work) -> float:
        """Joules of one call of a network.

        Args:
            layers: Its elastic layers.
            rest: Everything else; its bytes count as moved, parameters too.
        """
        inside = math.fsum(
            self.model.site(row.site.macs(row.format), weight_bytes(row)) for row in layers
        )
        return inside + self.model.rest(rest, 0)

    def count(self, layers: Sequence[Row], rest: Work, calls: int = 1) -> None:
        """Note that a network ran.

        Raises:
            ValueError: `calls` is negative.
        """
        if calls < 0:
            raise ValueError(f"calls is {calls}; a network runs 0 times or more")
        self._joules += calls * self.estimate(layers, rest)

    def read(self) -> float:
        """See `AbstractMeter`."""
        return self._joules


def weight_bytes(row: Row) -> int:
    """Bytes of codes (or floats) and scales that a layer reads; padding does not count."""
    elements = row.site.elements(row.format)
    if row.format.bits == 4:
        return elements // 2 + 2 * elements // GROUP
    return elements * row.format.bits // 8


def best_meter(root: Path = POWERCAP, hwmon: Path = HWMON) -> AbstractMeter:
    """What this machine has, best first: its counters, its rails, a GPU's, else the estimate."""
    if (found := processor_meter(root, hwmon)) is not None:
        return found
    try:
        return NvmlMeter()
    except TargetError:
        return EstimatedMeter()


def processor_meter(root: Path = POWERCAP, hwmon: Path = HWMON) -> AbstractMeter | None:
    """What sees the processor work: its counters, or a Jetson's rails; None: nothing does."""
    zones = rapl_zones(root)
    makers: tuple[Callable[[], AbstractMeter], ...] = (
        lambda: RaplMeter(zones),
        JtopMeter,
        lambda: HwmonMeter(hwmon),
    )
    for make in makers:
        try:
            return make()
        except TargetError:
            continue
    return None


@dataclass(frozen=True, slots=True)
class Access:
    """Whether a kind of meter works here.

    Attributes:
        name: Of the meter.
        works: Whether it can be read.
        found: What is there.
        advice: What to do; empty if nothing.
    """

    name: str
    works: bool
    found: str
    advice: str = ""


def access(root: Path = POWERCAP, hwmon: Path = HWMON) -> list[Access]:
    """Every kind of meter, and what it lacks."""
    found = []
    zones = rapl_zones(root)
    closed = [zone for zone in zones if not os.access(zone / "energy_uj", os.R_OK)]
    if not zones:
        why = "none: a virtual machine, or a processor without them"
        found.append(Access("rapl", False, why, "energy is estimated, and labelled so"))
    elif closed:
        found.append(Access("rapl", False, f"{closed[0]}: no right to read", _permit(closed[0])))
    else:
        found.append(
            Access("rapl", True, ", ".join((z / "name").read_text().strip() for z in zones))
        )
    try:
        NvmlMeter()
        found.append(Access("nvml", True, "GPU 0"))
    except TargetError as error:
        found.append(Access("nvml", False, "none", str(error)))
    return [*found, _rails_access(hwmon)]


def _rails_access(root: Path) -> Access:
    """Jetson's rails, by the library or by Linux's files."""
    try:
        power: AbstractPower = JtopPower()
        power.close()
        return Access("rails", True, "jetson-stats")
    except TargetError as error:
        library = str(error)
    rails = rails_of(root)
    if not rails:
        return Access("rails", False, "none: no Jetson", f"on a Jetson: {library}")
    closed = [p for pair in rails.values() for p in pair if not os.access(p, os.R_OK)]
    if closed:
        return Access("rails", False, f"{closed[0]}: no right to read", permit(closed[0]))
    try:
        return Access("rails", True, " + ".join(HwmonPower(root).names))
    except TargetError as error:
        return Access("rails", False, ", ".join(rails), str(error))


def per_call(
    meter: AbstractMeter,
    run: Callable[[], object],
    *,
    error: float = 0.01,
    most_s: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Joules of one call, on average; of all that the meter sees.

    Args:
        meter: What measures.
        run: One call.
        error: Share of the energy that a tick of the counter may be.
        most_s: Seconds to go on at most; a slow counter then costs precision, a tenth at most.
        clock: Seconds, rising.

    Raises:
        ValueError: `error` is no share.
        TargetError: The counter stands still, or is too slow for `most_s`.
    """
    if not 0 < error < 1:
        raise ValueError(f"error is {error}; write a share such as 0.01")
    if most_s < LEAST_PERIODS * meter.period_s:
        raise TargetError(
            f"{meter.name} is updated every {meter.period_s:g} s; {most_s:g} s are too short for "
            f"it, {LEAST_PERIODS * meter.period_s:g} s are the least"
        )
    window = min(most_s, meter.period_s / error)
    first = _tick(meter, clock) if meter.period_s else meter.read()
    start, calls = clock(), 0
    while calls == 0 or clock() - start < window:
        run()
        calls += 1
    used = meter.read() - first
    if meter.period_s and used <= 0:
        raise TargetError(f"{meter.name}: the counter stood still for {clock() - start:.3g} s")
    return used / calls


def _tick(meter: AbstractMeter, clock: Callable[[], float]) -> float:
    """Wait until the counter moves; a hundred periods at most."""
    before, limit = meter.read(), clock() + 100 * meter.period_s
    while (now := meter.read()) == before and clock() < limit:
        pass
    return now
