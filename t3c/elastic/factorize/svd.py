"""Truncated singular value decomposition: the best low rank in the Frobenius norm."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from t3c.elastic.factorize.base import AbstractFactorizer, Factors, Ranks, principal, split_root


@final
class Svd(AbstractFactorizer):
    """W [n, k] = high [n, r] low [r, k], with the root of the singular values in each."""

    name: ClassVar[str] = "svd"
    factors: ClassVar[tuple[str, ...]] = ("low", "high")

    def _split(
        self,
        weight: Tensor,
        moment: Tensor | None,
        gains: Tensor | None,
        outputs: Tensor | None,
        ranks: Ranks | None,
    ) -> Factors:
        """By the eigenvectors Q of the smaller Gram matrix: W = Q (Q^T W) holds to rounding."""
        w = weight.detach().flatten(1).float()
        rank = min(w.shape) if ranks is None else min(*w.shape, ranks[0])
        wide = w.shape[0] <= w.shape[1]

        def gram(dtype: torch.dtype) -> Tensor:
            v = w.to(dtype)
            return v @ v.t() if wide else v.t() @ v

        values, q = principal(gram, rank)
        root = split_root(values)
        if wide:
            return {"low": (q.t() @ w) / root[:, None], "high": q * root}
        return {"low": root[:, None] * q.t(), "high": (w @ q) / root}

    def merge(self, factors: Mapping[str, Tensor], ranks: Ranks | None = None) -> Tensor:
        """high[:, :r] low[:r]."""
        r = None if ranks is None else ranks[0]
        return factors["high"][:, :r] @ factors["low"][:r]

    def break_even(self, shape: tuple[int, ...]) -> float:
        """N k / (n + k)."""
        n, k = shape[:2]
        return n * k / (n + k)


SVD = Svd()
