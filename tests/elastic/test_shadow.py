"""The reference follows a library and notices what is wrong with it."""

import torch
from torch import Tensor, nn

from t3c.core.formats import Dense
from t3c.elastic.model import ElasticModel
from t3c.elastic.shadow import Agreement, shadow
from tests.front import elasticize


class Net(nn.Module):
    """Two linear layers and a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(torch.relu(self.a(x))))  # type: ignore[no-any-return]


def _library(elastic: ElasticModel, x: Tensor, spoil: float = 0.0) -> tuple[list[Tensor], Tensor]:
    """What a probe function would return; `spoil` is added to the input of the second layer."""
    a, b = elastic.layers["a"], elastic.layers["b"]
    hidden = nn.functional.layer_norm(torch.relu(a(x)), (32,), *_affine(elastic)) + spoil
    return [x, hidden], b(hidden)


def _affine(elastic: ElasticModel) -> tuple[Tensor, Tensor]:
    found = dict(elastic.graph.named_parameters())
    return found["norm.weight"], found["norm.bias"]


def _follow(spoil: float = 0.0, output: float = 0.0) -> Agreement:
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    elastic = elasticize(Net().eval(), (x,))
    with elastic.using({"a": Dense(), "b": Dense()}), torch.no_grad():
        taps, y = _library(elastic, x, spoil)
        return shadow(elastic, (x,), ("a", "b"), taps, {"y": y + output})


def test_a_right_library_agrees_everywhere() -> None:
    seen = _follow()
    assert seen.worst < 1e-6
    assert seen.stretches == 3


def test_a_wrong_stretch_is_named_and_does_not_spoil_the_next() -> None:
    seen = _follow(spoil=0.1)
    assert seen.where == "b"
    assert seen.worst > 0.05


def test_a_wrong_output_is_named() -> None:
    seen = _follow(output=0.5)
    assert seen.where == "y"
    assert seen.worst > 0.1


def test_nan_is_the_worst() -> None:
    assert _follow(output=float("nan")).where == "y"
