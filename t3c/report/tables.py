"""Tables for terminals: profiles, layers, the conversion report, measured times, checks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from t3c.core.certificate import MEASURED, PAPER, Certificate, Proxy
from t3c.core.gate import GateRow
from t3c.core.manifest import CompiledProfile
from t3c.core.objective import Objective
from t3c.core.profile import Profile, Timing
from t3c.core.report import ConversionReport

UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class BenchRow:
    """Measured times of one profile.

    Attributes:
        profile: Its name.
        timing: Median and 95th percentile.
        p90_s: 90th percentile, seconds.
        fastest_s: Fastest call, seconds.
    """

    profile: str
    timing: Timing
    p90_s: float
    fastest_s: float

    def to_json(self) -> dict[str, object]:
        """Plain data, seconds."""
        return {
            "profile": self.profile,
            "p50_s": self.timing.p50_s,
            "p90_s": self.p90_s,
            "p95_s": self.timing.p95_s,
            "fastest_s": self.fastest_s,
            "calls": self.timing.calls,
            "threads": self.timing.threads,
            "label": str(self.timing.label),
        }


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits; ``-`` where nothing is known."""
    if value is None:
        return UNKNOWN
    return "inf" if value == math.inf else f"{value:.{digits}g}"


def profiles(chain: Sequence[CompiledProfile] | Sequence[Profile], title: str = "") -> Table:
    """One row per profile: what it costs, and what is known of its drift."""
    table = _table(title, ("profile",), _COSTS + _DRIFT)
    for item in chain:
        profile = item.profile if isinstance(item, CompiledProfile) else item
        parity = item.parity if isinstance(item, CompiledProfile) else None
        cert, timing, energy = profile.certificate, profile.latency, profile.energy
        table.add_row(
            profile.name,
            number(profile.macs / 1e6),
            number(profile.storage_bytes / 1e6),
            number(profile.ram_bytes / 1e6),
            number(None if timing is None else timing.p50_s * 1e3),
            number(None if timing is None else timing.p95_s * 1e3),
            UNKNOWN if timing is None else str(timing.label),
            UNKNOWN if energy is None else f"{number(energy.joules * 1e3)} ({energy.label})",
            number(None if cert.proxy is None else cert.proxy.paper.value),
            number(None if cert.proxy is None else _estimate(cert.proxy)),
            _sound(cert),
            number(_ninety(cert)),
            number(None if cert.observed is None else cert.observed.p95),
            number(None if cert.observed is None else cert.observed.relative),
            UNKNOWN if parity is None else f"{number(parity.relative)} ({parity.where})",
        )
    return table


def _sound(certificate: Certificate) -> str:
    """The proven bound, with its status where that is another."""
    found = certificate.sound
    if found is None:
        return UNKNOWN
    return number(found.value) + ("" if found.status == "bound" else f" ({found.status})")


def _ninety(certificate: Certificate) -> float | None:
    """The calibrated bound that holds for 90 % of inputs."""
    bound = None if certificate.calibrated is None else certificate.calibrated.at(0.9)
    return None if bound is None else bound.value


_COSTS = ("MMAC", "size MB", "RAM MB", "p50 ms", "p95 ms", "time", "energy mJ")
_DRIFT = ("proxy", "estimate", "sound", "90 % bound", "observed p95", "relative", "parity")


def layers(chain: Sequence[Profile], title: str = "Format of every layer") -> Table:
    """One row per layer, one column per profile."""
    table = _table(title, ("layer", *(profile.name for profile in chain)), ())
    for site in chain[0].formats:
        table.add_row(site, *(str(profile.formats[site]) for profile in chain))
    return table


def drift(chain: Sequence[CompiledProfile], title: str = "Where drift comes from") -> Table:
    """One row per layer, largest first in the smallest profile: its share of every profile's drift.

    Shares are those of the sharpest proxy that the profiles state; squares, where it adds squares.
    """
    known = [(c.profile.name, p) for c in chain if (p := c.profile.certificate.proxy) is not None]
    names = [name for name, _ in known]
    if not known:
        return _table(f"{title}: no proxy in this artifact", ("layer",), ())
    variant = sharpest(known[0][1])
    shares = [dict(found.ranked(variant)) for _, found in known]
    table = _table(f"{title} ({variant} proxy)", ("layer",), [f"{name} %" for name in names])
    for site in shares[0]:
        table.add_row(site, *(number(100 * share[site]) for share in shares))
    totals = [number(found.estimates[variant].value) for _, found in known]
    table.add_row("all layers, ||dz||", *totals)
    return table


