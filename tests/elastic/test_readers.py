"""Which sites read the same tensor."""

import torch
from torch import Tensor, nn

from t3c.api import elasticize
from t3c.elastic.readers import same_input


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h.reshape(-1, 8)).reshape(h.shape), self.v(h)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        out: Tensor = self.out(mixed)
        return out


def test_queries_keys_and_values_are_one_group_and_others_are_none() -> None:
    elastic = elasticize(_Attention().eval(), (torch.randn(2, 5, 8),))
    assert same_input(elastic) == [("q", "k", "v")]


class _Apart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(4, 8)
        self.tied = nn.Linear(8, 8)
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, ...]:
        return (
            self.a(x), self.b(x.reshape(-1, 4)), self.tied(x), self.tied(x + 1), self.conv(image)
        )  # fmt: skip


def test_other_row_lengths_second_calls_and_convolutions_share_nothing() -> None:
    calls = (torch.randn(3, 8), torch.randn(1, 8, 2, 2))
    elastic = elasticize(_Apart().eval(), calls)
    assert {"a", "b", "tied"} <= set(elastic.sites)
    assert same_input(elastic) == []
