import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from t3c.core.errors import CostModelError
from t3c.core.formats import Dense
from t3c.core.profile import Label
from t3c.core.sites import LinearSite
from t3c.cost_models.base import Row, Work
from t3c.cost_models.dataset import Dataset, KernelRow, ProfileRow
from t3c.cost_models.design import design
from t3c.cost_models.features import kind_of
from t3c.cost_models.learned import LearnedModel
from t3c.cost_models.scores import rivals, transfer_report
from t3c.cost_models.transfer import ASSUMED, spread_out, transfer
from t3c.targets.arm import DOTPROD
from t3c.targets.x86 import AVX2, VNNI
from tests.conformance.cost_model import CostModelConformance
from tests.cost_models.measured import DEVICE, dataset, profiles, sample, true_seconds
from tests.cost_models.test_learned import larger

OTHER = replace(DEVICE, cpu="Other 1/2/4")


def other_seconds(row: Row) -> float:
    """The other device: products take longer than bytes and calls do, convolutions longer still."""
    longer = 1.8 * (1.6 if not isinstance(row.site, LinearSite) else 1.0)
    return longer * true_seconds(row) + 2e-11 * row.site.elements(row.format)


def other(count: int, seed: int = 0, noise: float = 0.03) -> list[KernelRow]:
    """Few rows, spread over all kinds."""
    rng = np.random.default_rng(seed + 100)
    chosen = spread_out(design(240, VNNI.rank_step, seed=seed), count)
    return [
        KernelRow(row, sample(other_seconds(row) * math.exp(noise * rng.standard_normal())), 8, g)
        for row, g in chosen
    ]


def other_profiles() -> list[ProfileRow]:
    found = []
    for p in profiles(10):
        inside = 1.1 * math.fsum(map(other_seconds, p.layers))
        whole = inside + 1.5 * (p.seconds.p50_s - 1.1 * math.fsum(map(true_seconds, p.layers)))
        found.append(replace(p, seconds=sample(whole), inside_s=inside))
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LearnedModel:
    made = dataset(tmp_path_factory.mktemp("rows") / "rows.jsonl", 160, 8)
    return LearnedModel.learn(made, VNNI)


@pytest.fixture(scope="module")
def moved(base: LearnedModel) -> LearnedModel:
    return transfer(base, other(40), other_profiles(), VNNI, OTHER)


class TestTransferred(CostModelConformance):
    @pytest.fixture
    def model(self, moved: LearnedModel) -> LearnedModel:
        return moved

    @pytest.fixture
    def rows(self) -> Sequence[Row]:
        return [row for row, _ in design(60, VNNI.rank_step, seed=3)]


class TestWithoutAMeasurement(TestTransferred):
    @pytest.fixture
    def model(self, base: LearnedModel) -> LearnedModel:
        return transfer(base, [], [], AVX2, OTHER)


def error(predicted: Sequence[float], rows: Sequence[Row]) -> float:
    times = np.array([other_seconds(row) for row in rows])
    return float(np.mean(np.abs(np.array(predicted) / times - 1)))


def test_a_few_rows_are_worth_more_with_the_other_device_than_alone(base: LearnedModel) -> None:
    rows = [row for row, _ in design(150, VNNI.rank_step, seed=9)]
    seen = other(20)
    model = transfer(base, seen, [], VNNI, OTHER)
    mine = error(model.predict(rows), rows)
    others = {name: error(p, rows) for name, p in rivals(base, seen, rows, VNNI).items()}
    assert set(others) == {
        "other device, one factor", "roofline", "roofline, fitted", "fitted alone",
    }  # fmt: skip
    assert all(mine < 0.7 * value for value in others.values())


def test_more_rows_tell_more_and_none_give_the_ratio_of_the_constants(base: LearnedModel) -> None:
    rows = [row for row, _ in design(150, VNNI.rank_step, seed=9)]
    errors = [
        error(transfer(base, other(n), [], VNNI, OTHER).predict(rows), rows) for n in (0, 5, 20)
    ]
    assert errors[0] > errors[1] > errors[2]
    same = transfer(base, [], [], VNNI, OTHER)
    np.testing.assert_allclose(same.predict(rows), base.predict(rows), rtol=0.1)
    slower = transfer(base, [], [], AVX2, OTHER)
    assert np.median(np.array(slower.predict(rows)) / base.predict(rows)) > 2


def test_rank_bits_and_batch_never_make_a_layer_faster(moved: LearnedModel) -> None:
    rng = np.random.default_rng(0)
    drawn = [row for row, _ in design(600, VNNI.rank_step, seed=11)]
    small = [drawn[int(i)] for i in rng.integers(len(drawn), size=2_000)]
    more = [larger(row, rng) for row in small]
    assert all(a <= b for a, b in zip(moved.predict(small), moved.predict(more), strict=True))


