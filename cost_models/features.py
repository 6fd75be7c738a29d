"""What a learned model sees of a layer in a format: the work it counts, and what kind it is.

Every number in `GROWING` rises, or stays, with rank, bits, rows, batch, inputs and outputs, so that
a model that rises with each of them is monotone in all of these. What does not (multiply-adds over
bytes, how well a tile divides a size) appears as the two numbers it is made of: bytes beside
multiply-adds, sizes rounded up to the tile beside sizes.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from t3c.core.codes import GROUP
from t3c.core.formats import CP, Dense, LowRank, Tucker2
from t3c.core.sites import LinearSite
from t3c.cost_models.base import Row
from t3c.cost_models.roofline import counts_of
from t3c.targets.base import Roofline

Numbers = NDArray[np.float64]
KINDS = ("convolution", "codes", "factorized", "window", "stride")
"""What a layer is; a model may treat each value as it likes."""
GROWING = (
    "prior", "padded_macs", "macs", "bytes", "rows", "stored", "read", "rank_in", "rank_out",
    "bits", "batch",
)  # fmt: skip
"""Numbers with which time never falls."""
FEW = 4
"""Linear layers of so many rows at most have kernels that wait for weights."""
FALLING = ("threads",)
"""Numbers with which time never rises."""
NAMES = (*KINDS, *GROWING, *FALLING)
CONSTRAINTS = (*(0 for _ in KINDS), *(1 for _ in GROWING), *(-1 for _ in FALLING))


def kind_of(row: Row) -> str:
    """Which kernels compute a row: those of one kind share the constants of their prior."""
    name = type(row.format).__name__.lower()
    if isinstance(row.site, LinearSite):
        return f"linear {name} {row.format.bits}{' few' if row.site.rows <= FEW else ''}"
    window = "1x1" if row.site.pointwise else "kxk"
    return f"conv {name} {window}{' codes' if row.codes else ''}"


def work(row: Row, constants: Roofline) -> Numbers:
    """What the prior is a weighted sum of: (calls, quantized, multiply-adds, stored, bytes, f32).

    Sizes are rounded up to the tile; threads share all but calls and bytes.
    """
    return counts_of(row, constants)


def features(rows: Sequence[Row], prior: Numbers, constants: Roofline) -> Numbers:
    """One line for each row, columns as `NAMES`.

    Args:
        rows: Layers in formats.
        prior: Seconds of each by the roofline.
        constants: Of the target: its tile.
    """
    lines = [_line(row, p, constants) for row, p in zip(rows, prior, strict=True)]
    return np.array(lines, np.float64).reshape(len(rows), len(NAMES))


def _line(row: Row, prior: float, constants: Roofline) -> list[float]:
    site, fmt = row.site, row.format
    whole = counts_of(replace(row, format=_eight(row), threads=1), constants)
    bits = fmt.bits / 8 * (1 + 4 / GROUP if fmt.bits == 4 else 1)
    if isinstance(site, LinearSite):
        kind = [0.0, 0.0, 0.0, 0.0]
        rows, stored, read, batch = site.rows, site.rows * site.n, site.rows * site.k, site.rows
        ends = (site.k, site.n)
    else:
        kind = [1.0, float(row.codes), float(site.kernel[0]), float(site.stride[0])]
        rows = site.batch * site.out_size[0] * site.out_size[1]
        stored, batch = rows * site.out_channels, site.batch
        read = site.batch * site.in_size[0] * site.in_size[1] * site.in_channels
        ends = (site.in_channels, site.out_channels)
    factorized = [Dense, LowRank, Tucker2, CP].index(type(fmt))
    ranks = [min(r, full) for r, full in zip(fmt.ranks, ends, strict=True)]
    growing = [
        prior, whole[2], site.macs(fmt), site.elements(fmt) * bits, rows, stored, read, *ranks,
    ]  # fmt: skip
    return [
        *kind[:2],
        float(factorized),
        *kind[2:],
        *(math.log(max(1e-12, value)) for value in growing),
        float(fmt.bits),
        float(batch),
        float(row.threads),
    ]


def _eight(row: Row) -> Dense | LowRank | Tucker2 | CP:
    """The format with 8 bits: sizes are those of the tile of int8 kernels."""
    return replace(row.format, bits=8)
