"""SVD of a weight that makes up for the errors of the layers before it."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from t3c.elastic.factorize.whitened_svd import AbstractWeighedSvd


@final
@dataclass(frozen=True, slots=True)
class SaesSvd(AbstractWeighedSvd):
    """`KroneckerSvd` of the weight `aimed` gives, in the metric of the compressed inputs.

    Where no layer before it errs, `aimed` gives the weight itself, bit for bit, and so the factors
    are those of `KroneckerSvd` (without gains, of `WhitenedSvd`).

    Attributes:
        share: How much of the correction is made: 0 none, 1 the least-squares fit. Less than all,
            because what holds at the reference holds less at other ranks and on other data.
        ridge: Added to the diagonal of M', as a share of its mean. Source:
            benchmarks/factorizers.py.
    """

    name: ClassVar[str] = "saes-svd"
    share: float = 0.5
    ridge: float = 1e-1

    def aimed(self, weight: Tensor, moment: Tensor, cross: Tensor) -> Tensor:
        """W' = W ((1 - a) M' + a C + l I) (M' + l I)^-1: least squares of W' x' to W x, damped.

        Args:
            weight: [n, k], or [n, k, 1, 1].
            moment: M' = E[x' x'^T] of the inputs behind compressed layers, [k, k].
            cross: C = E[x x'^T], x the original inputs; equal to `moment` where nothing errs.

        Returns:
            W' of the weight's shape, float32.

        Raises:
            ValueError: The two second moments do not fit the weight.
        """
        k = weight.shape[1]
        if moment.shape != (k, k) or cross.shape != (k, k):
            raise ValueError(
                f"second moments are {tuple(moment.shape)} and {tuple(cross.shape)}; this weight "
                f"needs [{k}, {k}] twice"
            )
        a = moment.double()
        level = float(a.diagonal().mean())
        if not level > 0:
            return weight.detach().float()
        damped = a.clone()
        damped.diagonal().add_(self.ridge * level)
        off = weight.detach().flatten(1).double() @ (cross.double() - a)
        change: Tensor = torch.linalg.solve(damped, off.t()).t().float()  # damped is symmetric
        aim: Tensor = weight.detach().float() + self.share * change.reshape(weight.shape)
        return aim


SAES_SVD = SaesSvd()
