"""A site's role is told by the graph around it, whatever the site is called."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from t3c.api import elasticize
from t3c.elastic.model import ElasticModel
from t3c.elastic.roles import ROLES, alike, matching, roles


class _Block(nn.Module):
    """Attention and a gated product, with norms; names tell nothing."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))
        self.e, self.f, self.g = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.all = nn.Linear(32, 96)
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], 4, 8).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        parts = self.all(h).chunk(3, -1) if self.fused else (self.a(h), self.b(h), self.c(h))
        q, k, v = (self.split(part) for part in parts)
        y = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.d(y.transpose(1, 2).flatten(2))
        h = self.second(x)
        result: Tensor = x + self.g(functional.silu(self.e(h)) * self.f(h))
        return result


class _Text(nn.Module):
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(_Block(fused) for _ in range(2))
        self.norm, self.z = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.z(self.norm(x)[:, 0]).softmax(-1)
        return found


class _Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.y, self.w, self.z = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.x(image)
        x = x + self.w(functional.relu(self.y(x)))
        found: Tensor = self.z(x.mean((2, 3)))
        return found


@cache
def text(fused: bool = False) -> ElasticModel:
    torch.manual_seed(0)
    return elasticize(_Text(fused).eval(), (torch.randint(50, (1, 6)),))


BLOCK = {"d": "attention-output", "e": "up", "f": "up", "g": "down"}


def test_layers_of_a_transformer_have_roles_from_the_first_block_to_the_head() -> None:
    found = roles(text())
    for i in range(2):
        want = {"a": "query", "b": "key", "c": "value", **BLOCK}
        assert {k: found[f"blocks.{i}.{k}"] for k in want} == want
    assert found["z"] == "head"
    assert set(found.values()) <= set(ROLES)


def test_one_layer_for_queries_keys_and_values_is_told() -> None:
    found = roles(text(fused=True))
    assert found["blocks.0.all"] == found["blocks.1.all"] == "qkv"
    assert {k: found[f"blocks.1.{k}"] for k in BLOCK} == BLOCK


def test_a_convolutional_network_has_a_stem_and_a_head() -> None:
    found = roles(elasticize(_Image().eval(), (torch.randn(1, 3, 8, 8),)))
    assert found == {"x.0": "stem", "y": "pointwise", "w": "conv", "z": "head"}


def test_a_plain_stack_has_hidden_layers_and_a_lonely_one_is_its_head() -> None:
    stack = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(16, 16), nn.ReLU())))
    found = roles(elasticize(stack.eval(), (torch.randn(2, 16),)))
    assert list(found.values()) == ["stem", "hidden", "hidden", "head"]
    assert list(roles(elasticize(stack[:1].eval(), (torch.randn(2, 16),))).values()) == ["head"]


def test_sites_of_one_role_and_shape_are_alike_and_each_is_once_there() -> None:
    model = text()
    groups = alike(model)
    assert ("blocks.0.a", "blocks.1.a") in groups
    assert ("blocks.0.e", "blocks.0.f", "blocks.1.e", "blocks.1.f") in groups
    assert sorted(name for names in groups for name in names) == sorted(model.sites)


def test_sites_are_chosen_by_role_or_path_and_what_names_none_is_refused() -> None:
    model = text()
    assert matching(model, ()) == frozenset()
    assert matching(model, ["head", "down"]) == {"z", "blocks.0.g", "blocks.1.g"}
    assert matching(model, ["blocks.1.*", "head"]) == {f"blocks.1.{k}" for k in "abcdefg"} | {"z"}
    with pytest.raises(ValueError, match=r"'stem', which is .* query \(2\), .*head \(1\)"):
        matching(model, ["stem"])
