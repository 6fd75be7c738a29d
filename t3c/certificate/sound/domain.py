"""The inputs that a sound bound speaks of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from t3c.core.errors import CertificateError


@dataclass(frozen=True, slots=True)
class Box:
    """Every tensor between two tensors, element by element; integers are all whole numbers between.

    Attributes:
        low: Least values.
        high: Largest values.
    """

    low: Tensor
    high: Tensor

    def __post_init__(self) -> None:
        """Refuse an empty, infinite or misshapen box."""
        if self.low.shape != self.high.shape or self.low.dtype != self.high.dtype:
            raise ValueError(
                f"a box needs ends of one shape and dtype, got {tuple(self.low.shape)} of "
                f"{self.low.dtype} and {tuple(self.high.shape)} of {self.high.dtype}"
            )
        if not bool(self.low.isfinite().all() & self.high.isfinite().all()):
            raise ValueError("a box needs finite ends; clip the data, or give ends yourself")
        if wrong := int((self.low > self.high).sum()):
            raise ValueError(f"a box needs low <= high; {wrong} of {self.low.numel()} are not")


@dataclass(frozen=True, slots=True)
class Ball:
    """Every tensor within an L2 distance of a centre, over all elements together.

    Attributes:
        center: The centre, floating point.
        radius: The distance.
    """

    center: Tensor
    radius: float

    def __post_init__(self) -> None:
        """Refuse integers, and radii that are none."""
        if not self.center.is_floating_point() or not self.center.isfinite().all():
            raise ValueError(f"a ball needs a finite float centre, got {self.center.dtype}")
        _distance("radius", self.radius)


Region = Box | Ball
Cell = tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Domain:
    """A union of cells; a bound over it is the largest over its cells.

    Attributes:
        cells: Each a region for every flat input of the graph.
        text: What it is, as reports print it.
    """

    cells: tuple[Cell, ...]
    text: str

    def __post_init__(self) -> None:
        """Refuse no cells."""
        if not self.cells:
            raise CertificateError("a domain needs at least one cell; give data or ends")

    @classmethod
    def box(cls, low: Tensor, high: Tensor) -> Self:
        """One input between two tensors."""
        return cls(((Box(low, high),),), f"box of {low.numel()} elements")

    @classmethod
    def ball(cls, center: Tensor, radius: float) -> Self:
        """One input within an L2 distance of a centre."""
        return cls(((Ball(center, radius),),), f"L2 ball of radius {radius:g}")

    @classmethod
    def of_data(cls, batches: Sequence[tuple[Tensor, ...]], margin: float = 0.0) -> Self:
        """The smallest box around all data.

        Args:
            batches: Flat inputs of calls.
            margin: How far beyond, as a share of each element's range; for floats only.

        Raises:
            ValueError: Values that are not finite, shapes that differ, or a margin below 0.
        """
        _some(batches)
        _distance("margin", margin)
        regions: list[Region] = []
        for values in zip(*batches, strict=True):
            if len(shapes := {tuple(v.shape) for v in values}) > 1:
                raise ValueError(f"inputs of {sorted(shapes)}; a box needs one shape, the model's")
            every = torch.stack(values)
            low, high = every.amin(0), every.amax(0)
            if low.is_floating_point():
                low, high = _wider(low - margin * (high - low), high + margin * (high - low))
            regions.append(Box(low, high))
        return cls((tuple(regions),), f"box of {len(batches)} inputs, margin {margin:g}")

    @classmethod
    def around(
        cls, batches: Sequence[tuple[Tensor, ...]], radius: float, norm: str = "max"
    ) -> Self:
        """A cell around each of the given inputs; integers stay as they are.

        Args:
            batches: Flat inputs of calls.
            radius: Largest distance of floats.
            norm: ``max``: of each element; ``l2``: of all elements of an input together.

        Raises:
            ValueError: No such norm, or a radius that is no distance.
        """
        _some(batches)
        _distance("radius", radius)
        if norm not in ("max", "l2"):
            raise ValueError(f"norm is {norm!r}; allowed are 'max' and 'l2'")

        def region(x: Tensor) -> Region:
            if not x.is_floating_point():
                return Box(x, x)
            return Box(*_wider(x - radius, x + radius)) if norm == "max" else Ball(x, radius)

        cells = tuple(tuple(region(x) for x in batch) for batch in batches)
        return cls(cells, f"{norm} distance {radius:g} from {len(batches)} inputs")


def _wider(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Ends one float further out: those given were rounded."""
    infinite = torch.full_like(low, float("inf"))
    return torch.nextafter(low, -infinite), torch.nextafter(high, infinite)


def _distance(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} is {value}; need a finite number, 0 or above")


def _some(batches: Sequence[tuple[Tensor, ...]]) -> None:
    if not batches:
        raise CertificateError("a domain around data needs at least one input; got none")
