"""One input factor for layers that read the same tensor, such as queries, keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, final

import torch
from torch import Tensor

from t3c.elastic.factorize.base import Factors, Ranks, damped
from t3c.elastic.factorize.whitened_svd import AbstractWeighedSvd


@final
@dataclass(frozen=True, slots=True)
class SharedInputSvd(AbstractWeighedSvd):
    """[W1; W2; ...] ~ [U1; U2; ...] V: one thin product V x where there were several.

    `split` takes the stacked weight, `together` the layers. All have the same rank.

    Attributes:
        gains_damping: Added to the diagonal of each layer's gains, as a share of its mean.
    """

    name: ClassVar[str] = "shared-input-svd"
    gains_damping: float = 0.03

    def together(
        self,
        weights: Sequence[Tensor],
        moment: Tensor | None = None,
        *,
        gains: Sequence[Tensor] | None = None,
        ranks: Ranks | None = None,
    ) -> list[Factors]:
        """Factors of each layer; ``low`` is one tensor for all.

        Args:
            weights: [n_i, k] each.
            moment: Second moment of the tensor that they all read, [k, k]; None: identity.
            gains: Second moments of the gradients at the outputs, [n_i, n_i] each, in one unit:
                how much a layer counts against the others is in them. None: identity.
            ranks: The largest rank wanted; None: all.

        Raises:
            T3CError: The weights, the moment or the gains are not finite.
            ValueError: There are fewer than two layers, their inputs differ, gains are not one for
                each, or something does not fit the stack.
        """
        if len(weights) < 2:
            raise ValueError(f"{len(weights)} layer has nothing to share; give at least two")
        if len({w.shape[1] for w in weights}) > 1:
            raise ValueError(
                f"inputs of the layers are {[w.shape[1] for w in weights]} wide; a shared factor "
                "needs layers that read the same tensor"
            )
        if gains is not None and len(gains) != len(weights):
            raise ValueError(f"{len(gains)} gains for {len(weights)} layers; give one for each")
        metric = None
        if gains is not None:
            metric = _blocks([damped(g, self.gains_damping) for g in gains])
        stack = torch.cat([w.detach().flatten(1) for w in weights])
        made = self.split(stack, moment, gains=metric, ranks=ranks)
        ends = list(accumulate(len(w) for w in weights))
        parts = [made["high"][end - len(w) : end] for w, end in zip(weights, ends, strict=True)]
        return [{"low": made["low"], "high": part.contiguous()} for part in parts]


def _blocks(parts: Sequence[Tensor]) -> Tensor:
    """The square matrices along one diagonal."""
    side = sum(len(part) for part in parts)
    found, at = parts[0].new_zeros(side, side), 0
    for part in parts:
        found[at : at + len(part), at : at + len(part)] = part
        at += len(part)
    return found


SHARED_INPUT_SVD = SharedInputSvd()
