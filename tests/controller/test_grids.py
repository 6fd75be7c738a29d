"""Grids from calibration data: the least squared error, for places and inner steps."""

import pytest
import torch
from torch import nn

from t3c.controller.grids import fit_grids
from t3c.core.errors import T3CError
from t3c.core.formats import Dense, Format, Tucker2
from t3c.elastic.model import ElasticModel
from tests.front import elasticize


def network() -> ElasticModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1))
    return elasticize(model.eval(), (torch.randn(1, 4, 12, 12),))


def test_static_grids_are_about_as_good_as_dynamic_scales() -> None:
    elastic = network()
    batch = elastic.example_inputs
    with torch.no_grad():
        (want,) = elastic.graph(*batch)
    formats = {name: Dense() for name in elastic.sites}

    def error() -> float:
        with elastic.using(formats), torch.no_grad():
            (got,) = elastic.graph(*batch)
        return float((got - want).norm() / want.norm())

    dynamic = error()
    grids = fit_grids(elastic, [batch])
    elastic.set_grids(grids)
    assert set(grids) == {"input_1", "relu"}
    assert 0 < error() < 1.2 * dynamic


def test_inner_steps_have_grids() -> None:
    elastic = network()
    elastic.layers["2"].factorize(Tucker2)
    grids = fit_grids(elastic, [elastic.example_inputs])
    assert {"2:reduce", "2:core"} <= set(grids)
    elastic.set_grids(grids)
    formats: dict[str, Format] = {"0": Dense(), "2": Tucker2(16, 16)}
    with elastic.using(formats), torch.no_grad():
        (got,) = elastic.graph(*elastic.example_inputs)
    with torch.no_grad():
        (want,) = elastic.graph(*elastic.example_inputs)
    assert float((got - want).norm() / want.norm()) < 0.05
    assert set(elastic.codes("2", [Tucker2(16, 16)]).grids) == {"x", "reduce", "core"}


def test_values_that_are_not_finite_are_refused() -> None:
    elastic = network()
    x = torch.full((1, 4, 12, 12), float("inf"))
    with pytest.raises(T3CError, match="activations at 'input_1' are not finite"):
        fit_grids(elastic, [(x,)])