def test_intervals_come_from_rows_of_the_new_device_or_say_that_they_are_assumed(
    base: LearnedModel, moved: LearnedModel
) -> None:
    none = transfer(base, other(8), [], VNNI, OTHER)
    assert (none.spread, none.spread_label) == (ASSUMED, Label.ESTIMATED)
    assert none.network_spread_label is Label.ESTIMATED
    assert moved.spread_label is moved.network_spread_label is Label.MEASURED
    several = transfer(base, other(8), other_profiles()[:4], VNNI, OTHER)
    assert several.network_spread_label is Label.ESTIMATED
    assert 0 < several.network_spread < ASSUMED
    new = other(150, seed=21)
    held = [
        low <= k.seconds.p50_s <= high
        for k, (low, high) in zip(new, moved.predict_interval([k.row for k in new]), strict=True)
    ]
    assert 0.8 < np.mean(held) <= 1.0
    assert moved.spread < 0.4


def test_one_odd_measurement_does_not_decide(base: LearnedModel) -> None:
    rows = [row for row, _ in design(100, VNNI.rank_step, seed=9)]
    seen = other(20)
    odd = replace(seen[3], seconds=sample(40 * seen[3].seconds.p50_s))
    model = transfer(base, [*seen[:3], odd, *seen[4:]], [], VNNI, OTHER)
    calm = transfer(base, seen, [], VNNI, OTHER)
    assert error(model.predict(rows), rows) < error(calm.predict(rows), rows) + 0.1


def test_networks_are_composed_with_what_is_measured_of_few(moved: LearnedModel) -> None:
    for p in other_profiles()[2:]:
        assert abs(moved.predict_network(p.layers, p.rest) / p.seconds.p50_s - 1) < 0.15


def test_the_file_says_what_it_was_transferred_from(moved: LearnedModel, tmp_path: Path) -> None:
    moved.save(tmp_path / "model.json")
    document = json.loads((tmp_path / "model.json").read_text())
    assert document["transferred_from"]["device"] == DEVICE.to_json()
    assert document["device"] == OTHER.to_json()
    assert LearnedModel.load(tmp_path / "model.json") == moved
    moved.check(OTHER)
    with pytest.raises(CostModelError, match="stale here"):
        moved.check(DEVICE)


def test_what_cannot_be_transferred_is_refused(base: LearnedModel, moved: LearnedModel) -> None:
    with pytest.raises(CostModelError, match="fitted to no device"):
        transfer(LearnedModel.of(VNNI), [], [], VNNI, OTHER)
    with pytest.raises(CostModelError, match="itself transferred from"):
        transfer(moved, [], [], VNNI, OTHER)
    with pytest.raises(CostModelError, match=r"of an 'x86' device, the target 'arm' is 'arm'"):
        transfer(base, [], [], DOTPROD, OTHER)
    told = transfer(base, [], [], DOTPROD, OTHER, any_family=True)
    assert told.predict([Row(LinearSite("", 64, 64, 4, True), Dense(8))])[0] > 0


def test_few_rows_are_of_all_kinds_and_of_many_shapes() -> None:
    drawn = design(480, VNNI.rank_step)
    kinds = {kind_of(row) for row, _ in drawn}
    few = spread_out(drawn, len(kinds) + 10)
    assert {kind_of(row) for row, _ in few} >= kinds - {"conv cp kxk"}
    assert len({group for _, group in few}) > 0.9 * len(few)
    assert len(set(few)) == len(few)
    assert spread_out(drawn[:4], 9) == spread_out(drawn[:4], 4)


def test_the_report_judges_on_rows_of_the_new_device(base: LearnedModel, tmp_path: Path) -> None:
    made = Dataset.open(tmp_path / "few.jsonl", OTHER, print, base.device)
    made.append([*other(15), *other_profiles()[:4]], OTHER)
    assert Dataset.read(made.path).source == DEVICE
    found = transfer_report(base, Dataset.read(made.path), VNNI)
    kernel, network = found.kernels.scores, found.networks.scores
    assert kernel["learned"].mape < kernel["other device, one factor"].mape
    assert kernel["learned"].coverage > 0.5
    assert network["learned"].rows == 4
    assert len(found.kernels.guesses) == 15


def test_a_model_of_schema_1_is_still_read(base: LearnedModel) -> None:
    document = base.to_json()
    for name in ("transferred_from", "energy", "spread_label", "network_spread_label"):
        del document[name]
    assert LearnedModel.from_json({**document, "schema": 1}) == base


def test_a_device_without_rest_of_networks_is_composed_by_the_constants(
    base: LearnedModel,
) -> None:
    bare = replace(base, network=())
    model = transfer(bare, other(10), other_profiles(), VNNI, OTHER)
    assert model.network == ()
    assert model.predict_rest(Work(1000, 1000, 1)) > 0
