from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from t3c.core.formats import Dense, LowRank
from t3c.elastic.factorize.base import second_moment
from t3c.elastic.model import ElasticModel
from tests.front import elasticize


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture(scope="module")
def shared(model: nn.Module) -> ElasticModel:
    return elasticize(model, (torch.randn(4, 6),))


@pytest.fixture
def elastic(shared: ElasticModel) -> ElasticModel:
    """A fresh copy: some tests change factors or weights."""
    return ElasticModel(deepcopy(shared.graph), shared.captured, shared.report)


X = torch.randn(4, 6)


def test_call_equals_the_model(model: nn.Module, elastic: ElasticModel) -> None:
    torch.testing.assert_close(elastic(X), model(X))
    assert list(elastic.sites) == ["0", "2"]
    assert len(elastic.report.of("rewritten")) == 2
    assert len(elastic.example_inputs) == 1


def test_using_changes_formats_only_inside(elastic: ElasticModel) -> None:
    with torch.no_grad():
        before = elastic(X)
        with elastic.using({"0": LowRank(2), "2": Dense()}):
            inside = elastic(X)
            with elastic.using(None):
                assert torch.equal(elastic(X), before)
            assert torch.equal(elastic(X), inside)
        assert not torch.equal(inside, before)
        assert torch.equal(elastic(X), before)


def test_a_twin_shares_weights_and_has_formats_of_its_own(elastic: ElasticModel) -> None:
    with torch.no_grad():
        before = elastic(X)
        low = elastic.layers["0"].factor("low")
        twin = elastic.twin()
        assert twin.layers["0"].weight is elastic.layers["0"].weight
        assert twin.layers["0"].factor("low") is low
        with twin.using({"0": LowRank(2)}):
            inside = twin(X)
            assert torch.equal(elastic(X), before)
        with elastic.using({"0": LowRank(2)}):
            assert torch.equal(elastic(X), inside)
            assert torch.equal(twin(X), before)


def test_using_reverts_after_an_exception(elastic: ElasticModel) -> None:
    with torch.no_grad():
        before = elastic(X)
        with pytest.raises(KeyError), elastic.using({"0": LowRank(1)}):
            raise KeyError("stop")
        assert torch.equal(elastic(X), before)


def test_float_factors_differ_from_integers(elastic: ElasticModel) -> None:
    with torch.no_grad():
        with elastic.using({"0": LowRank(6), "2": LowRank(3)}, quantize=False):
            torch.testing.assert_close(elastic(X), elastic.graph(X)[0])
            smooth = elastic(X)
        with elastic.using({"0": LowRank(6), "2": LowRank(3)}):
            assert not torch.equal(elastic(X), smooth)
    torch.testing.assert_close(smooth, elastic(X).detach(), rtol=1e-4, atol=1e-5)


def test_unknown_site_or_rank_is_refused_before_anything_changes(elastic: ElasticModel) -> None:
    with pytest.raises(ValueError, match="no site 'x'"), elastic.using({"x": Dense()}):
        pass
    with pytest.raises(ValueError, match="largest is 6"), elastic.using({"0": LowRank(7)}):
        pass
    assert all(layer.format is None for layer in elastic.layers.values())


def test_moments_and_factors_replace_the_plain_ones(elastic: ElasticModel) -> None:
    moment = second_moment(X * torch.tensor([10.0, 1, 1, 1, 0.1, 0.1]))
    plain = elastic.layers["0"].factor("low").clone()
    elastic.set_factors("0", moment=moment)
    white = elastic.layers["0"].factor("low")
    assert not torch.allclose(plain, white)
    elastic.set_factors("0", {"low": torch.zeros(2, 6), "high": torch.zeros(8, 2)})
    assert elastic.codes("0", [LowRank(2)]).low is not None


def test_training_the_elastic_model_leaves_the_users_alone(
    model: nn.Module, elastic: ElasticModel
) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for p in elastic.parameters():
            p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_full_structure_returns() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 2)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"y": self.fc(x) * scale}

    two = Two().eval()
    elastic = elasticize(two, (X,), {"scale": torch.tensor(2.0)})
    got = elastic(x=X, scale=torch.tensor(3.0))
    torch.testing.assert_close(got["y"], two(X, torch.tensor(3.0))["y"])


def test_factors_first_used_in_inference_mode_can_be_lowered() -> None:
    x = torch.randn(4, 32)
    elastic = elasticize(nn.Sequential(nn.Linear(32, 16)).eval(), (x,))
    (site,) = elastic.sites
    with torch.inference_mode(), elastic.using({site: LowRank(8)}):
        elastic(x)
    low = elastic.codes(site, [LowRank(8)]).low
    assert low is not None
    assert low.q.shape == (8, 32)
