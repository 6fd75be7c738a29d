"""Embedding tables that profiles read in int8: placed, rounded in profiles only, lowered."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import t3c
from t3c import api, targets
from t3c.core.formats import Dense
from t3c.elastic.table import Table
from t3c.passes.base import AbstractPass
from t3c.passes.place_tables import PlaceTables
from t3c.targets.x86 import AMX, VNNI
from tests.passes.conformance import PassConformance, captured_graph


class Net(nn.Module):
    """A large table, read twice, and a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(1100, 64), nn.Embedding(2, 64)
        self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.kinds(ids % 2) + self.words(ids + 1)
        return torch.as_tensor(self.b(self.a(x).relu()))


IDS = torch.arange(7).reshape(1, 7) * 31


class TestPlaceTables(PassConformance):
    @pytest.fixture
    def step(self) -> AbstractPass:
        return PlaceTables(Table)

    @pytest.fixture
    def inputs(self) -> list[Tensor]:
        return [IDS]

    @pytest.fixture
    def graph(self, inputs: list[Tensor]) -> fx.GraphModule:
        return captured_graph(Net(), inputs)


def test_tables_are_rounded_where_every_site_is() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    elastic = api.elasticize(model, (IDS,), tables=True)
    (table,) = elastic.tables.values()
    assert table.weight.shape == (1100, 64)
    assert [r.where for r in elastic.report.rows if r.op == "embedding"] == ["words.weight"]
    formats = {name: Dense() for name in elastic.sites}
    torch.testing.assert_close(elastic(IDS), model(IDS))
    with elastic.using({"a": Dense()}):
        assert not table.active
    with elastic.using(formats):
        assert table.active
        rows = table(IDS)
    assert not table.active
    steps = table.weight.abs().amax(1)[IDS] / 127
    assert torch.all((rows - table(IDS)).abs() <= 0.501 * steps[..., None])
    assert not api.elasticize(model, (IDS,)).tables


def test_a_quarter_of_the_bytes_is_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = targets.detect_host()
    spec = VNNI if spec.name == AMX.name else spec
    sizes = [
        t3c.lower(
            Net(),
            spec,
            (IDS,),
            tmp_path / str(tables),
            tables=tables,
            profiles=1,
            plan_seconds=1,
            calls=0,
        )
        .manifest.profiles[0]
        .profile.storage_bytes
        for tables in (False, True)
    ]
    assert sizes[0] - sizes[1] == pytest.approx(1100 * 64 * 3 - 1100 * 4, abs=64)
