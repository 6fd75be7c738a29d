"""The elastic linear layer."""

from math import ceil
from typing import final

from torch import Tensor
from torch.nn import functional

from t3c.core.codes import GROUP
from t3c.core.formats import Dense, Format, LowRank
from t3c.core.sites import LinearSite
from t3c.elastic import fake_quant
from t3c.elastic.layer import ElasticLayer


@final
class ElasticLinear(ElasticLayer):
    """y = W x + b with W dense or high low, in float or on integers."""

    site: LinearSite

    def __init__(self, site: LinearSite, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take over the weight [n, k] and the bias [n]."""
        if tuple(weight.shape) != (site.n, site.k):
            raise ValueError(
                f"site {site.name!r} is {site.n}x{site.k}, its weight {tuple(weight.shape)}"
            )
        super().__init__(site, weight, bias)

    def most(self, fmt: Format) -> tuple[int, int]:
        """What the factors reach, or full rank."""
        rank = self.reach("low", self.site.full_rank)
        return rank, rank

    def factorizer(self, kind: type[Format]) -> str:
        """The one that was chosen for low ranks."""
        return self.thin

    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"low": (None, self.site.k), "high": (self.site.n, None)}

    def _smooth(self, x: Tensor, fmt: Format | None) -> Tensor:
        if not isinstance(fmt, LowRank):
            return functional.linear(x, self.weight, self.bias)
        middle = functional.linear(x, self.factor("low")[: fmt.rank])
        return functional.linear(middle, self.factor("high")[:, : fmt.rank], self.bias)

    def _integer(self, x: Tensor, fmt: Format) -> Tensor:
        bias = None if self.bias is None else self.bias.detach()
        x = x.detach()
        if isinstance(fmt, Dense):
            return fake_quant.linear(x, self.codes_of("weight", fmt.bits), bias)
        rank = int(fmt.ranks[0])
        low, low_scale = self.codes_of("low", fmt.bits)
        high, high_scale = self.codes_of("high", fmt.bits)
        if fmt.bits == 4:
            high_scale = high_scale[:, : ceil(rank / GROUP)]
        middle = fake_quant.linear(x, (low[:rank], low_scale[:rank]))
        return fake_quant.linear(middle, (high[:, :rank].contiguous(), high_scale), bias)
