"""What a factorizer promises."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from t3c.core.errors import T3CError

Factors = dict[str, Tensor]
"""Factor name (as in t3c.core.codes.SiteCodes) -> float32 tensor, components in order."""

Ranks = tuple[int, ...]

RESOLVED = 1e-6
"""Below this share of the largest eigenvalue float32 does not resolve components: the residual at
that rank is already 1 % above the exact one, though far below what rounding to 8 bits costs."""


class AbstractFactorizer(ABC):
    """Splits a weight into factors; rank k is the first k components of each."""

    name: ClassVar[str]
    factors: ClassVar[tuple[str, ...]]
    """Names of the factors it gives."""

    @final
    def split(
        self,
        weight: Tensor,
        moment: Tensor | None = None,
        *,
        gains: Tensor | None = None,
        outputs: Tensor | None = None,
        ranks: Ranks | None = None,
    ) -> Factors:
        """Factors of a weight, float32.

        Args:
            weight: [n, k], or [out, in, kh, kw].
            moment: Second moment E[x x^T] of the inputs [k, k] (channels [in, in]); None: identity.
            gains: Which output directions matter: positive definite [n, n]; None: identity. Used
                only together with a moment, by factorizers that weigh outputs.
            outputs: Second moment E[y y^T] of the outputs without bias [n, n]; None: as weight and
                moment have it, which for windows is only a guess.
            ranks: Largest ranks wanted; None: all. A factorizer whose components depend on the
                rank (CP) fits this one.

        Raises:
            T3CError: The weight, a moment or the gains are not finite.
            ValueError: A moment or the gains do not fit the weight, or a rank is below 1.
        """
        n, k = weight.shape[:2]
        _check("weight", weight, None)
        _check("second moment of the inputs", moment, k)
        _check("gains of the outputs", gains, n)
        _check("second moment of the outputs", outputs, n)
        if ranks is not None and min(ranks) < 1:
            raise ValueError(f"ranks are {ranks}; a rank is at least 1")
        return self._split(weight, moment, gains, outputs, ranks)

    @abstractmethod
    def _split(
        self,
        weight: Tensor,
        moment: Tensor | None,
        gains: Tensor | None,
        outputs: Tensor | None,
        ranks: Ranks | None,
    ) -> Factors:
        """`split`, of arguments that are finite and fit."""

    @abstractmethod
    def merge(self, factors: Mapping[str, Tensor], ranks: Ranks | None = None) -> Tensor:
        """The weight that the first components stand for; None: all of them."""

    @abstractmethod
    def break_even(self, shape: tuple[int, ...]) -> float:
        """The largest rank (of a square choice) at which the factors are fewer elements."""

    def residual(self, weight: Tensor, factors: Mapping[str, Tensor], ranks: Ranks) -> Tensor:
        """The weight minus its approximation at these ranks."""
        return weight - self.merge(factors, ranks)


def _check(what: str, value: Tensor | None, side: int | None) -> None:
    """Refuse values that are not finite, and metrics that are not [side, side]."""
    if value is None:
        return
    if side is not None and tuple(value.shape) != (side, side):
        raise ValueError(f"the {what} are {tuple(value.shape)}; this weight needs [{side}, {side}]")
    if not bool(torch.isfinite(value).all()):
        raise T3CError(
            f"the {what} hold NaN or infinity; leave out the samples that bring them, or check the "
            "model"
        )


def second_moment(samples: Tensor) -> Tensor:
    """E[x x^T] over all rows of samples [..., k], in float64."""
    rows = samples.detach().reshape(-1, samples.shape[-1]).double()
    return rows.t() @ rows / max(len(rows), 1)


def damped(moment: Tensor, damping: float) -> Tensor:
    """Moment + damping * mean(diagonal) * I, in the moment's type; identity where it is zero."""
    a = moment.detach().clone()
    mean = float(a.diagonal().mean())
    if mean <= 0:
        return torch.eye(len(a), dtype=a.dtype, device=a.device)
    a.diagonal().add_(damping * mean)
    return a


def lower_root(a: Tensor) -> Tensor:
    """Lower Cholesky factor in float32, computed in float64: a is often nearly singular."""
    root: Tensor = torch.linalg.cholesky(a.double()).float()
    return root


def principal(gram: Callable[[torch.dtype], Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """The first `rank` eigenvalues and vectors, float32, of a positive semidefinite matrix.

    In float32, and once more in float64 where float32 does not resolve the last of them.

    Args:
        gram: Makes the matrix in the type that is asked for.
        rank: How many components are wanted.
    """
    values, vectors = descending(gram(torch.float32))
    if float(values[rank - 1]) < RESOLVED * float(values[0]):
        values, vectors = descending(gram(torch.float64))
    return values[:rank].float(), vectors[:, :rank].float()


def descending(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at 0) and vectors of a symmetric matrix, largest first."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def balance(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Scale columns of `left` and rows of `right` so that their norms are equal."""
    a, b = left.norm(dim=0), right.flatten(1).norm(dim=1)
    live = (a > 0) & (b > 0)
    root = torch.where(live, torch.sqrt(b / a.clamp_min(1e-30)), torch.ones_like(a))
    return left * root, right / root.reshape(-1, *[1] * (right.dim() - 1))


def split_root(values: Tensor) -> Tensor:
    """Fourth roots of eigenvalues (roots of singular values), kept from zero to divide by them."""
    root = values.sqrt().sqrt()
    top = float(root[0]) if len(root) else 0.0
    return root.clamp_min(top * 1e-4) if top > 0 else torch.ones_like(root)
