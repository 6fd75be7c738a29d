"""Tables for terminals: profiles, layers, the conversion report, measured times, checks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from t3c.core.certificate import MEASURED, PAPER, Certificate, Observed, Proxy
from t3c.core.gate import GateRow
from t3c.core.manifest import CompiledProfile
from t3c.core.objective import Objective
from t3c.core.profile import Profile, Timing
from t3c.core.report import ConversionReport
from t3c.runtime.storage import Storage
from t3c.runtime.transfer import PackedFile

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
            UNKNOWN if timing is None else _kind(timing),
            UNKNOWN if energy is None else f"{number(energy.joules * 1e3)} ({energy.label})",
            number(None if cert.proxy is None else cert.proxy.paper.value),
            number(None if cert.proxy is None else _estimate(cert.proxy)),
            _sound(cert),
            number(_ninety(cert)),
            *_observed(cert.observed),
            UNKNOWN if parity is None else f"{number(parity.relative)} ({parity.where})",
        )
    return table


def _kind(timing: Timing) -> str:
    """Where a time comes from, with the 90 % interval of a prediction, milliseconds."""
    if timing.low_s is None or timing.high_s is None:
        return str(timing.label)
    return f"{timing.label}, {number(timing.low_s * 1e3)}-{number(timing.high_s * 1e3)}"


def _sound(certificate: Certificate) -> str:
    """The proven bound, with its status where that is another."""
    found = certificate.sound
    if found is None:
        return UNKNOWN
    return number(found.value) + ("" if found.status == "bound" else f" ({found.status})")


def _observed(found: Observed | None) -> tuple[str, str, str, str]:
    """Observed drift against the original, and against the largest profile."""
    if found is None:
        return UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN
    other = found.teacher
    return (
        number(found.p95),
        number(found.relative),
        number(None if other is None else other.p95),
        number(None if other is None else other.relative),
    )


def _ninety(certificate: Certificate) -> float | None:
    """The calibrated bound that holds for 90 % of inputs."""
    bound = None if certificate.calibrated is None else certificate.calibrated.at(0.9)
    return None if bound is None else bound.value


_COSTS = ("MMAC", "size MB", "RAM MB", "p50 ms", "p95 ms", "time", "energy mJ")
_DRIFT = (
    "proxy",
    "estimate",
    "sound",
    "90 % bound",
    "observed p95",
    "relative",
    "p95 to max",
    "relative to max",
    "parity",
)


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


def draws(chain: Sequence[CompiledProfile], title: str = "Disjoint draws, each alone") -> Table:
    """One row per profile and draw: its bounds, what they cover of the others, drift, labels."""
    known = [(c.profile.name, f) for c in chain if (f := c.profile.certificate.calibrated)]
    levels = [b.level for b in known[0][1].bounds] if known else []
    heads = [head for v in levels for head in (f"{v:.0%} bound", "covers")]
    table = _table(title, ("profile", "draw"), (*heads, "drift", "same label", "right", "inputs"))
    for name, found in known:
        for draw in found.draws:
            pairs = zip(draw.bounds, draw.covered, strict=True)
            cells = [c for bound, share in pairs for c in (number(bound), _percent(share))]
            right = _percent(draw.agreement), _percent(draw.accuracy)
            table.add_row(
                name, draw.sha256[:8], *cells, number(draw.drift), *right, str(draw.inputs)
            )
    return table


def shifted(chain: Sequence[CompiledProfile], title: str = "Bounds on shifted data") -> Table:
    """One row per profile: what the bounds cover of other data; nothing is promised there."""
    known = [(c.profile.name, f) for c in chain if (f := c.profile.certificate.calibrated)]
    levels = [b.level for b in known[0][1].bounds] if known else []
    heads = [f"{v:.0%} bound covers" for v in levels]
    table = _table(title, ("profile",), (*heads, "drift", "inputs"))
    for name, found in known:
        if (other := found.shifted) is not None:
            cells = [_percent(share) for share in other.coverage]
            table.add_row(name, *cells, number(other.drift), str(other.inputs))
    return table


def labels(chain: Sequence[CompiledProfile], title: str = "Labels, against the original") -> Table:
    """One row per profile: changed labels, confidence and its calibration, all and by margin.

    By margin: from the quarter of inputs with the least margin to that with the most.
    """
    known = [(c.profile.name, f) for c in chain if (f := c.profile.certificate.labels)]
    heads = ("flips %", "by margin", "of max %", "confidence", "by margin", "right %", "ECE %")
    table = _table(title, ("profile",), (*heads, "by margin", "inputs"))
    for name, found in known:
        gaps = [m.ece for m in found.margins if m.ece is not None]
        table.add_row(
            name,
            _percent(found.flips),
            "/".join(f"{100 * m.flips:.1f}" for m in found.margins),
            _percent(found.teacher),
            f"{100 * found.confidence:+.2f}",
            _changes([m.confidence for m in found.margins]),
            _pair(found.accuracy, found.original_accuracy),
            _pair(found.ece, found.original_ece),
            _changes(gaps) if gaps else UNKNOWN,
            str(found.inputs),
        )
    return table


def certified(
    chain: Sequence[CompiledProfile], title: str = "Labels that a bound fixes, and that flip"
) -> Table:
    """One row per profile: shares of inputs that a bound certifies, and that flip all the same."""
    known = [(c.profile.name, f) for c in chain if (f := c.profile.certificate.labels)]
    checks = [c.level for c in known[0][1].checked] if known else []
    names = ["sound" if level is None else f"{level:.0%}" for level in checks]
    heads = [h for name in names for h in (f"{name} certifies %", "and flip %")]
    table = _table(title, ("profile",), (*heads, "inputs"))
    for name, found in known:
        cells = [c for k in found.checked for c in (_percent(k.certified), _percent(k.flips))]
        table.add_row(name, *cells, str(found.inputs))
    return table


def _changes(values: Sequence[float]) -> str:
    """Changes of shares, in points."""
    return "/".join(f"{100 * v:+.1f}" for v in values)


def per_input(
    chain: Sequence[CompiledProfile], title: str = "Bounds for each input, from its outputs"
) -> Table:
    """One row per profile: the median of bound over drift at every level, and behind what data."""
    known = [(c.profile.name, f) for c in chain if (f := c.profile.certificate.per_input)]
    levels = known[0][1].levels if known else ()
    table = _table(title, ("profile",), (*(f"{v:.0%} bound / drift" for v in levels), "inputs"))
    for name, found in known:
        table.add_row(name, *(number(r) for r in found.ratios), str(found.inputs))
    return table


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.2f}"


def _pair(now: float | None, before: float | None) -> str:
    """A share of the profile's, and the original's in brackets."""
    return UNKNOWN if now is None else f"{_percent(now)} ({_percent(before)})"


def certificates(chain: Sequence[CompiledProfile]) -> list[Table]:
    """Every table that these profiles have something to say in."""
    found = [c.profile.certificate for c in chain]
    made = []
    if any(f.calibrated for f in found):
        made.append(bounds(chain))
    if any(f.calibrated and f.calibrated.draws for f in found):
        made.append(draws(chain))
    if any(f.calibrated and f.calibrated.shifted for f in found):
        made.append(shifted(chain))
    if any(f.labels for f in found):
        made += [labels(chain), certified(chain)]
    if any(f.per_input for f in found):
        made.append(per_input(chain))
    return made


def storage(found: Storage, title: str = "Bytes of the weight file") -> Table:
    """One row per profile, and one for what the largest does not read."""
    table = _table(title, ("profile",), ("alone", "reads", "front of file", "share"))
    for row in found.profiles:
        table.add_row(
            row.name,
            f"{row.alone:,}",
            f"{row.reads:,}",
            f"{row.front:,}",
            f"{row.front / found.file:.0%}",
        )
    table.add_section()
    more = sum(found.duplicates.values())
    table.add_row(
        f"not in {found.profiles[-1].name}", "", f"{more:,}", "", f"{more / found.file:.0%}"
    )
    table.add_row("whole file", "", "", f"{found.file:,}", "")
    return table


def packed(rows: Sequence[PackedFile], title: str = "Packed for transfer") -> Table:
    """One row per file with both byte counts, and the sum."""
    table = _table(title, ("file",), ("bytes", "packed", "share"))
    total = PackedFile("all", sum(r.bytes for r in rows), sum(r.packed for r in rows))
    for row in (*rows, total):
        table.add_row(
            row.path, f"{row.bytes:,}", f"{row.packed:,}", f"{row.packed / max(1, row.bytes):.0%}"
        )
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
