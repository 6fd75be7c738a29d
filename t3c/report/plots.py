"""Pareto plots: quality against a cost, every series in one picture (needs matplotlib)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from t3c.core.errors import TargetError

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
    try:
        matplotlib: Any = import_module("matplotlib")
        figure_module: Any = import_module("matplotlib.figure")
    except ImportError as error:
        raise TargetError(
            "plots need matplotlib; install it with: pip install t3c[plot]"
        ) from error
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
    with matplotlib.rc_context({"svg.hashsalt": "t3c"}):  # the same bytes every time
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
    return Path(path)
