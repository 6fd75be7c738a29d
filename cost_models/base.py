"""What a cost model promises."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from t3c.core.formats import Format
from t3c.core.sites import Site
from t3c.targets.base import TargetSpec


@dataclass(frozen=True, slots=True)
class Row:
    """One layer in one format: what is asked of a model, or what was measured.

    Attributes:
        site: The layer and its shape.
        format: How it is stored and computed.
        threads: Threads that the kernels use.
        codes: Whether a convolution reads and writes int8 codes on fixed grids.
    """

    site: Site
    format: Format
    threads: int = 1
    codes: bool = False

    def __post_init__(self) -> None:
        """Refuse fewer than one thread."""
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}; a kernel runs on at least 1")


@dataclass(frozen=True, slots=True)
class Work:
    """What a network does outside its elastic layers.

    Attributes:
        f32_macs: Multiply-adds in float32.
        bytes_moved: Bytes read and written.
        calls: Kernel calls.
    """

    f32_macs: int = 0
    bytes_moved: int = 0
    calls: int = 0


class AbstractCostModel(ABC):
    """Seconds of one call, predicted (the median); more rank is never faster."""

    @classmethod
    @abstractmethod
    def of(cls, spec: TargetSpec) -> Self:
        """The model with nothing but the constants of the target."""

    @abstractmethod
    def fit(self, rows: Sequence[Row], seconds: Sequence[float]) -> Self:
        """A model that agrees better with measurements of this target.

        Args:
            rows: What was measured.
            seconds: Median time of each.
        """

    @abstractmethod
    def predict(self, rows: Sequence[Row]) -> list[float]:
        """Seconds of each row: quantization of the input, products, write-out."""

    @abstractmethod
    def predict_rest(self, work: Work, threads: int = 1) -> float:
        """Seconds of everything that is not an elastic layer."""

    def predict_network(self, layers: Sequence[Row], rest: Work) -> float:
        """Seconds of one call of a network: its layers one by one, and everything else."""
        return math.fsum(self.predict(layers)) + self.predict_rest(rest, _threads(layers))

    def predict_network_interval(self, layers: Sequence[Row], rest: Work) -> tuple[float, float]:
        """Seconds between which nine of ten networks lie; (0, infinity) where that is unknown."""
        del layers, rest
        return 0.0, math.inf

    def predict_energy(self, rows: Sequence[Row]) -> list[float] | None:
        """Joules of each row; None where the model knows of no meter."""
        del rows
        return None

    def predict_network_energy(self, layers: Sequence[Row], rest: Work) -> float | None:
        """Joules of one call of a network; None where the model knows of no meter.

        Args:
            layers: Its elastic layers.
            rest: Everything else.
        """
        del layers, rest
        return None

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the model to the file `path`."""

    @classmethod
    @abstractmethod
    def load(cls, path: Path) -> Self:
        """Read a model that predicts exactly what the saved one did."""


def _threads(layers: Sequence[Row]) -> int:
    """Threads of a network's call."""
    return layers[0].threads if layers else 1
