"""SVD in the metric of the data: of the inputs that the layer sees, or of both sides."""

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
    lower_root,
    principal,
    split_root,
)
from t3c.elastic.factorize.svd import SVD


@dataclass(frozen=True, slots=True)
class AbstractWeighedSvd(AbstractFactorizer):
    """Low rank in a metric of the data.

    Attributes:
        damping: Added to the diagonal of A = E[x x^T], as a share of its mean. Source: docs,
            whitening sweep.
    """

    factors: ClassVar[tuple[str, ...]] = ("low", "high")
    damping: float = 1e-3

    def _split(
        self,
        weight: Tensor,
        moment: Tensor | None,
        gains: Tensor | None,
        outputs: Tensor | None,
        ranks: Ranks | None,
    ) -> Factors:
        """As `Svd.split`, in the metric of inputs and outputs."""
        return weighed(weight, moment, gains, ranks, self.damping)

    def merge(self, factors: Mapping[str, Tensor], ranks: Ranks | None = None) -> Tensor:
        """high[:, :r] low[:r]."""
        return SVD.merge(factors, ranks)

    def break_even(self, shape: tuple[int, ...]) -> float:
        """N k / (n + k)."""
        return SVD.break_even(shape)


@final
class WhitenedSvd(AbstractWeighedSvd):
    """Minimizes E ||(W - high low) x||^2 at every rank, given A = E[x x^T].

    Source: SVD-LLM (arXiv 2403.07378).
    """

    name: ClassVar[str] = "whitened-svd"

    def _split(
        self,
        weight: Tensor,
        moment: Tensor | None,
        gains: Tensor | None,
        outputs: Tensor | None,
        ranks: Ranks | None,
    ) -> Factors:
        """As `Svd.split`, in the metric of the inputs; gains are not used."""
        return weighed(weight, moment, None, ranks, self.damping)


@final
class KroneckerSvd(AbstractWeighedSvd):
    """Minimizes E ||R^T (W - high low) x||^2 at every rank, given A = E[x x^T] and G = R R^T.

    With A = L L^T the factors come from the singular vectors of R^T W L. Whichever side is shorter,
    one Cholesky factor and one eigenproblem of that side are enough: the other metric only enters
    products. Source: SVD-LLM's whitening on the inputs' side; for both sides, the Kronecker
    factors of the curvature (Martens and Grosse, arXiv 1503.05671).
    """

    name: ClassVar[str] = "kronecker-svd"


def weighed(
    weight: Tensor,
    moment: Tensor | None,
    gains: Tensor | None,
    ranks: Ranks | None,
    damping: float,
) -> Factors:
    """Low rank in the metric of both sides; without a moment `Svd.split`."""
    if moment is None:
        return SVD.split(weight, ranks=ranks)
    w = weight.detach().flatten(1).float()
    a = damped(moment.to(w), damping)
    g = None if gains is None else gains.to(w)
    rank = min(w.shape) if ranks is None else min(*w.shape, ranks[0])
    return _by_outputs(w, a, g, rank) if len(w) <= w.shape[1] else _by_inputs(w, a, g, rank)


def _by_outputs(w: Tensor, a: Tensor, g: Tensor | None, rank: int) -> Factors:
    """Z = R^T W; Z A Z^T = Q S^2 Q^T; W_r = R^-T Q_r Q_r^T Z."""
    root = None if g is None else lower_root(g)
    z = w if root is None else root.t() @ w

    def gram(dtype: torch.dtype) -> Tensor:
        v = z.to(dtype)
        return v @ a.to(dtype) @ v.t()

    values, q = principal(gram, rank)
    scale = split_root(values)
    low, high = (q.t() @ z) / scale[:, None], q * scale
    if root is not None:
        high = torch.linalg.solve_triangular(root.t(), high, upper=True)
    return {"low": low.contiguous(), "high": high.contiguous()}


def _by_inputs(w: Tensor, a: Tensor, g: Tensor | None, rank: int) -> Factors:
    """Z = W L; Z^T G Z = P S^2 P^T; W_r = Z P_r P_r^T L^-1: R is not needed."""
    root = lower_root(a)
    z = w @ root

    def gram(dtype: torch.dtype) -> Tensor:
        v = z.to(dtype)
        return v.t() @ (v if g is None else g.to(dtype) @ v)

    values, p = principal(gram, rank)
    scale = split_root(values)
    back = torch.linalg.solve_triangular(root, p.t(), upper=False, left=False)
    return {"low": (scale[:, None] * back).contiguous(), "high": ((z @ p) / scale).contiguous()}


WHITENED_SVD = WhitenedSvd()
KRONECKER_SVD = KroneckerSvd()
