"""An embedding table that profiles read in int8."""

from typing import final

from torch import Tensor, nn
from torch.nn import functional

from t3c.elastic import fake_quant


@final
class Table(nn.Module):
    """Rows of a table: float, or codes times the scale of their row.

    Attributes:
        weight: [rows, features] float32.
        active: Whether every site runs on integers in the formats in force, as in a profile.
    """

    def __init__(self, weight: Tensor) -> None:
        """Take over the weight (as a parameter; storage is shared)."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach())
        self.active = False
        self._made: tuple[int, tuple[Tensor, Tensor]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a profile stores."""
        return self.weight.numel() + 4 * len(self.weight)

    def table_codes(self) -> tuple[Tensor, Tensor]:
        """Int8 codes [rows, features] and scales [rows, 1]."""
        version = self.weight._version
        if self._made is None or self._made[0] != version:
            codes, scale = fake_quant.quantize_weight(self.weight)
            self._made = (version, (codes, scale[:, None]))
        return self._made[1]

    def forward(self, indices: Tensor) -> Tensor:
        """The rows [..., features]; gradients pass straight through the codes."""
        rows = functional.embedding(indices, self.weight)
        if not self.active:
            return rows
        codes, scale = self.table_codes()
        exact = codes[indices].float() * scale[indices].reshape(*indices.shape, 1)
        return fake_quant.straight_through(exact, rows)
