"""Which layers to measure: shapes of real networks and of none, each in several formats."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2
from t3c.core.sites import ConvSite, LinearSite, Site
from t3c.cost_models.base import Row

Draw = np.random.Generator

LINEAR = (
    (384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (768, 3072), (192, 192),
    (768, 192), (192, 768), (256, 256), (1024, 256), (256, 1024), (512, 512), (2048, 512),
    (512, 2048), (1000, 2048), (1000, 512), (320, 320), (640, 2560), (2560, 640), (100, 384),
)  # fmt: skip
"""(outputs, inputs) of linear layers: MiniLM, BERT, ViT, Swin, heads of ResNets."""
ROWS = (1, 2, 4, 8, 16, 32, 49, 64, 128, 197)
"""Batches of vectors, and tokens of sentences and images."""
CONV = (
    (3, 64, 7, 2, 112), (3, 32, 3, 1, 64), (3, 32, 7, 2, 96), (64, 64, 3, 1, 56),
    (64, 64, 1, 1, 56), (64, 256, 1, 1, 28), (256, 64, 1, 1, 28), (32, 32, 3, 1, 28),
    (64, 128, 3, 2, 28),
    (128, 128, 3, 1, 28), (128, 512, 1, 1, 14), (512, 128, 1, 1, 14), (128, 256, 3, 2, 14),
    (256, 256, 3, 1, 14), (256, 1024, 1, 1, 14), (256, 512, 1, 2, 14), (256, 512, 3, 2, 14),
    (512, 512, 3, 1, 7), (512, 2048, 1, 1, 7), (96, 96, 3, 1, 20), (48, 96, 3, 2, 24),
    (64, 128, 1, 2, 28), (32, 64, 1, 2, 28), (80, 160, 3, 2, 18), (32, 64, 3, 1, 40),
)  # fmt: skip
"""(inputs, outputs, window, stride, side) of convolutions: ResNets and plain networks."""
MOST_MACS = 240_000_000
"""Multiply-adds of a layer, at most, so that no layer takes most of the time."""
FREE = 0.4
"""Share of shapes that are drawn freely, log-uniformly, rather than near a real layer's."""


def design(
    count: int, step: int, *, four: bool = True, codes: bool = True, threads: int = 1, seed: int = 0
) -> list[tuple[Row, str]]:
    """(layer in a format, group): rows of one group are formats of one shape.

    Linear layers and convolutions take turns, so that any prefix has some of each.

    Args:
        count: How many rows, at least; whole groups.
        step: The target's rank step.
        four: Whether the target has kernels of 4-bit weights.
        codes: Whether its convolutions read and write codes on fixed grids.
        threads: Threads of a call.
        seed: Of the drawn shapes.
    """
    rng = np.random.default_rng(seed)
    found: dict[Row, str] = {}
    number = 0
    while len(found) < count:
        linear = number % 9 < 5
        site = _fit(_linear if linear else _conv, rng)
        group = f"{'linear' if linear else 'conv'}{number}"
        static = codes and not linear and rng.random() < 0.8
        for fmt in formats(site, step, rng, four=four):
            found.setdefault(Row(site, fmt, threads, static), group)
        number += 1
    return list(found.items())


def _fit(draw: Callable[[Draw], Site], rng: Draw) -> Site:
    """A drawn site that is not too large."""
    while (site := draw(rng)).macs(Dense(8)) > MOST_MACS:
        pass
    return site


def _log(rng: Draw, low: float, high: float) -> int:
    return round(float(np.exp(rng.uniform(np.log(low), np.log(high)))))


def _linear(rng: Draw) -> LinearSite:
    if rng.random() < FREE:
        rows, n, k = _log(rng, 1, 220), _log(rng, 32, 3072), _log(rng, 32, 3072)
        return LinearSite("", n, k, rows, True)
    n, k = LINEAR[int(rng.integers(len(LINEAR)))]
    rows = ROWS[int(rng.integers(len(ROWS)))]
    if rng.random() < 0.3:  # sizes that no tile divides
        n, k = n + int(rng.integers(-17, 18)), k + int(rng.integers(-17, 18))
    return LinearSite("", n, k, rows, True)


def _conv(rng: Draw) -> ConvSite:
    if rng.random() < FREE:
        fan_in, fan_out, side = _log(rng, 16, 512), _log(rng, 16, 512), _log(rng, 6, 64)
        window, stride = (1, 3, 3, 5)[int(rng.integers(4))], int(rng.integers(1, 3))
    else:
        fan_in, fan_out, window, stride, side = CONV[int(rng.integers(len(CONV)))]
        if rng.random() < 0.3:
            side += int(rng.integers(-3, 4))
    batch = (1, 1, 1, 2, 4)[int(rng.integers(5))]
    pad = window // 2
    out = (side + 2 * pad - window) // stride + 1
    site = ConvSite(
        name="",
        out_channels=fan_out,
        in_channels=fan_in,
        kernel=(window, window),
        stride=(stride, stride),
        padding=(pad, pad),
        dilation=(1, 1),
        batch=batch,
        in_size=(side, side),
        out_size=(out, out),
        bias=True,
    )
    return site if site.macs(Dense(8)) <= MOST_MACS else replace(site, batch=1)


def formats(site: Site, step: int, rng: Draw, *, four: bool) -> list[Format]:
    """Dense and a few others: ranks all over the range, 4 bits for linear layers."""

    def rank(full: int, low: float, high: float) -> int:
        share = float(rng.uniform(low, high))
        return max(1, min(full // step, round(share * full / step))) * step

    found: list[Format] = [Dense(8)]
    full = site.full_rank
    if full < step:
        return found
    if isinstance(site, LinearSite):
        found += [LowRank(rank(full, 0.02, 0.3)), LowRank(rank(full, 0.3, 0.8))]
        if four:
            found.append(Dense(4))
            if rng.random() < 0.5:
                found.append(LowRank(rank(full, 0.05, 0.6), 4))
    elif site.pointwise:
        found += [LowRank(rank(full, 0.02, 0.3)), LowRank(rank(full, 0.3, 0.8))]
    else:
        for low, high in ((0.05, 0.35), (0.35, 0.8)):
            share = float(rng.uniform(low, high))
            sides = [
                max(1, round(share * c / step)) * step
                for c in (site.in_channels, site.out_channels)
            ]
            found.append(
                Tucker2(
                    min(sides[0], site.in_channels // step * step),
                    min(sides[1], site.out_channels // step * step),
                )
            )
        if rng.random() < 0.15:
            found.append(CP(rank(full, 0.2, 0.9)))
    return list(dict.fromkeys(found))
