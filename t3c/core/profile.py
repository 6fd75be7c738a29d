"""Profiles: a format for every site, labelled costs, and the nested chain of them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from t3c.core.certificate import Certificate
from t3c.core.formats import Format, at_most

Percentile = Literal["p50", "p95"]


class Label(StrEnum):
    """Where a number comes from."""

    MEASURED = "measured"
    PREDICTED = "predicted"
    ESTIMATED = "estimated"


@dataclass(frozen=True, slots=True)
class Timing:
    """Time of one call on one device.

    Attributes:
        p50_s: Median, seconds.
        p95_s: 95th percentile, seconds.
        label: Measured on the device, or predicted by a cost model.
        calls: Timed calls behind it; None when predicted.
        threads: Threads that the call used.
        low_s: Where 90 % of such predictions turn out to lie, seconds; None: measured, or unknown.
        high_s: The upper end.
    """

    p50_s: float
    p95_s: float
    label: Label
    calls: int | None = None
    threads: int = 1
    low_s: float | None = None
    high_s: float | None = None

    def __post_init__(self) -> None:
        """Refuse disorder, infinity and NaN."""
        if not 0.0 < self.p50_s <= self.p95_s < math.inf:
            raise ValueError(f"need 0 < p50_s <= p95_s < inf, got {self.p50_s} and {self.p95_s}")
        if self.low_s is None and self.high_s is None:
            return
        low, high = self.low_s or math.nan, self.high_s or math.nan
        if not 0.0 < low <= self.p50_s <= high < math.inf or self.label is Label.MEASURED:
            raise ValueError(
                "an interval belongs to a prediction, 0 < low_s <= p50_s <= high_s < inf; got "
                f"{self.low_s}, {self.p50_s}, {self.high_s} ({self.label})"
            )

    def limit_s(self, percentile: Percentile = "p95") -> float:
        """What a budget compares, seconds: never less than the upper end of an interval."""
        seconds = self.p95_s if percentile == "p95" else self.p50_s
        return seconds if self.high_s is None else max(seconds, self.high_s)


@dataclass(frozen=True, slots=True)
class Energy:
    """Energy of one call, joules.

    Attributes:
        joules: Energy of one inference.
        label: Measured by a platform counter, or estimated; never mixed.
    """

    joules: float
    label: Label


@dataclass(frozen=True, slots=True)
class Profile:
    """One compiled choice: the format of every site, and what it costs.

    Attributes:
        name: ``tiny``, ``p1``, ... ``max``; one that measured slower than ``max`` is left out.
        formats: Site name -> format.
        macs: Multiply-adds of one inference at the example inputs.
        storage_bytes: Bytes of the weights that this profile reads (files, not RAM).
        ram_bytes: Weights plus activations plus workspace while it runs.
        latency: Time of one call; None until predicted or measured.
        energy: Energy of one call; None where nothing states it.
        certificate: How far the outputs may drift.
    """

    name: str
    formats: Mapping[str, Format]
    macs: int
    storage_bytes: int
    ram_bytes: int
    latency: Timing | None = None
    energy: Energy | None = None
    certificate: Certificate = field(default_factory=Certificate)

    @property
    def latency_ms(self) -> float | None:
        """What a latency budget compares at p95, milliseconds; None if unknown."""
        return None if self.latency is None else self.latency.limit_s() * 1e3

    @property
    def energy_mj(self) -> float | None:
        """Energy of one call in millijoules; None if nothing states it."""
        return None if self.energy is None else self.energy.joules * 1e3


@dataclass(frozen=True, slots=True)
class ProfileChain:
    """Profiles from the smallest to the largest; every site's format never falls along it."""

    profiles: tuple[Profile, ...]

    def __post_init__(self) -> None:
        """Refuse an empty or non-nested chain."""
        if not self.profiles:
            raise ValueError("a chain needs at least one profile")
        for small, large in zip(self.profiles, self.profiles[1:], strict=False):
            if small.formats.keys() != large.formats.keys():
                raise ValueError(f"profiles {small.name!r} and {large.name!r} name different sites")
            for site, fmt in small.formats.items():
                if not at_most(fmt, large.formats[site]):
                    raise ValueError(
                        f"site {site!r} falls from {fmt} in {small.name!r} to "
                        f"{large.formats[site]} in {large.name!r}; a chain must be nested"
                    )

    def __iter__(self) -> Iterator[Profile]:
        """Smallest first."""
        return iter(self.profiles)

    def __len__(self) -> int:
        """Number of profiles."""
        return len(self.profiles)
