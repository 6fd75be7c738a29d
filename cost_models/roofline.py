"""The analytic cost model: a few constants per target, counted work, no training.

t = calls + quantize x inputs + multiply-adds / rate + store x outputs + weight bytes / bandwidth,
summed over the products of the format. Sizes round up to the tile of the target's kernels; 4-bit
weights have a rate of their own.
Source: constants in benchmarks/roofline.md.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Self, final

import numpy as np
from numpy.typing import NDArray

from t3c.core.codes import GROUP
from t3c.core.errors import T3CError
from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2
from t3c.core.sites import ConvSite, LinearSite, Site
from t3c.cost_models.base import AbstractCostModel, Row, Work
from t3c.targets.base import Roofline, TargetSpec

SCHEMA = 1


@final
@dataclass(frozen=True, slots=True)
class RooflineModel(AbstractCostModel):
    """Counted work times the constants of one target.

    Attributes:
        constants: Of one thread.
    """

    constants: Roofline

    @classmethod
    def of(cls, spec: TargetSpec) -> Self:
        """The model with the constants of the target."""
        return cls(spec.roofline)

    def predict(self, rows: Sequence[Row]) -> list[float]:
        """Seconds of each row."""
        return [float(counts_of(row, self.constants) @ self.seconds_each()) for row in rows]

    def predict_rest(self, work: Work, threads: int = 1) -> float:
        """Seconds of what is not elastic: the slower of arithmetic and memory, plus the calls."""
        c = self.constants
        busy = max(work.f32_macs / c.f32_macs_s / threads, work.bytes_moved / c.bytes_s)
        return busy + work.calls * c.call_s

    def fit(self, rows: Sequence[Row], seconds: Sequence[float]) -> Self:
        """Non-negative least squares of the relative error; the float32 rate is kept.

        A term that the rows do not support keeps a vanishing cost rather than a negative one.

        Raises:
            ValueError: Fewer rows than constants, or a time that is not positive.
        """
        times = np.asarray(seconds, np.float64)
        if len(rows) != len(times) or len(rows) < 5 or not (times > 0).all():
            raise ValueError(
                f"got {len(rows)} rows and {len(times)} times; need one positive time for each, "
                "at least 5"
            )
        counts = np.stack([counts_of(row, self.constants)[:5] for row in rows])
        call, quantize, mac, store, byte = non_negative(counts, times)
        tiny = 1e-18
        fitted = replace(
            self.constants,
            call_s=call,
            quantize_s=quantize,
            store_s=store,
            int8_macs_s=1 / max(mac, tiny),
            bytes_s=1 / max(byte, tiny),
        )
        return type(self)(fitted)

    def save(self, path: Path) -> None:
        """Write the constants as JSON."""
        document = {"schema": SCHEMA, "model": "roofline", "constants": asdict(self.constants)}
        path.write_text(json.dumps(document, indent=1))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the constants back.

        Raises:
            T3CError: Not a roofline file, or newer than this reader.
        """
        document = json.loads(path.read_text())
        if document.get("model") != "roofline":
            raise T3CError(f"{path} holds a {document.get('model')!r} cost model, not a roofline")
        if document["schema"] > SCHEMA:
            raise T3CError(
                f"{path} has schema {document['schema']}; this version reads up to {SCHEMA}: "
                "read it with the version of t3c that wrote it, or a newer one"
            )
        constants = dict(document["constants"])
        constants["tile"] = tuple(constants["tile"])
        return cls(Roofline(**constants))

    def seconds_each(self) -> NDArray[np.float64]:
        """Seconds of one unit of each count."""
        c = self.constants
        rates = (1 / c.int8_macs_s, c.store_s, 1 / c.bytes_s, 1 / c.f32_macs_s)
        return np.array([c.call_s, c.quantize_s, *rates])


Counts = NDArray[np.float64]
"""(calls, elements quantized, int8 multiply-adds, elements stored, weight bytes, f32 ones)."""


