"""Places of fixed grids: one for each input of a convolution, shared by all who read it."""

import pytest
import torch
from torch import Tensor, nn

from t3c.core.formats import Dense
from t3c.core.grid import Grid
from t3c.elastic.fake_quant import snap
from t3c.elastic.model import ElasticModel
from t3c.passes.pipeline import lowering_graph
from t3c.passes.torch_ops import SNAP
from tests.front import elasticize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.tied, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.stem(x)), 2)
        y = torch.relu(self.a(x) + self.b(x)) + x
        y = self.tied(self.tied(y))
        out: Tensor = self.head(y.mean((2, 3)))
        return out


@pytest.fixture
def elastic() -> ElasticModel:
    torch.manual_seed(0)
    return elasticize(Net().eval(), (torch.randn(2, 3, 10, 10),))


def test_places(elastic: ElasticModel) -> None:
    found = {n: (s.signed, s.readers, s.around) for n, s in elastic.snaps.items()}
    assert found == {
        "x": (True, ("stem",), ("stem",)),
        "relu": (False, ("a", "b"), ("a", "b")),  # above the pooling
        "sites_b": (True, (), ("a", "b")),  # the residual of a
    }


def test_a_place_without_a_grid_changes_nothing(elastic: ElasticModel) -> None:
    formats = {name: Dense() for name in elastic.sites}
    with elastic.using(formats):
        assert not any(layer.grids for layer in elastic.layers.values())
        assert all(s.active for s in elastic.snaps.values())
    graph = lowering_graph(elastic.graph)
    assert not [n for n in graph.graph.nodes if n.target == SNAP]


def test_all_readers_see_the_rounded_value(elastic: ElasticModel) -> None:
    grid = Grid.up_to(2.0, signed=False)
    elastic.set_grids({"relu": grid})
    seen: list[Tensor] = []
    for name in ("a", "b"):
        elastic.layers[name].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with elastic.using({name: Dense() for name in elastic.sites}):
        elastic.graph(*elastic.example_inputs)
    assert len(seen) == 2
    for x in seen:
        assert torch.equal(x, snap(x, grid))
    assert elastic.layers["a"].grids == {"x": grid}


def test_float_readers_keep_it_float(elastic: ElasticModel) -> None:
    elastic.set_grids({"relu": Grid.up_to(2.0, signed=False)})
    with elastic.using({"a": Dense()}):
        assert not elastic.snaps["relu"].active
    with elastic.using(None):
        assert not elastic.snaps["x"].active
    with elastic.using({name: Dense() for name in elastic.sites}, quantize=False):
        assert not elastic.snaps["relu"].active


def test_unknown_places_are_refused(elastic: ElasticModel) -> None:
    with pytest.raises(ValueError, match="no place 'conv9' for a grid; there are x, relu"):
        elastic.set_grids({"conv9": Grid.up_to(1.0, signed=True)})


def test_grids_refuse_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="largest activation is nan"):
        Grid.up_to(float("nan"), signed=True)
    assert Grid.up_to(0.0, signed=False).scale > 0


def test_the_lowering_graph_rounds_too(elastic: ElasticModel) -> None:
    elastic.set_grids({"x": Grid.up_to(3.0, signed=True)})
    graph = lowering_graph(elastic.graph)
    (node,) = [n for n in graph.graph.nodes if n.target == SNAP]
    assert node.args[1] == "x"
