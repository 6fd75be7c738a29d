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
    lower_root,
)


@final
@dataclass(frozen=True, slots=True)
class Tucker2Hosvd(AbstractFactorizer):
    """W [o, i, kh, kw] = expand [o, ro] * core [ro, ri, kh, kw] * reduce [ri, i].

    Higher-order SVD on both channel axes, in the metric of the input channels where their second
    moment is given, then refined by HOOI at `focus` of the ranks. Bases stay complete and ordered,
    so every pair of prefixes is valid. Source: Kim et al. 2016 (arXiv 1511.06530).

    Channel moments know nothing of how the taps of a window correlate. The second moment of the
    outputs does: with it the output basis is that of the outputs themselves, the best there is at
    every rank, as if second moments of whole windows (im2col) were known.

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

    def _split(
        self,
        weight: Tensor,
        moment: Tensor | None,
        gains: Tensor | None,
        outputs: Tensor | None,
        ranks: Ranks | None,
    ) -> Factors:
        """Factors at full rank, or cut to `ranks` = (rank_in, rank_out)."""
        w = weight.detach().float()
        out, channels = w.shape[:2]
        chol = root = None
        if moment is not None:
            chol = lower_root(damped(moment.to(w), self.damping))
            w = torch.einsum("oihw,ij->ojhw", w, chol)
            if gains is not None:
                root = lower_root(gains.to(w))
                w = torch.einsum("oihw,op->pihw", w, root)
        u_in, u_out = _basis(w, 1), _basis(w, 0)
        if moment is not None and outputs is not None and float(outputs.diagonal().sum()) > 0:
            seen = outputs.to(w) if root is None else root.t() @ outputs.to(w) @ root
            u_out = descending(seen.double())[1].float()
        else:
            outputs = None
        ri, ro = max(1, round(channels * self.focus)), max(1, round(out * self.focus))
        for _ in range(self.sweeps):
            u_in = _basis(torch.einsum("oihw,op->pihw", w, u_out[:, :ro]), 1)
            if outputs is None:
                u_out = _basis(torch.einsum("oihw,ij->ojhw", w, u_in[:, :ri]), 0)
        if ranks is not None:
            u_in, u_out = u_in[:, : ranks[0]], u_out[:, : ranks[1]]
        core = torch.einsum("oihw,op,ij->pjhw", w, u_out, u_in)
        reduce, expand = u_in.t(), u_out
        if chol is not None:  # x = L z, so U^T z = (U^T L^-1) x
            reduce = torch.linalg.solve_triangular(chol, reduce, upper=False, left=False)
        if root is not None:
            expand = torch.linalg.solve_triangular(root.t(), expand, upper=True)
        expand, core = balance(expand, core)
        swapped, reduce = balance(core.transpose(0, 1).flatten(1).t(), reduce)
        core = swapped.t().reshape(-1, core.shape[0], *core.shape[2:]).transpose(0, 1)
        return {
            "reduce": reduce.contiguous(),
            "core": core.contiguous(),
            "expand": expand.contiguous(),
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