def counts_of(row: Row, constants: Roofline) -> Counts:
    """Work of one row; threads share all of it but calls and weight bytes.

    Multiply-adds with 4-bit weights count as the int8 ones that take as long.
    """
    if row.format.bits == 4:
        if constants.int4_macs_s is None:
            raise T3CError(f"no 4-bit kernels on this target; {row.format} has no predicted time")
        counts = _work(row.site, row.format, (1, *constants.tile[1:]))
        counts[2] *= constants.int8_macs_s / constants.int4_macs_s
        counts[4] *= 0.5 + 2 / GROUP
    else:
        counts = _work(row.site, row.format, constants.tile)
    if row.codes and isinstance(row.site, ConvSite):
        counts[1] = 0  # the convolution before has quantized already
        counts[3] /= 4  # a byte is stored in place of a float
    counts[[1, 2, 3, 5]] /= row.threads
    return counts


def _work(site: Site, fmt: Format, tile: tuple[int, int, int]) -> Counts:
    def product(m: int, n: int, k: int, taps: int = 1) -> Counts:
        rows, outputs, inputs = tile
        macs = _up(m, rows) * _up(n, outputs) * _up(k, inputs) * taps
        return np.array([1, 0, macs, m * n, n * k * taps, 0], np.float64)

    def quantize(elements: int, calls: int = 1) -> Counts:
        return np.array([calls, elements, 0, 0, 0, 0], np.float64)

    def low_rank(m: int, n: int, k: int, rank: int) -> Counts:
        thin = quantize(m * k) + product(m, rank, k) + quantize(m * rank, 0) + product(m, n, rank)
        thin[0] -= 1  # one kernel does both products
        return thin

    match site, fmt:
        case LinearSite(), Dense():
            return quantize(site.rows * site.k) + product(site.rows, site.n, site.k)
        case LinearSite(), LowRank(rank):
            return low_rank(site.rows, site.n, site.k, rank)
        case ConvSite(), _:
            below = site.batch * site.in_size[0] * site.in_size[1]
            above = site.batch * site.out_size[0] * site.out_size[1]
            taps = site.kernel[0] * site.kernel[1]
            fan_in, fan_out = site.in_channels, site.out_channels
            match fmt:
                case Dense():
                    return quantize(below * fan_in) + product(above, fan_out, fan_in, taps)
                case LowRank(rank):
                    thin = quantize(below * fan_in) + product(above, rank, fan_in)
                    return thin + quantize(above * rank) + product(above, fan_out, rank)
                case Tucker2(rank_in, rank_out):
                    reduce = quantize(below * fan_in) + product(below, rank_in, fan_in)
                    core = quantize(below * rank_in) + product(above, rank_out, rank_in, taps)
                    return (
                        reduce
                        + core
                        + quantize(above * rank_out)
                        + product(above, fan_out, rank_out)
                    )
                case CP(rank):
                    tall = site.batch * site.out_size[0] * site.in_size[1]
                    macs = rank * (tall * site.kernel[0] + above * site.kernel[1])
                    moved = 4 * rank * (below + 2 * tall + above)
                    depth = np.array([2, 0, 0, 0, moved, macs], np.float64)
                    ends = product(below, rank, fan_in) + product(above, fan_out, rank)
                    return quantize(below * fan_in) + depth + quantize(above * rank) + ends
        case _:
            pass
    raise T3CError(f"site {site.name!r} is linear; {fmt} is a convolution format")


def _up(value: int, step: int) -> int:
    """`value` rounded up to a multiple of `step`."""
    return -(-value // step) * step


def non_negative(counts: Counts, seconds: Counts, weights: Counts | None = None) -> list[float]:
    """Non-negative x of least sum((counts @ x / seconds - 1)^2), over all sets of active terms.

    Args:
        counts: Work [rows, terms].
        seconds: Of each row.
        weights: Of each row's error; None: all the same.
    """
    scale = counts.max(axis=0) + 1e-300
    ones = np.ones(len(seconds)) if weights is None else weights
    relative = counts / scale / seconds[:, None] * ones[:, None]
    terms = range(counts.shape[1])
    best, least = np.zeros(len(terms)), np.inf
    for size in terms:
        for active in combinations(terms, size + 1):
            x = np.linalg.lstsq(relative[:, active], ones, rcond=None)[0]
            error = float(((relative[:, active] @ x - ones) ** 2).sum())
            if (x >= 0).all() and error < least:
                least = error
                best = np.zeros(len(terms))
                best[list(active)] = x
    return [float(value) for value in best / scale]
