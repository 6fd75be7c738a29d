"""Truncated singular value decomposition: the best low rank in the Frobenius norm."""

from collections.abc import Mapping
from typing import ClassVar, final

from torch import Tensor

from t3c.elastic.factorize.base import AbstractFactorizer, Factors, Ranks, descending, split_root


@final
class Svd(AbstractFactorizer):
    """W [n, k] = high [n, r] low [r, k], with the root of the singular values in each."""

    name: ClassVar[str] = "svd"
    factors: ClassVar[tuple[str, ...]] = ("low", "high")

    def split(
        self, weight: Tensor, moment: Tensor | None = None, *, ranks: Ranks | None = None
    ) -> Factors:
        """By the eigenvectors Q of the smaller Gram matrix: W = Q (Q^T W) holds to rounding."""
        w = weight.detach().reshape(len(weight), -1).double()
        wide = w.shape[0] <= w.shape[1]
        values, q = descending(w @ w.t() if wide else w.t() @ w)
        root = split_root(values)
        if wide:
            high, low = q * root, (q.t() @ w) / root[:, None]
        else:
            high, low = (w @ q) / root, root[:, None] * q.t()
        r = None if ranks is None else ranks[0]
        return {"low": low[:r].float().contiguous(), "high": high[:, :r].float().contiguous()}

    def merge(self, factors: Mapping[str, Tensor], ranks: Ranks | None = None) -> Tensor:
        """high[:, :r] low[:r]."""
        r = None if ranks is None else ranks[0]
        return factors["high"][:, :r] @ factors["low"][:r]

    def break_even(self, shape: tuple[int, ...]) -> float:
        """N k / (n + k)."""
        n, k = shape[:2]
        return n * k / (n + k)


SVD = Svd()
