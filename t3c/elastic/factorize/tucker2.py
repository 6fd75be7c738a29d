"""Tucker-2: a convolution as 1x1, core, 1x1."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from t3c.elastic.factorize.base import (
    AbstractFactorizer,
    Factors,
    Ranks,
    balance,
    damped,
    descending,
)


@final
@dataclass(frozen=True, slots=True)
class Tucker2Hosvd(AbstractFactorizer):
    """W [o, i, kh, kw] = expand [o, ro] * core [ro, ri, kh, kw] * reduce [ri, i].

    Higher-order SVD on both channel axes, in the metric of the input channels where their second
    moment is given, then refined by HOOI at `focus` of the ranks. Bases stay complete and ordered,
    so every pair of prefixes is valid. Source: Kim et al. 2016 (arXiv 1511.06530).

    Attributes:
        damping: Added to the moment's diagonal, as a share of its mean.
        sweeps: HOOI sweeps; 0 is plain HOSVD.
        focus: Share of the channels at which HOOI refines.
    """

    name: ClassVar[str] = "tucker2"
    factors: ClassVar[tuple[str, ...]] = ("reduce", "core", "expand")
    damping: float = 1e-3
    sweeps: int = 2
    focus: float = 0.5

    def split(
        self, weight: Tensor, moment: Tensor | None = None, *, ranks: Ranks | None = None
    ) -> Factors:
        """Factors at full rank, or cut to `ranks` = (rank_in, rank_out)."""
        w = weight.detach().double()
        out, channels = w.shape[:2]
        chol = None
        if moment is not None:
            chol = torch.linalg.cholesky(damped(moment.to(w.device), self.damping))
            w = torch.einsum("oihw,ij->ojhw", w, chol)
        u_in, u_out = _basis(w, 1), _basis(w, 0)
        ri, ro = max(1, round(channels * self.focus)), max(1, round(out * self.focus))
        for _ in range(self.sweeps):
            u_in = _basis(torch.einsum("oihw,op->pihw", w, u_out[:, :ro]), 1)
            u_out = _basis(torch.einsum("oihw,ij->ojhw", w, u_in[:, :ri]), 0)
        core = torch.einsum("oihw,op,ij->pjhw", w, u_out, u_in)
        reduce = u_in.t()
        if chol is not None:  # x = L z, so U^T z = (U^T L^-1) x
            reduce = torch.linalg.solve_triangular(chol, reduce, upper=False, left=False)
        expand, core = balance(u_out, core)
        swapped, reduce = balance(core.transpose(0, 1).flatten(1).t(), reduce)
        core = swapped.t().reshape(channels, out, *core.shape[2:]).transpose(0, 1)
        a, b = (None, None) if ranks is None else (ranks[0], ranks[1])
        return {
            "reduce": reduce[:a].float().contiguous(),
            "core": core[:b, :a].float().contiguous(),
            "expand": expand[:, :b].float().contiguous(),
        }

    def merge(self, factors: Mapping[str, Tensor], ranks: Ranks | None = None) -> Tensor:
        """The weight at `ranks` = (rank_in, rank_out)."""
        a, b = (None, None) if ranks is None else (ranks[0], ranks[1])
        return torch.einsum(
            "op,pjhw,ji->oihw",
            factors["expand"][:, :b],
            factors["core"][:b, :a],
            factors["reduce"][:a],
        )

    def break_even(self, shape: tuple[int, ...]) -> float:
        """Rank r of r = rank_in = rank_out with r i + r^2 taps + r o = o i taps."""
        o, i, taps = shape[0], shape[1], shape[2] * shape[3]
        linear = float(o + i)
        return (math.sqrt(linear * linear + 4.0 * taps * o * i * taps) - linear) / (2 * taps)


def _basis(w: Tensor, axis: int) -> Tensor:
    """All left singular vectors of the unfolding along `axis`, largest first."""
    flat = w.movedim(axis, 0).flatten(1)
    return descending(flat @ flat.t())[1]


TUCKER2 = Tucker2Hosvd()
