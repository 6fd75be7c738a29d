import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from t3c.core.errors import CostModelError
from t3c.core.formats import Dense, LowRank
from t3c.core.sites import ConvSite, LinearSite
from t3c.cost_models import cost_model
from t3c.cost_models.base import Row, Work
from t3c.cost_models.dataset import Dataset
from t3c.cost_models.design import design
from t3c.cost_models.learned import LearnedModel, conformal
from t3c.cost_models.roofline import RooflineModel
from t3c.targets.x86 import VNNI
from tests.conformance.cost_model import CostModelConformance, wider
from tests.cost_models.measured import DEVICE, dataset, kernels, true_seconds


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> LearnedModel:
    made = dataset(tmp_path_factory.mktemp("rows") / "rows.jsonl", 160, 8)
    return LearnedModel.learn(made, VNNI)


class TestLearned(CostModelConformance):
    @pytest.fixture
    def model(self, learned: LearnedModel) -> LearnedModel:
        return learned

    @pytest.fixture
    def rows(self) -> Sequence[Row]:
        return [row for row, _ in design(60, VNNI.rank_step, seed=3)]


class TestBeforeAnyFit(TestLearned):
    @pytest.fixture
    def model(self) -> LearnedModel:
        found = cost_model(VNNI, "learned")
        assert isinstance(found, LearnedModel)
        return found


def error(predicted: Sequence[float], rows: Sequence[Row]) -> float:
    times = np.array([true_seconds(row) for row in rows])
    return float(np.mean(np.abs(np.array(predicted) / times - 1)))


def test_shapes_that_it_has_not_seen_are_nearer_than_by_a_fitted_roofline(
    learned: LearnedModel,
) -> None:
    seen = kernels(160)
    roofline = RooflineModel(VNNI.roofline).fit(
        [k.row for k in seen], [k.seconds.p50_s for k in seen]
    )
    rows = [row for row, _ in design(150, VNNI.rank_step, seed=9)]
    assert error(learned.predict(rows), rows) < 0.5 * error(roofline.predict(rows), rows)


def larger(row: Row, rng: np.random.Generator) -> Row:
    """The row with more rank, bits or batch."""
    choice = rng.integers(3)
    if choice == 0 and not isinstance(row.format, Dense):
        return replace(row, format=wider(row.format, int(rng.integers(1, 200))))
    if choice == 1 and row.format.bits == 4:
        return replace(row, format=replace(row.format, bits=8))
    times = int(rng.integers(2, 6))
    if isinstance(row.site, LinearSite):
        return replace(row, site=replace(row.site, rows=row.site.rows * times))
    return replace(row, site=replace(row.site, batch=row.site.batch * times))


def test_rank_bits_and_batch_never_make_a_layer_faster(learned: LearnedModel) -> None:
    rng = np.random.default_rng(0)
    drawn = [row for row, _ in design(1200, VNNI.rank_step, seed=11)]
    small = [drawn[int(i)] for i in rng.integers(len(drawn), size=3_000)]
    pairs = zip(
        learned.predict(small), learned.predict([larger(row, rng) for row in small]), strict=True
    )
    assert sum(a > b for a, b in pairs) == 0


def test_intervals_hold_about_nine_tenths_of_new_kernels(learned: LearnedModel) -> None:
    new = kernels(400, seed=21)
    held = [
        low <= k.seconds.p50_s <= high
        for k, (low, high) in zip(new, learned.predict_interval([k.row for k in new]), strict=True)
    ]
    assert 0.8 < np.mean(held) < 0.99


def test_what_was_measured_wins_over_the_prediction(learned: LearnedModel, tmp_path: Path) -> None:
    seen = kernels(160)[7]
    new = replace(seen.row, threads=seen.row.threads + 1)
    blind = replace(learned, measured={})
    assert blind.predict([seen.row]) != [seen.seconds.p50_s]
    learned.save(tmp_path / "model.json")
    for model in (learned, LearnedModel.load(tmp_path / "model.json")):
        rows = [new, seen.row, new]
        guess = blind.predict([new])
        assert model.predict(rows) == [*guess, seen.seconds.p50_s, *guess]
        ends = model.predict_interval(rows)
        p50, p95 = seen.seconds.p50_s, seen.seconds.p95_s
        assert ends[1] == pytest.approx((p50 * p50 / p95, p95))
        assert [ends[0]] == blind.predict_interval([new])
    part, rest = Work(1000, 5000, 3), [seen.row]
    assert learned.predict_network(rest, part) == pytest.approx(
        learned.network[0] * seen.seconds.p50_s + learned.predict_rest(part)
    )


