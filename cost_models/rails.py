"""Power of a Jetson's supply rails, and its sum over time.

The module has an INA3221 that measures voltage and current of three rails. NVIDIA's boards name
one rail that feeds everything, or several that do so together. A thread samples the power and adds
it up: between two samples power is taken to change evenly.
Source: Linux, Documentation/hwmon/ina3221; jetson-stats 4, jtop.power (mW); NVIDIA Jetson Linux
Developer Guide, Platform Power and Performance, "Jetson ... series: INA3221".
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path
from typing import Any, final

from t3c.core.errors import TargetError

HWMON = Path("/sys/class/hwmon")
WHOLE = (
    ("VDD_IN",),  # Orin NX and Nano, Xavier NX
    ("POM_5V_IN",),  # Nano
    ("VIN_SYS_5V0", "VDD_GPU_SOC", "VDD_CPU_CV"),  # AGX Orin; memory hangs on VIN_SYS_5V0
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)
"""Rails that together feed a module, none of which feeds another."""
STALE_S = 2.0
"""A last sample that is older means that the thread does not come to sample."""
FAILURES = 5
"""Samples in a row that fail before the meter does: a bus may be busy for one."""


def feeding(names: Collection[str]) -> tuple[str, ...]:
    """The rails whose sum is the module's power.

    Args:
        names: Rails that are measured.

    Raises:
        TargetError: They are of no known board.
    """
    for rails in WHOLE:
        if set(rails) <= set(names):
            return rails
    known = "; ".join(" + ".join(rails) for rails in WHOLE)
    raise TargetError(
        f"rails {', '.join(sorted(names))}: which of them feed the module is not known; known are "
        f"{known}"
    )


class AbstractPower(ABC):
    """Power of the whole module, now."""

    @abstractmethod
    def watts(self) -> float:
        """Watts.

        Raises:
            TargetError: It cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of what was opened."""


@final
class HwmonPower(AbstractPower):
    """INA3221 by Linux's files: ``in1_label``, ``in1_input`` (mV), ``curr1_input`` (mA)."""

    def __init__(self, root: Path = HWMON) -> None:
        """Find the rails.

        Args:
            root: Folder of the monitors.

        Raises:
            TargetError: There is none, of no known board, or no right to read one.
        """
        found = rails_of(root)
        if not found:
            raise TargetError("no INA3221 on this machine: it is no Jetson, or has no such sensor")
        self.names = feeding(found)
        self._files = [found[name] for name in self.names]
        self.watts()

    def watts(self) -> float:
        """See `AbstractPower`."""
        return sum(_number(volts) * _number(amperes) for volts, amperes in self._files) / 1e6

    def close(self) -> None:
        """Nothing is open."""


def rails_of(root: Path = HWMON) -> dict[str, tuple[Path, Path]]:
    """Name of a rail -> its files of voltage and current."""
    found = {}
    for chip in sorted(root.glob("hwmon*")):
        name = chip / "name"
        if not name.exists() or name.read_text().strip() != "ina3221":
            continue
        for label in sorted(chip.glob("in*_label")):
            number = label.name.removeprefix("in").removesuffix("_label")
            pair = chip / f"in{number}_input", chip / f"curr{number}_input"
            if all(path.exists() for path in pair):  # the sum of shunts has no current
                found[label.read_text().strip()] = pair
    return found


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError as error:
        raise TargetError(f"no right to read {path}: {permit(path)}") from error
    except (OSError, ValueError) as error:
        raise TargetError(f"{path} cannot be read: {error}") from error


def permit(path: Path) -> str:
    """How to get the right to read a file of a monitor."""
    return f"sudo chmod a+r {path}, until the next start"


@final
class JtopPower(AbstractPower):
    """The service of jetson-stats, which needs no rights of ours."""

    def __init__(self, library: Any = None, interval_s: float = 0.5) -> None:
        """Connect.

        Args:
            library: The module ``jtop``; None: the installed one.
            interval_s: Seconds between its samples.

        Raises:
            TargetError: The package is missing, its service does not run, or the board is unknown.
        """
        try:
            module: Any = import_module("jtop") if library is None else library
        except ImportError as error:
            raise TargetError("no package jetson-stats") from error
        try:
            self._client: Any = module.jtop(interval=interval_s)
            self._client.start()
        except Exception as error:  # the package's own kinds, and those of sockets
            raise TargetError(
                f"jetson-stats does not answer: {error}; sudo systemctl start jtop, and be in the "
                "group jtop"
            ) from error
        self.names = feeding(self._milliwatts())

    def watts(self) -> float:
        """See `AbstractPower`."""
        found = self._milliwatts()
        return sum(found[name] for name in self.names) / 1e3

    def close(self) -> None:
        """Disconnect."""
        self._client.close()

    def _milliwatts(self) -> dict[str, float]:
        """Rail -> mW; the rail that feeds all stands apart from the others, with its name."""
        power = self._client.power
        if not power:
            raise TargetError("jetson-stats reports no power of this board")
        rails = {str(name): float(rail["power"]) for name, rail in power["rail"].items()}
        total = power["tot"]
        return rails | ({str(total["name"]): float(total["power"])} if "name" in total else {})


@final
class Integral:
    """Joules since it was made, from samples of a thread of its own.

    Attributes:
        period_s: Seconds between samples; one that comes late counts for as long as it took.
    """

    def __init__(
        self,
        power: AbstractPower,
        period_s: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        start: bool = True,
    ) -> None:
        """Begin at 0.

        Args:
            power: What is added up.
            period_s: Seconds between samples.
            clock: Seconds, rising.
            start: Whether a thread samples; else `sample` is called by hand.

        Raises:
            TargetError: The power cannot be read.
        """
        self.period_s = period_s
        self._power, self._clock = power, clock
        self._watts, self._at, self._joules = power.watts(), clock(), 0.0
        self._failed: TargetError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="rails")
        if start:
            self._thread.start()

    def sample(self) -> None:
        """Read the power, and add what was used since the last sample."""
        watts, now = self._power.watts(), self._clock()
        self._joules += 0.5 * (watts + self._watts) * (now - self._at)
        self._watts, self._at = watts, now

    def read(self) -> float:
        """Joules up to the last sample.

        Raises:
            TargetError: Sampling failed, or does not get to run.
        """
        if self._failed is not None:
            raise self._failed
        if (late := self._clock() - self._at) > STALE_S + 2 * self.period_s:
            raise TargetError(
                f"the last sample of power is {late:.3g} s old, every {self.period_s:g} s one was "
                "expected: the sampling thread does not run; run less beside it"
            )
        return self._joules

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._power.close()

    def _run(self) -> None:
        failures = 0
        while not self._stop.wait(self.period_s):
            try:
                self.sample()
                failures = 0
            except TargetError as error:
                failures += 1
                if failures == FAILURES:
                    self._failed = error
                    return
