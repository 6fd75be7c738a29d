import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from t3c.core.errors import T3CError
from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2
from t3c.core.registry import resolve
from t3c.core.sites import ConvSite, LinearSite
from t3c.cost_models import COST_MODELS, cost_model
from t3c.cost_models.base import AbstractCostModel, Row
from t3c.cost_models.roofline import RooflineModel
from t3c.targets.arm import DOTPROD
from t3c.targets.base import TargetSpec
from t3c.targets.cuda import SM80
from t3c.targets.x86 import AMX, AVX2, VNNI
from tests.conformance.cost_model import CostModelConformance

# benchmarks/roofline.md: (rows, outputs, inputs, rank or None for dense, microseconds)
MEASURED_AMX = [
    (197, 3072, 768, None, 588),
    (197, 768, 768, None, 159),
    (197, 768, 3072, None, 651),
    (128, 3072, 768, None, 393),
    (197, 3072, 768, 64, 243),
    (197, 3072, 768, 128, 286),
    (197, 3072, 768, 192, 335),
    (197, 3072, 768, 256, 382),
    (197, 3072, 768, 384, 469),
    (197, 768, 768, 64, 90),
    (197, 768, 768, 128, 110),
    (197, 768, 768, 192, 138),
    (197, 768, 768, 256, 159),
    (197, 768, 768, 384, 216),
    (197, 768, 3072, 64, 305),
    (197, 768, 3072, 128, 322),
    (197, 768, 3072, 256, 448),
]


def linear(m: int, n: int, k: int, rank: int | None, threads: int = 1) -> Row:
    fmt: Format = Dense(8) if rank is None else LowRank(rank)
    return Row(LinearSite(f"{m}x{n}x{k}", n, k, m, True), fmt, threads)


def conv(fmt: Format, kernel: int = 3, stride: int = 1) -> Row:
    window, step = (kernel, kernel), (stride, stride)
    pad = (kernel // 2, kernel // 2)
    out = (28 // stride, 28 // stride)
    site = ConvSite("c", 96, 64, window, step, pad, (1, 1), 1, (28, 28), out, True)
    return Row(site, fmt)


ROWS = [linear(*row[:4]) for row in MEASURED_AMX]
SECONDS = [row[4] * 1e-6 for row in MEASURED_AMX]


class TestRoofline(CostModelConformance):
    @pytest.fixture(params=[AMX, VNNI, AVX2, DOTPROD], ids=lambda spec: spec.name)
    def model(self, request: pytest.FixtureRequest) -> AbstractCostModel:
        spec: TargetSpec = request.param
        return cost_model(spec)

    @pytest.fixture
    def rows(self) -> Sequence[Row]:
        convs = [conv(Dense(8)), conv(Tucker2(16, 32)), conv(CP(16)), conv(Tucker2(32, 48), 3, 2)]
        return [*ROWS, linear(1, 1, 1, None), linear(17, 33, 65, 3, 2), *convs, conv(LowRank(8), 1)]


def test_every_registered_model_resolves() -> None:
    for name in COST_MODELS:
        found = resolve(COST_MODELS, name, "cost model", T3CError)
        assert isinstance(found, type)
        assert issubclass(found, AbstractCostModel)
    with pytest.raises(T3CError, match="known are learned, roofline"):
        cost_model(AMX, "xgboost2")


def test_amx_constants_reproduce_the_measured_products() -> None:
    model = cost_model(AMX)
    calls = 2 * AMX.roofline.call_s  # the table has no virtual machine around the kernels
    ratio = (np.array(model.predict(ROWS)) - calls) / np.array(SECONDS)
    assert np.abs(ratio - 1).mean() < 0.08
    assert np.abs(ratio - 1).max() < 0.16


def test_a_square_layer_gains_only_below_a_third_of_full_rank_on_amx() -> None:
    model = cost_model(AMX)
    (dense,) = model.predict([linear(197, 768, 768, None)])
    at = dict(
        zip(
            (128, 192, 256, 384),
            model.predict([linear(197, 768, 768, r) for r in (128, 192, 256, 384)]),
            strict=True,
        )
    )
    assert at[192] < dense
    assert at[384] > dense


def test_fit_recovers_the_constants_that_made_the_times() -> None:
    times = cost_model(VNNI).predict(ROWS)
    fitted = RooflineModel(replace(VNNI.roofline, int8_macs_s=1.0, store_s=1.0)).fit(ROWS, times)
    assert fitted.predict(ROWS) == pytest.approx(times, rel=1e-6)


def test_fit_of_the_amx_table_is_as_good_as_the_shipped_constants() -> None:
    fitted = cost_model(AMX).fit(ROWS, SECONDS)
    assert np.abs(np.array(fitted.predict(ROWS)) / SECONDS - 1).mean() < 0.08


@pytest.mark.parametrize("seconds", [[1.0], [0.0] * len(ROWS), [float("nan")] * len(ROWS)])
def test_fit_refuses_what_cannot_be_fitted(seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="positive time"):
        cost_model(AMX).fit(ROWS, seconds)


def test_formats_of_the_other_kind_are_refused() -> None:
    site = LinearSite("fc", 8, 8, 1, True)
    with pytest.raises(T3CError, match="'fc' is linear; tucker2"):
        cost_model(AMX).predict([Row(site, Tucker2(4, 4))])
    with pytest.raises(ValueError, match="threads is 0"):
        Row(site, Dense(8), 0)


def test_other_and_newer_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    cost_model(AMX).save(path)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "schema": 99}))
    with pytest.raises(T3CError, match="schema 99"):
        RooflineModel.load(path)
    path.write_text(json.dumps({**document, "model": "xgboost"}))
    with pytest.raises(T3CError, match="'xgboost' cost model"):
        RooflineModel.load(path)


def test_codes_make_convolutions_cheaper_and_linear_layers_not() -> None:
    conv = ConvSite("c", 64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, (28, 28), (28, 28), True)
    linear = LinearSite("l", 64, 64, 197, True)
    for site, cheaper in ((conv, True), (linear, False)):
        floats, codes = cost_model(AMX).predict([Row(site, Dense(8)), Row(site, Dense(8), 1, True)])
        assert (codes < floats) is cheaper


def test_four_bits_halve_the_wait_for_weights_only() -> None:
    one, many = LinearSite("one", 4096, 4096, 1, True), LinearSite("many", 768, 768, 197, True)
    for spec in (AMX, VNNI, AVX2, DOTPROD):
        model = cost_model(spec)
        rows = [Row(site, fmt) for site in (one, many) for fmt in (Dense(8), Dense(4))]
        waits, less, works, same = model.predict(rows)
        assert 0.45 * waits < less < 0.8 * waits
        assert same > 0.9 * works
    with pytest.raises(T3CError, match="no 4-bit kernels on this target"):
        cost_model(SM80).predict([Row(one, Dense(4))])
