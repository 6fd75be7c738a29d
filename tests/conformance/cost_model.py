"""What every cost model keeps. Subclass it; give `model` (fitted) and `rows` (held out)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2
from t3c.core.sites import ConvSite, LinearSite
from t3c.cost_models.base import AbstractCostModel, Row, Work


def wider(fmt: Format, by: int = 16) -> Format:
    match fmt:
        case LowRank(rank):
            return replace(fmt, rank=rank + by)
        case Tucker2(rank_in, rank_out):
            return replace(fmt, rank_in=rank_in + by, rank_out=rank_out + by)
        case CP(rank):
            return replace(fmt, rank=rank + by)
        case Dense():
            return fmt


class CostModelConformance:
    """The promises of AbstractCostModel."""

    def test_saved_model_predicts_the_same(
        self, model: AbstractCostModel, rows: Sequence[Row], tmp_path: Path
    ) -> None:
        model.save(tmp_path / "model")
        assert type(model).load(tmp_path / "model").predict(rows) == model.predict(rows)

    def test_more_rank_is_never_faster(self, model: AbstractCostModel, rows: Sequence[Row]) -> None:
        for by in (1, 16, 64):
            more = [replace(row, format=wider(row.format, by)) for row in rows]
            pairs = zip(model.predict(rows), model.predict(more), strict=True)
            assert all(thin <= wide for thin, wide in pairs)

    def test_a_larger_layer_is_never_faster(
        self, model: AbstractCostModel, rows: Sequence[Row]
    ) -> None:
        for row in rows:
            match row.site:
                case LinearSite():
                    large = replace(row.site, n=row.site.n + 7, k=row.site.k + 5)
                    many = replace(row.site, rows=row.site.rows * 2)
                    grown = [replace(row, site=large), replace(row, site=many)]
                case ConvSite():
                    grown = [replace(row, site=replace(row.site, batch=2 * row.site.batch))]
            (base,) = model.predict([row])
            assert all(base <= more for more in model.predict(grown))

    def test_predictions_are_positive_and_finite(
        self, model: AbstractCostModel, rows: Sequence[Row]
    ) -> None:
        assert all(0 < t < math.inf for t in model.predict(rows))
        assert model.predict([]) == []

    def test_more_threads_are_never_slower(
        self, model: AbstractCostModel, rows: Sequence[Row]
    ) -> None:
        more = [replace(row, threads=2 * row.threads) for row in rows]
        pairs = zip(model.predict(rows), model.predict(more), strict=True)
        assert all(two <= one for one, two in pairs)

    def test_more_other_work_is_never_faster(self, model: AbstractCostModel) -> None:
        assert model.predict_rest(Work()) >= 0
        assert model.predict_rest(Work(10, 10, 1)) <= model.predict_rest(Work(20, 20, 2))
