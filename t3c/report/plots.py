"""Pictures: quality against a cost, calls against time, predictions (needs matplotlib)."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from t3c.core.budget import LEVEL, drift_bound
from t3c.core.errors import TargetError
from t3c.core.profile import Profile

MARKERS = "osD^vP*X<>"


@dataclass(frozen=True, slots=True)
class Point:
    """One measured configuration.

    Attributes:
        name: For example the profile; written beside the point.
        cost: Less is better, for example p50 in milliseconds.
        quality: More is better, for example top-1 accuracy.
    """

    name: str
    cost: float
    quality: float


@dataclass(frozen=True, slots=True)
class Series:
    """Points that belong together; joined by a line if `chain`."""

    name: str
    points: tuple[Point, ...]
    chain: bool = False


@dataclass(frozen=True, slots=True)
class Axes:
    """Labels, with units."""

    cost: str
    quality: str
    title: str = ""
    log_cost: bool = False


@dataclass(frozen=True, slots=True)
class Trace:
    """Calls in the order of time, all under one setting.

    Attributes:
        name: For the legend.
        seconds: When each call ended.
        ms: How long it took.
        profiles: Name of the profile of each; drawn below, where `follow` is set.
        follow: Whether to draw the profiles.
    """

    name: str
    seconds: tuple[float, ...]
    ms: tuple[float, ...]
    profiles: tuple[str, ...] = ()
    follow: bool = False


def dominated(series: Sequence[Series]) -> list[tuple[str, str, str]]:
    """Points that another one beats: (series, point, what beats it).

    A point is beaten if another costs no more, is no worse, and is better in one of both.
    """
    everything = [(group, point) for group in series for point in group.points]
    lines: list[tuple[str, str, str]] = []
    for group, point in everything:
        for other_group, other in everything:
            no_worse = other.cost <= point.cost and other.quality >= point.quality
            if no_worse and (other.cost, other.quality) != (point.cost, point.quality):
                lines.append((group.name, point.name, f"{other_group.name} {other.name}"))
                break
    return lines


def pareto(series: Sequence[Series], path: str | os.PathLike[str], axes: Axes) -> Path:
    """Draw quality against cost.

    Args:
        series: What to draw; dominated points are drawn hollow, not hidden.
        path: File to write; its ending picks the format (svg, png, pdf).
        axes: Labels.

    Returns:
        The path.

    Raises:
        TargetError: matplotlib is not installed.
    """
    matplotlib, figure_module = _matplotlib()
    figure = figure_module.Figure(figsize=(7.5, 5), layout="constrained")
    plot = figure.subplots()
    beaten = {(group, point) for group, point, _ in dominated(series)}
    for i, group in enumerate(series):
        colour = f"C{i}"
        if group.chain:
            ordered = sorted(group.points, key=lambda point: point.cost)
            xs, ys = [p.cost for p in ordered], [p.quality for p in ordered]
            plot.plot(xs, ys, color=colour, linewidth=1, zorder=1)
        for j, point in enumerate(group.points):
            hollow = (group.name, point.name) in beaten
            plot.plot(
                [point.cost],
                [point.quality],
                MARKERS[i % len(MARKERS)],
                color=colour,
                markerfacecolor="white" if hollow else colour,
                label=group.name if j == 0 else None,
                linestyle="none",
            )
            plot.annotate(
                point.name, (point.cost, point.quality), (4, 4), textcoords="offset points", size=8
            )
    if axes.log_cost:
        plot.set_xscale("log")
    plot.set(xlabel=axes.cost, ylabel=axes.quality, title=axes.title)
    plot.margins(x=0.12)  # room for the names beside the points
    plot.grid(visible=True, linewidth=0.3)
    plot.legend(fontsize=8)
    return _saved(matplotlib, figure, path)


@dataclass(frozen=True, slots=True)
class Drift:
    """Drift of a profile, with what is known around it.

    Attributes:
        name: Of the profile.
        p50_ms: Median of one call; None: unknown, and left out of the first panel.
        p95_ms: Recorded 95th percentile: the end of the bar to the right.
        megabytes: Stored weights.
        millijoules: Of one call, as recorded or estimated; None: unknown.
        mean: Mean drift that was observed.
        p95: Its 95th percentile over inputs: the end of the bar upwards.
        bound: A calibrated bound; None: none, or not finite.
    """

    name: str
    p50_ms: float | None
    p95_ms: float | None
    megabytes: float
    millijoules: float | None
    mean: float
    p95: float
    bound: float | None = None


def drifts(profiles: Sequence[Profile], level: float = LEVEL) -> list[Drift]:
    """What certificates and records say, for `chain`; profiles without observed drift are left out.

    Args:
        profiles: Of one artifact.
        level: Of the calibrated bound.
    """
    found = []
    for profile in profiles:
        seen, timing = profile.certificate.observed, profile.latency
        if seen is None:
            continue
        bound = drift_bound(profile, "calibrated", level)
        found.append(
            Drift(
                profile.name,
                None if timing is None else timing.p50_s * 1e3,
                None if timing is None else timing.p95_s * 1e3,
                profile.storage_bytes / 1e6,
                profile.energy_mj,
                seen.mean,
                max(seen.mean, seen.p95),
                bound if bound < math.inf else None,
            )
        )
    return found


def chain(rows: Sequence[Drift], path: str | os.PathLike[str], title: str = "") -> Path:
    """Draw drift against latency, bytes and, where every profile has one, energy, with intervals.

    Dots are medians of time and means of drift; bars reach to the 95th percentiles (of calls, of
    inputs); triangles are calibrated bounds.

    Args:
        rows: Profiles.
        path: File to write; its ending picks the format (svg, png, pdf).
        title: Over the picture.

    Returns:
        The path.

    Raises:
        TargetError: matplotlib is not installed.
        ValueError: There is nothing to draw.
    """
    if not rows:
        raise ValueError("no profile has observed drift; lower again, or certify the artifact")
    matplotlib, figure_module = _matplotlib()
    energies = [row.millijoules for row in rows if row.millijoules is not None]
    panels = 3 if len(energies) == len(rows) else 2
    figure = figure_module.Figure(figsize=(5 * panels, 4.5), layout="constrained")
    left, right, *further = figure.subplots(1, panels, sharey=True)
    timed = [row for row in rows if row.p50_ms is not None and row.p95_ms is not None]
    late = [(row.p95_ms or 0.0) - (row.p50_ms or 0.0) for row in timed]
    _interval(left, timed, [row.p50_ms or 0.0 for row in timed], late)
    _interval(right, rows, [row.megabytes for row in rows], None)
    left.set(xlabel="one call, ms (median to p95)", ylabel="drift (mean to p95 of inputs)")
    right.set(xlabel="stored weights, MB")
    for plot in further:
        _interval(plot, rows, energies, None)
        plot.set(xlabel="one call, mJ (as recorded or estimated)")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return _saved(matplotlib, figure, path)


def _interval(
    plot: Any, rows: Sequence[Drift], costs: Sequence[float], late: Sequence[float] | None
) -> None:
    """One panel: dots with bars, joined; bounds where there are any."""
    means = [row.mean for row in rows]
    up = [row.p95 - row.mean for row in rows]
    zero = [0.0] * len(rows)
    across = None if late is None else [zero, late]
    bars: dict[str, Any] = {"fmt": "o-", "linewidth": 1, "elinewidth": 0.8, "capsize": 2}
    plot.errorbar(costs, means, yerr=[zero, up], xerr=across, label="observed", **bars)
    bounds = [(x, row.bound) for x, row in zip(costs, rows, strict=True) if row.bound is not None]
    if bounds:
        xs, ys = zip(*bounds, strict=True)
        plot.plot(xs, ys, "^", color="C1", markersize=4, linestyle="none", label="calibrated bound")
    for x, row in zip(costs, rows, strict=True):
        plot.annotate(row.name, (x, row.mean), (4, 4), textcoords="offset points", size=8)
    plot.grid(visible=True, linewidth=0.3)
    plot.margins(x=0.1)


class Guess(Protocol):
    """A prediction beside what was measured; seconds."""

    @property
    def measured(self) -> float:
        """The truth."""
        ...

    @property
    def predicted(self) -> float:
        """The same, predicted."""
        ...

    @property
    def low(self) -> float:
        """Lower end of its interval."""
        ...

    @property
    def high(self) -> float:
        """Upper end of its interval."""
        ...


def predictions(
    kinds: Mapping[str, Sequence[Guess]], path: str | os.PathLike[str], title: str = ""
) -> Path:
    """Draw predicted against measured time, a panel each kind; bars are intervals.

    Args:
        kinds: Name -> predictions of things that the model had not seen.
        path: File to write; its ending picks the format (svg, png, pdf).
        title: Over the picture.

    Returns:
        The path.

    Raises:
        TargetError: matplotlib is not installed.
        ValueError: There is nothing to draw.
    """
    if not any(kinds.values()):
        raise ValueError("there are no predictions to draw; measure more layers and networks first")
    matplotlib, figure_module = _matplotlib()
    figure = figure_module.Figure(figsize=(5 * len(kinds), 4.5), layout="constrained")
    (panels,) = figure.subplots(1, len(kinds), squeeze=False)
    for plot, (name, guesses) in zip(panels, kinds.items(), strict=True):
        x = [g.measured * 1e3 for g in guesses]
        y = [g.predicted * 1e3 for g in guesses]
        ends = [
            [max(0.0, g.predicted - g.low) * 1e3 for g in guesses],
            [max(0.0, g.high - g.predicted) * 1e3 for g in guesses],
        ]
        held = sum(g.low <= g.measured <= g.high for g in guesses)
        plot.errorbar(x, y, yerr=ends, fmt="o", markersize=2, elinewidth=0.5, alpha=0.6)
        both = (min(x + y), max(x + y))
        plot.plot(both, both, color="black", linewidth=0.8)
        plot.set(xscale="log", yscale="log", xlabel="measured median, ms", ylabel="predicted, ms")
        plot.set_title(f"{len(guesses)} {name}; intervals hold {held / len(guesses):.1%}", size=9)
        plot.grid(visible=True, linewidth=0.3)
    figure.suptitle(title, fontsize=10)
    return _saved(matplotlib, figure, path)


def trace(
    traces: Sequence[Trace],
    path: str | os.PathLike[str],
    *,
    budget_ms: float,
    loads: Sequence[tuple[float, float]] = (),
    names: Sequence[str] = (),
    title: str = "",
) -> Path:
    """Draw calls against time, the budget, and below which profile each call ran.

    Args:
        traces: What to draw.
        path: File to write; its ending picks the format (svg, png, pdf).
        budget_ms: A line.
        loads: Times (begin, end) to shade, in which something else loaded the machine.
        names: All profiles, smallest first.
        title: Over the picture.

    Returns:
        The path.

    Raises:
        TargetError: matplotlib is not installed.
    """
    matplotlib, figure_module = _matplotlib()
    figure = figure_module.Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for plot in (above, below):
        for begin, end in loads:
            plot.axvspan(begin, end, color="0.9", zorder=0)
        plot.grid(visible=True, linewidth=0.3)
    for i, one in enumerate(traces):
        dots: dict[str, Any] = {"color": f"C{i}", "linestyle": "none", "markersize": 2}
        above.plot(one.seconds, one.ms, MARKERS[0], label=one.name, rasterized=True, **dots)
        if one.follow:
            places = [names.index(name) for name in one.profiles]
            below.step(one.seconds, places, where="post", color=f"C{i}", linewidth=1)
    above.axhline(budget_ms, color="black", linewidth=1, label="budget")
    above.set(ylabel="one call, ms", title=title, ylim=(0, 3 * budget_ms))
    above.legend(fontsize=8, loc="upper right")
    below.set(xlabel="time, s (grey: the machine is loaded)", ylabel="profile")
    below.set_yticks(range(len(names)), names, size=8)
    return _saved(matplotlib, figure, path)


def _matplotlib() -> tuple[Any, Any]:
    """Matplotlib and its figures, without a screen.

    Raises:
        TargetError: It is not installed.
    """
    try:
        matplotlib: Any = import_module("matplotlib")
        figure_module: Any = import_module("matplotlib.figure")
    except ImportError as error:
        raise TargetError(
            "plots need matplotlib; install it with: pip install t3c[plot]"
        ) from error
    return matplotlib, figure_module


def _saved(matplotlib: Any, figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write a picture; the same one has the same bytes every time."""
    with matplotlib.rc_context({"svg.hashsalt": "t3c"}):
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
    return Path(path)
