"""Low-rank repair of a dense 4-bit weight: a few components make up for what rounding lost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from t3c.core.codes import Grouped, quantize_groups
from t3c.elastic.factorize.base import AbstractFactorizer, Factors, Ranks
from t3c.elastic.factorize.svd import SVD
from t3c.elastic.factorize.whitened_svd import weighed
from t3c.elastic.rounding import round_groups

BASE_SHARE = 0.5
"""What an element of the base counts: 4 bits, where those of the branch have 8."""


@final
@dataclass(frozen=True, slots=True)
class Eora(AbstractFactorizer):
    """W [n, k] = base [n, k] + high [n, r] low [r, k]; rank 0 is the dense 4-bit weight alone.

    The branch is the low rank of W - base in the metric of the data. The eigenvectors of the
    inputs' moment, scaled by the roots of their eigenvalues, are one root of the moment; its
    Cholesky factor is another, and both give the same product at every rank.
    Source: Liu et al., EoRA (arXiv 2410.21271), there without the gains of the outputs.

    Attributes:
        damping: Added to the diagonal of the inputs' moment, as a share of its mean.
    """

    name: ClassVar[str] = "eora"
    factors: ClassVar[tuple[str, ...]] = ("base", "low", "high")
    damping: float = 1e-3

    def base(self, weight: Tensor, moment: Tensor | None) -> Grouped:
        """Codes of 4 bits in groups of 64; with a moment they are made with error feedback."""
        w = weight.detach().flatten(1).float()
        if moment is None:
            return quantize_groups(w.cpu().numpy())
        return round_groups(w.cpu(), moment.cpu(), search=True)

    def _split(
        self,
        weight: Tensor,
        moment: Tensor | None,
        gains: Tensor | None,
        outputs: Tensor | None,
        ranks: Ranks | None,
    ) -> Factors:
        """The values of the base's codes, and the branch in the metric of inputs and outputs."""
        return self.repair(weight, self.base(weight, moment), moment, gains=gains, ranks=ranks)

    def repair(
        self,
        weight: Tensor,
        base: Grouped,
        moment: Tensor | None = None,
        *,
        gains: Tensor | None = None,
        ranks: Ranks | None = None,
    ) -> Factors:
        """As `split`, of codes that are there already.

        Args:
            weight: [n, k].
            base: Its codes of 4 bits, however they were chosen.
            moment: Second moment of the inputs [k, k]; None: identity.
            gains: Which output directions matter, [n, n]; None: identity.
            ranks: Largest rank wanted; None: all.

        Raises:
            ValueError: The codes do not fit the weight.
        """
        w = weight.detach().flatten(1).float()
        if base.q.shape != tuple(w.shape):
            raise ValueError(f"codes are {base.q.shape}; this weight needs {tuple(w.shape)}")
        values = torch.from_numpy(base.dequantize()).to(w.device)
        return {"base": values, **weighed(w - values, moment, gains, ranks, self.damping)}

    def merge(self, factors: Mapping[str, Tensor], ranks: Ranks | None = None) -> Tensor:
        """Base + high[:, :r] low[:r]; rank 0 is the base."""
        return factors["base"] + SVD.merge(factors, ranks)

    def break_even(self, shape: tuple[int, ...]) -> float:
        """N k / (2 (n + k)): a base of 4 bits and a branch of 8 are the bytes of dense int8."""
        return (1 - BASE_SHARE) * SVD.break_even(shape)


EORA = Eora()
