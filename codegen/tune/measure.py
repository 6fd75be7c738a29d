"""Contests: kernels of one operator take turns, call by call, and are compared turn by turn.

A machine's speed moves by more than schedules differ, so only times of one turn are compared, and
a difference counts where the interval of the median ratio says so. Weights are of many sets that
together exceed the caches, as in a network; activations are those of the call before.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.tvm_api import tvm

ACTIVATIONS = frozenset(
    {"x", "codes", "scales", "residual", "y", "words", "range_in", "range_out", "range_residual"}
)
"""Parameters that the kernel before or after has in cache; every other one is a weight."""
COLD_BYTES = 48 << 20
"""Bytes of all weight sets of one operator: more than a core's share of the last cache."""
SETS = 64
"""Most weight sets."""
SHORT_S = 4e-5
"""A turn of a contestant is as many calls as take about so long."""
HOPELESS = 3.0
"""Ratio to the fastest above which a contestant leaves after `LEAST_TURNS`."""
LEAST_TURNS = 5
Times = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Param:
    """One argument of a kernel."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Contestant:
    """A compiled kernel."""

    function: Callable[..., object]
    params: tuple[Param, ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of the ratios of all turns, and the interval that holds it (95 %)."""

    median: float
    low: float
    high: float


@dataclass(slots=True)
class Arguments:
    """Arguments for contestants; equal parameters share them.

    Attributes:
        cold_bytes: Bytes of all sets of weights together.
    """

    cold_bytes: int = COLD_BYTES
    _sets: dict[tuple[Param, ...], list[tuple[Any, ...]]] = field(default_factory=dict)

    def sets(self, params: tuple[Param, ...]) -> list[tuple[Any, ...]]:
        """Argument lists that differ in their weights."""
        if params not in self._sets:
            rng = np.random.default_rng(len(params))
            weights = sum(p.size_bytes for p in params if p.name not in ACTIVATIONS)
            count = max(1, min(SETS, self.cold_bytes // weights)) if weights else 1
            values = [_values(p, rng) for p in params]
            shared = [tvm.runtime.tensor(v) for v in values]
            self._sets[params] = [
                tuple(
                    tensor if p.name in ACTIVATIONS else tvm.runtime.tensor(value)
                    for p, tensor, value in zip(params, shared, values, strict=True)
                )
                for _ in range(count)
            ]
        return self._sets[params]


def _values(param: Param, rng: np.random.Generator) -> NDArray[np.generic]:
    """Random codes, or positive floats."""
    if param.dtype.startswith("float"):
        return rng.uniform(0.01, 1, param.shape).astype(param.dtype)
    if param.dtype == "int32":  # words of four codes
        return rng.integers(-(2**31), 2**31 - 1, param.shape, np.int32)
    return rng.integers(-127, 128, param.shape, np.int8).astype(param.dtype)


def contest(
    contestants: Sequence[Contestant],
    arguments: Arguments,
    rng: np.random.Generator,
    seconds: float,
    turns: tuple[int, int],
) -> list[Times]:
    """Seconds of a call of each contestant in each turn, the order fresh in every turn.

    Args:
        contestants: Who takes part.
        arguments: What they are called with.
        rng: Of the order.
        seconds: About how long the contest may last.
        turns: Fewest and most turns.

    Returns:
        One array for each contestant, in turns; those who are hopelessly slow leave early.
    """
    sets = [arguments.sets(c.params) for c in contestants]
    next_set = 0
    each = []
    for contestant, own in zip(contestants, sets, strict=True):
        contestant.function(*own[0])
        start = time.perf_counter()
        contestant.function(*own[-1])
        each.append(time.perf_counter() - start)
    repeats = [max(1, math.ceil(SHORT_S / max(t, 1e-7))) for t in each]
    total = sum(t * n for t, n in zip(each, repeats, strict=True))
    count = max(turns[0], min(turns[1], int(seconds / total)))
    times: list[list[float]] = [[] for _ in contestants]
    present = np.arange(len(contestants))
    for turn in range(count):
        if turn == LEAST_TURNS:
            middle = [float(np.median(t)) for t in times]
            present = np.array([i for i in present if middle[i] < HOPELESS * min(middle)])
        for i in rng.permutation(present):
            function, own = contestants[i].function, sets[i]
            start = time.perf_counter()
            for _ in range(repeats[i]):
                next_set += 1
                function(*own[next_set % len(own)])
            times[i].append((time.perf_counter() - start) / repeats[i])
    return [np.array(t) for t in times]


def ratio(times: Times, base: Times) -> Ratio:
    """How `times` compares with `base`, turn by turn."""
    turns = min(len(times), len(base))
    sorted_ = np.sort(times[:turns] / base[:turns])
    reach = 0.98 * math.sqrt(turns)  # order statistics around the median, normal approximation
    low = max(0, math.floor(turns / 2 - reach))
    high = min(turns - 1, math.ceil(turns / 2 + reach) - 1)
    return Ratio(float(np.median(sorted_)), float(sorted_[low]), float(sorted_[high]))