def test_a_conformal_quantile_needs_enough_errors() -> None:
    errors = np.arange(1.0, 20.0)
    assert conformal(errors, 0.9) == 18.0
    assert conformal(errors[:8], 0.9) == math.inf


def test_a_network_is_more_than_the_sum_of_its_layers(
    learned: LearnedModel, tmp_path: Path
) -> None:
    for p in dataset(tmp_path / "rows.jsonl", 40, 8).profiles[2:]:
        predicted = learned.predict_network(p.layers, p.rest)
        assert abs(predicted / p.seconds.p50_s - 1) < 0.1
        assert predicted > math.fsum(learned.predict(p.layers))


def test_few_rows_are_refused_by_number(tmp_path: Path) -> None:
    made = Dataset.open(tmp_path / "rows.jsonl", DEVICE, print)
    made.append(kernels(10), DEVICE)
    with pytest.raises(CostModelError, match=f"holds {len(made.rows)} kernels; .* at least 40"):
        LearnedModel.learn(made, VNNI)
    with pytest.raises(ValueError, match="got 1 rows, 2 times"):
        LearnedModel.of(VNNI).fit([kernels(1)[0].row], [1.0, 2.0])


def test_a_stale_model_is_refused(learned: LearnedModel) -> None:
    learned.check(DEVICE)
    learned.check(replace(DEVICE, threads=2))
    with pytest.raises(CostModelError, match=r"stale here: .* cpu 'Invented 1/2/3', not 'Other'"):
        learned.check(replace(DEVICE, cpu="Other"))
    with pytest.raises(CostModelError, match=r"stale here: .* versions"):
        learned.check(replace(DEVICE, versions={"t3c": "1", "apache-tvm": "3"}))
    LearnedModel.of(VNNI).check(DEVICE)


def test_damaged_other_and_newer_files_are_refused(learned: LearnedModel, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    learned.save(path)
    document = json.loads(path.read_text())
    assert LearnedModel.load(path) == learned
    path.write_text(json.dumps({**document, "spread": 0.01}))
    with pytest.raises(CostModelError, match="is damaged: its hash does not fit"):
        LearnedModel.load(path)
    path.write_text(json.dumps({**document, "schema": 99}))
    with pytest.raises(CostModelError, match="has schema 99"):
        LearnedModel.load(path)
    path.write_text(json.dumps({**document, "model": "roofline"}))
    with pytest.raises(CostModelError, match="'roofline' cost model, not a learned one"):
        LearnedModel.load(path)
    path.write_text("no json")
    with pytest.raises(CostModelError, match="no readable cost model"):
        LearnedModel.load(path)


def test_four_bits_are_never_predicted_slower_than_eight(learned: LearnedModel) -> None:
    sites = [LinearSite("", 768, 768, rows, True) for rows in (1, 16, 197)]
    for fours, eights in ((Dense(4), Dense(8)), (LowRank(64, 4), LowRank(64))):
        less = learned.predict([Row(site, fours) for site in sites])
        more = learned.predict([Row(site, eights) for site in sites])
        assert all(a <= b for a, b in zip(less, more, strict=True))


def test_the_designed_layers_are_of_all_kinds_and_of_a_bounded_size() -> None:
    drawn = [row for row, _ in design(300, VNNI.rank_step)]
    assert len({str(replace(row, threads=1)) for row in drawn}) == len(drawn)
    kinds = {(type(r.site).__name__, type(r.format).__name__, r.format.bits) for r in drawn}
    assert ("LinearSite", "LowRank", 4) in kinds
    assert ("ConvSite", "Tucker2", 8) in kinds
    assert ("ConvSite", "CP", 8) in kinds
    assert max(row.site.macs(Dense(8)) for row in drawn) <= 240_000_000
    sides = [r.site.in_size[0] for r in drawn if isinstance(r.site, ConvSite)]
    assert min(sides) < 10 < 50 < max(sides)
