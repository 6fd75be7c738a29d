"""A place in the graph where an activation is rounded to its fixed grid."""

from typing import final

from torch import Tensor, nn

from t3c.core.grid import Grid
from t3c.elastic import fake_quant


@final
class Snap(nn.Module):
    """Identity in float; with a grid and integer readers, the values that kernels pass on.

    Attributes:
        name: Its place, unique in the graph.
        signed: Whether negative values occur; not after a ReLU.
        readers: Sites whose input lies on the grid.
        around: Sites that must run on integers for the rounding to happen: they do it.
        grid: Chosen at calibration; None: activations are rounded by each reader, dynamically.
        active: Whether all of `around` run on integers in the formats in force.
    """

    def __init__(
        self, name: str, signed: bool, readers: tuple[str, ...], around: tuple[str, ...]
    ) -> None:
        """Start without a grid."""
        super().__init__()
        self.name = name
        self.signed = signed
        self.readers = readers
        self.around = around
        self.grid: Grid | None = None
        self.active = False

    def forward(self, x: Tensor) -> Tensor:
        """The nearest values of the grid; gradients pass straight through."""
        if self.grid is None or not self.active:
            return x
        return fake_quant.straight_through(fake_quant.snap(x.detach(), self.grid), x)