def sharpest(proxy: Proxy) -> str:
    """The variant that follows observed drift best of those that were computed."""
    return next(v for v in (MEASURED, "kronecker-rss", PAPER) if v in proxy.estimates)


def _estimate(proxy: Proxy) -> float:
    """What drift to expect: the sharpest proxy, where the paper's is a sum of worst cases."""
    return proxy.estimates[sharpest(proxy)].value


def conversion(report: ConversionReport, title: str = "Conversion report") -> Table:
    """One row per layer: rewritten, kept or skipped, and why."""
    table = _table(title, ("layer", "op", "outcome", "reason", "pass"), ())
    for row in report.rows:
        table.add_row(row.where, row.op, row.outcome, row.reason, row.rule)
    return table


def gate(rows: Sequence[GateRow], title: str = "The gate") -> Table:
    """One row per layer and format: predicted and measured times, costs, and what followed."""
    counted = [row for row in rows if row.objective is not Objective.LATENCY]
    costs = (f"cost, {counted[0].objective.unit}", "of dense") if counted else ()
    table = _table(
        title,
        ("layer", "format"),
        ("predicted us", "of dense", "measured us", "of dense", "at most", *costs, "kept"),
    )
    for row in rows:
        seen = row.measured
        cells = [row.cost, row.cost / row.dense_cost] if counted else []
        table.add_row(
            row.site,
            str(row.format),
            number(row.predicted_s * 1e6),
            number(row.predicted_s / row.dense_predicted_s),
            number(None if seen is None else seen.seconds * 1e6),
            number(None if seen is None else seen.ratio),
            number(None if seen is None else seen.high),
            *map(number, cells),
            "yes" if row.kept else "no",
        )
    return table


def bench(rows: Sequence[BenchRow], title: str = "Measured, calls interleaved") -> Table:
    """One row per profile: percentiles of one call, and the ratio to the last row."""
    table = _table(
        title, ("profile",), ("p50 ms", "p90 ms", "p95 ms", "fastest ms", "of last", "calls")
    )
    for row in rows:
        table.add_row(
            row.profile,
            number(row.timing.p50_s * 1e3, 4),
            number(row.p90_s * 1e3, 4),
            number(row.timing.p95_s * 1e3, 4),
            number(row.fastest_s * 1e3, 4),
            f"{row.timing.p50_s / rows[-1].timing.p50_s:.2f}x",
            str(row.timing.calls),
        )
    return table


def bounds(chain: Sequence[CompiledProfile], title: str = "Calibrated drift bounds") -> Table:
    """One row per profile: the bound of every level, and how far thirds of the data confirm it."""
    known = [(c.profile.name, c.profile.certificate.calibrated) for c in chain]
    levels = [b.level for _, found in known[:1] if found is not None for b in found.bounds]
    heads = [head for v in levels for head in (f"{v:.0%} bound", "of max", "covered")]
    table = _table(title, ("profile",), (*heads, "inputs"))
    for name, found in known:
        if found is None:
            continue
        cells: list[str] = []
        for b in found.bounds:
            covered = "/".join(f"{share:.0%}" for share in b.coverage) or UNKNOWN
            cells += [number(b.value), number(b.teacher), covered]
        table.add_row(name, *cells, str(found.inputs))
    return table


def plain(rows: Sequence[Mapping[str, object]], title: str = "") -> Table:
    """Any rows with the same keys; the keys are the headings."""
    table = _table(title, tuple(rows[0]) if rows else (), ())
    for row in rows:
        table.add_row(*(number(v, 4) if isinstance(v, float) else str(v) for v in row.values()))
    return table


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title or None, title_justify="left", show_edge=False, pad_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table
