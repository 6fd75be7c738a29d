"""Activation-whitened SVD: the best low rank on the inputs that the layer sees."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from t3c.elastic.factorize.base import (
    AbstractFactorizer,
    Factors,
    Ranks,
    damped,
    descending,
    split_root,
)
from t3c.elastic.factorize.svd import SVD


@final
@dataclass(frozen=True, slots=True)
class WhitenedSvd(AbstractFactorizer):
    """Minimizes E ||(W - high low) x||^2 at every rank, given A = E[x x^T].

    With A = L L^T the factors come from the singular vectors of W L; only an eigenproblem of size
    min(n, k) and, for k < n, one Cholesky factor are needed. Source: SVD-LLM (arXiv 2403.07378).

    Attributes:
        damping: Added to A's diagonal, as a share of its mean. Source: docs, whitening sweep.
    """

    name: ClassVar[str] = "whitened-svd"
    factors: ClassVar[tuple[str, ...]] = ("low", "high")
    damping: float = 1e-3

    def split(
        self, weight: Tensor, moment: Tensor | None = None, *, ranks: Ranks | None = None
    ) -> Factors:
        """As `Svd.split`, in the metric of the inputs; without a moment it is `Svd.split`."""
        if moment is None:
            return SVD.split(weight, ranks=ranks)
        w = weight.detach().reshape(len(weight), -1).double()
        a = damped(moment.to(w.device), self.damping)
        if w.shape[0] <= w.shape[1]:  # W A W^T = Q S^2 Q^T, W_r = Q_r Q_r^T W
            values, q = descending(w @ a @ w.t())
            root = split_root(values)
            high, low = q * root, (q.t() @ w) / root[:, None]
        else:  # L^T W^T W L = P S^2 P^T, W_r = (W L P_r) (P_r^T L^-1)
            chol = torch.linalg.cholesky(a)
            wl = w @ chol
            values, p = descending(wl.t() @ wl)
            root = split_root(values)
            inverse = torch.linalg.solve_triangular(chol, p.t(), upper=False, left=False)
            high, low = (wl @ p) / root, root[:, None] * inverse
        r = None if ranks is None else ranks[0]
        return {"low": low[:r].float().contiguous(), "high": high[:, :r].float().contiguous()}

    def merge(self, factors: Mapping[str, Tensor], ranks: Ranks | None = None) -> Tensor:
        """high[:, :r] low[:r]."""
        return SVD.merge(factors, ranks)

    def break_even(self, shape: tuple[int, ...]) -> float:
        """N k / (n + k)."""
        return SVD.break_even(shape)


WHITENED_SVD = WhitenedSvd()
