"""A device of invented speed and a clock that only calls move: traces for the governor."""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from t3c.core.formats import Dense, LowRank
from t3c.core.profile import Energy, Label, Profile, Timing

SECONDS = (4.9e-3, 5.3e-3, 6.0e-3, 6.8e-3, 7.3e-3, 7.5e-3, 7.8e-3, 8.0e-3)
"""Of the profiles of MiniLM (examples/demo_minilm.py): the upper ones lie close together."""
NAMES = ("tiny", "p1", "p2", "p3", "p4", "p5", "p6", "max")
RECORDED = tuple(seconds * 1.03 for seconds in SECONDS)
"""A recorded p95 is a little above what a call takes."""
SPREAD = 0.015
"""Standard deviation of the logarithm of a call's time on a quiet machine."""

Load = Callable[[float], float]


def quiet(now: float) -> float:
    """Nothing else runs."""
    return 1.0


def step(factor: float, begin: float, end: float) -> Load:
    """Another program takes its share for a while."""
    return lambda now: factor if begin <= now < end else 1.0


def ramp(factor: float, begin: float, top: float, end: float) -> Load:
    """The device gets hot, and cools down again."""

    def load(now: float) -> float:
        share = min((now - begin) / (top - begin), (end - now) / (end - top), 1.0)
        return 1.0 + (factor - 1.0) * max(0.0, share)

    return load


def square(factor: float, period: float) -> Load:
    """On for half of each period, off for the other."""
    return lambda now: factor if now % period < period / 2 else 1.0


def wander(seed: int, sigma: float, tau: float, seconds: float, over: Load = quiet) -> Load:
    """A host whose own speed wanders: an Ornstein-Uhlenbeck process of the logarithm.

    Args:
        seed: Of the process.
        sigma: Its standard deviation.
        tau: Its correlation time, seconds.
        seconds: How long it goes on.
        over: What else slows the device down.
    """
    draw, step = random.Random(seed), 0.01
    keep = math.exp(-step / tau)
    values = [draw.gauss(0.0, sigma)]
    while len(values) * step < seconds + 10.0:
        values.append(keep * values[-1] + math.sqrt(1.0 - keep**2) * draw.gauss(0.0, sigma))
    return lambda now: over(now) * math.exp(values[int(now / step)])


@dataclass
class Plant:
    """The device; a session for the governor.

    Attributes:
        load: Time -> factor on every call's time.
        spikes: Share of calls that take two to six times as long, whatever the profile.
        slices: Time -> (share of calls that wait, milliseconds that they wait): another program
            gets the processor in between.
        seconds: What calls take on a quiet device.
        watts: Power; None: the profiles state no energy.
    """

    load: Load = quiet
    spikes: float = 0.0
    slices: Callable[[float], tuple[float, float]] = lambda now: (0.0, 0.0)
    seconds: tuple[float, ...] = SECONDS
    watts: Callable[[float], float] = lambda now: 10.0
    states_energy: bool = False
    seed: int = 0
    now: float = 0.0
    joules: float = 0.0
    log: list[tuple[float, int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.profiles = tuple(self._profile(i) for i in range(len(self.seconds)))
        self.profile = self.profiles[-1]

    def _profile(self, i: int) -> Profile:
        last = i == len(self.seconds) - 1
        recorded = self.seconds[i] * 1.03
        energy = Energy(recorded * 10.0, Label.MEASURED) if self.states_energy else None
        return Profile(
            "max" if last else NAMES[i],
            {"fc": Dense(8) if last else LowRank(16 * (i + 1))},
            macs=100 + i,
            storage_bytes=1_000_000 * (i + 1),
            ram_bytes=2_000_000 * (i + 1),
            latency=Timing(self.seconds[i], recorded, Label.MEASURED, 100),
            energy=energy,
        )

    @property
    def variants(self) -> Mapping[str, Callable[..., Any]]:
        """Profiles as functions."""
        named = {p.name: self._call(i) for i, p in enumerate(self.profiles)}
        return MappingProxyType(named)

    def set_profile(self, name: str) -> Profile:
        """As a session's."""
        self.profile = next(p for p in self.profiles if p.name == name)
        return self.profile

    def read(self) -> float:
        """As a meter's: joules."""
        return self.joules

    def clock(self) -> float:
        """Seconds."""
        return self.now

    def take(self, i: int) -> float:
        """Let a call of profile i happen; its seconds."""
        draw = self.random
        seconds = self.seconds[i] * self.load(self.now) * math.exp(draw.gauss(0.0, SPREAD))
        share, wait = self.slices(self.now)
        if draw.random() < share:
            seconds += wait * 1e-3 * draw.uniform(0.5, 1.5)
        if draw.random() < self.spikes:
            seconds *= draw.uniform(2.0, 6.0)
        self.now += seconds
        self.joules += seconds * self.watts(self.now)
        self.log.append((self.now, i, seconds))
        return seconds

    def _call(self, i: int) -> Callable[..., str]:
        def call(*args: Any, **kwargs: Any) -> str:
            self.take(i)
            return self.profiles[i].name

        return call

    def over(self, budget: float, begin: float = 0.0, end: float = math.inf) -> float:
        """Share of the calls between two times that took longer."""
        found = [seconds > budget for now, _, seconds in self.log if begin <= now < end]
        return sum(found) / len(found)

    def switches(self, begin: float = 0.0, end: float = math.inf) -> int:
        """How often the profile changed between two times."""
        held = [i for now, i, _ in self.log if begin <= now < end]
        return sum(a != b for a, b in pairwise(held))

    def reversals(self, within: float = 10.0) -> int:
        """Switches against the direction of the one before, so soon after it."""
        moves = [(b[0], b[1] > a[1]) for a, b in pairwise(self.log) if a[1] != b[1]]
        return sum(a[1] != b[1] and b[0] - a[0] <= within for a, b in pairwise(moves))

    def back(self, profile: int, since: float) -> float:
        """Seconds from a moment to the first later call of a profile; infinite if none."""
        return next(
            (now - since for now, i, _ in self.log if now >= since and i == profile), math.inf
        )
