"""Canonical polyadic decomposition: a convolution as 1x1, k x 1, 1 x k, 1x1 of one rank."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from t3c.core.errors import T3CError
from t3c.elastic.factorize.base import AbstractFactorizer, Factors, Ranks

_MODES = "oihw"


@final
@dataclass(frozen=True, slots=True)
class CpAls(AbstractFactorizer):
    """W [o, i, kh, kw] = sum_r cp_out[:, r] cp_in[r] cp_tall[r] cp_wide[r].

    Alternating least squares from random starts, on the weight scaled to about 1; the start whose
    float32 factors are nearest to the weight wins, one that is not finite is passed over.
    Components are ordered by norm. Unlike an SVD it has no exact end and its prefixes are not
    optimal.
    Source: Lebedev et al. 2015 (arXiv 1412.6553).

    Attributes:
        restarts: Random starts.
        sweeps: Sweeps over the four modes of one start.
        ridge: Added to the normal equations, as a share of their mean diagonal.
        floor: Added, too, of a weight scaled to about 1: for components that are zero.
        seed: Of the starts.
    """

    name: ClassVar[str] = "cp"
    factors: ClassVar[tuple[str, ...]] = ("cp_in", "cp_tall", "cp_wide", "cp_out")
    restarts: int = 3
    sweeps: int = 40
    ridge: float = 1e-6
    floor: float = 1e-30
    seed: int = 0

    def _split(
        self,
        weight: Tensor,
        moment: Tensor | None,
        gains: Tensor | None,
        outputs: Tensor | None,
        ranks: Ranks | None,
    ) -> Factors:
        """Fit `ranks` = (rank,) components; None: min(out, in). Neither moment is used.

        Raises:
            T3CError: Every start ended in NaN or infinity.
        """
        w = weight.detach().double()
        unit = _power_of_two(float(w.abs().max()))  # the ridge's floor is absolute
        w = w / unit
        rank = min(w.shape[:2]) if ranks is None else ranks[0]
        generator = torch.Generator().manual_seed(self.seed)
        best: tuple[float, Factors] | None = None
        for _ in range(self.restarts):
            start = [
                torch.randn(n, rank, generator=generator, dtype=w.dtype).to(w.device)
                for n in w.shape
            ]
            modes = self.fit(w, start)
            modes[0] = modes[0] * unit
            found = _spread(modes)
            given = self.merge({name: factor.double() for name, factor in found.items()})
            error = float((w - given / unit).norm())
            if math.isfinite(error) and (best is None or error < best[0]):
                best = (error, found)
        if best is None:
            raise T3CError(
                f"CP of rank {rank} diverged from {self.restarts} starts on a weight "
                f"{tuple(w.shape)}; use a smaller rank or 'tucker2'"
            )
        return best[1]

    def fit(self, w: Tensor, modes: list[Tensor]) -> list[Tensor]:
        """Alternating least squares; stops when a mode is no longer finite."""
        for _ in range(self.sweeps):
            for axis in range(4):
                others = [m for i, m in enumerate(modes) if i != axis]
                names = [c for i, c in enumerate(_MODES) if i != axis]
                spec = f"{_MODES},{','.join(f'{c}r' for c in names)}->{_MODES[axis]}r"
                rhs = torch.einsum(spec, w, *others)
                gram = torch.ones_like(others[0].t() @ others[0])
                for other in others:
                    gram = gram * (other.t() @ other)
                bump = self.ridge * gram.diagonal().mean() + self.floor
                gram = gram + bump * torch.eye(len(gram), dtype=w.dtype, device=w.device)
                solved, info = torch.linalg.solve_ex(gram, rhs.t())
                if int(info) or not bool(torch.isfinite(solved).all()):
                    return [m * float("nan") for m in modes]
                modes[axis] = solved.t()
        return modes

    def merge(self, factors: Mapping[str, Tensor], ranks: Ranks | None = None) -> Tensor:
        """The weight of the first components."""
        r = None if ranks is None else ranks[0]
        return torch.einsum(
            "or,ri,rh,rw->oihw",
            factors["cp_out"][:, :r],
            factors["cp_in"][:r],
            factors["cp_tall"][:r],
            factors["cp_wide"][:r],
        )

    def break_even(self, shape: tuple[int, ...]) -> float:
        """O i taps / (o + i + kh + kw)."""
        o, i, kh, kw = shape
        return o * i * kh * kw / (o + i + kh + kw)


def _power_of_two(peak: float) -> float:
    """The largest power of two up to `peak`, by which division is exact; 1 for 0."""
    return 2.0 ** math.floor(math.log2(peak)) if peak > 0 else 1.0


def _spread(modes: list[Tensor]) -> Factors:
    """Largest components first; windows of norm 1, the rest of the norm shared by in and out."""
    norms = [m.norm(dim=0).clamp_min(1e-300) for m in modes]
    total = norms[0] * norms[1] * norms[2] * norms[3]
    order = total.argsort(descending=True)
    unit = [(m / n)[:, order] for m, n in zip(modes, norms, strict=True)]
    root = total[order].sqrt()
    return {
        "cp_in": (unit[1] * root).t().float().contiguous(),
        "cp_tall": unit[2].t().float().contiguous(),
        "cp_wide": unit[3].t().float().contiguous(),
        "cp_out": (unit[0] * root).float().contiguous(),
    }


CP_ALS = CpAls()
