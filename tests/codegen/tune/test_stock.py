"""TVM's own search, through its own interfaces, over a family's schedules, ranked by our model.

What our model raises, TVM passes on as a RuntimeError with the same text.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t3c.codegen.kernels.schedule import Op
from t3c.codegen.tune.inproc import Runner, Shop
from t3c.codegen.tune.stock import Catalogue, KernelBuilder, RankingModel, tune_context
from t3c.codegen.tvm_api import make_target, meta_schedule
from t3c.core.errors import LoweringError
from tests.codegen.tune.families import CountFamily, Rounds

TARGET = make_target({"kind": "llvm"})
MEASURED = [Op.of("count", n=n) for n in (8, 16, 32, 128, 256)]
NEW = Op.of("count", n=64)


def seconds(op: Op, schedule: Rounds) -> float:
    return 1e-9 * op["n"] * (schedule.rounds + 2)


def taught(catalogue: Catalogue) -> Any:
    model = RankingModel(catalogue)
    for op in MEASURED:
        choices = [s for s in catalogue.family.schedules(op) if isinstance(s, Rounds)]
        candidates = [catalogue.candidate(op, s) for s in choices]
        results = [meta_schedule.runner.RunnerResult([seconds(op, s)], None) for s in choices]
        model.update(tune_context(TARGET), candidates, results)
    return model


def scores(model: Any, catalogue: Catalogue, op: Op = NEW) -> np.ndarray[Any, np.dtype[np.float64]]:
    candidates = [catalogue.candidate(op, s) for s in catalogue.family.schedules(op)]
    found: np.ndarray[Any, np.dtype[np.float64]] = model.predict(tune_context(TARGET), candidates)
    return found


def test_what_was_measured_elsewhere_orders_a_new_operator() -> None:
    catalogue = Catalogue(CountFamily())
    found = scores(taught(catalogue), catalogue)
    rounds = [s.rounds for s in CountFamily().schedules(NEW) if isinstance(s, Rounds)]
    assert sorted(rounds) == [rounds[i] for i in np.argsort(-found)]


def test_before_anything_is_measured_scores_are_drawn() -> None:
    catalogue = Catalogue(CountFamily())
    model = RankingModel(catalogue)
    one, two = scores(model, catalogue), scores(model, catalogue)
    assert len(set(one)) == len(one)
    assert not np.array_equal(one, two)


def test_a_failed_run_teaches_nothing() -> None:
    catalogue = Catalogue(CountFamily())
    model = taught(catalogue)
    before = scores(model, catalogue)
    failed = meta_schedule.runner.RunnerResult(None, "killed")
    model.update(tune_context(TARGET), [catalogue.candidate(NEW, Rounds(20, 0))], [failed])
    np.testing.assert_array_equal(scores(model, catalogue), before)


def test_a_saved_model_scores_the_same_elsewhere(tmp_path: Path) -> None:
    catalogue = Catalogue(CountFamily())
    model = taught(catalogue)
    model.save(str(tmp_path / "rows.json"))
    other = RankingModel(Catalogue(CountFamily()))
    other.load(str(tmp_path / "rows.json"))
    np.testing.assert_array_equal(scores(other, catalogue), scores(model, catalogue))


@pytest.mark.parametrize("text", ["no json", '{"schema": 2, "family": "count", "rows": []}', "[]"])
def test_another_file_is_no_model(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(RuntimeError, match=r"no rows of 'count' .* name a file that save wrote"):
        RankingModel(Catalogue(CountFamily())).load(str(path))


def test_a_module_of_another_origin_stands_for_nothing() -> None:
    catalogue = Catalogue(CountFamily())
    with pytest.raises(LoweringError, match="stands for no schedule of 'count'"):
        catalogue.meaning(catalogue.workload(NEW))


def test_the_stock_search_measures_what_the_model_prefers_and_teaches_it() -> None:
    catalogue = Catalogue(CountFamily())
    model = taught(catalogue)
    strategy = meta_schedule.search_strategy.EvolutionarySearch(
        population_size=64,
        init_measured_ratio=0.0,
        init_min_unmeasured=4,
        genetic_num_iters=1,
        eps_greedy=0.0,
    )
    context = tune_context(TARGET, catalogue.workload(NEW), catalogue.space(NEW), strategy)
    context.pre_tuning(
        max_trials=2,
        num_trials_per_iter=2,
        design_spaces=context.generate_design_space(),
        database=meta_schedule.database.MemoryDatabase(),
        cost_model=model,
    )
    candidates = context.generate_measure_candidates()
    meant = [catalogue.meaning(c.sch.mod) for c in candidates]
    assert meant == [(NEW, Rounds(1, 1)), (NEW, Rounds(20, 0))]  # the fastest; the first is broken
    shop = Shop()
    inputs = [meta_schedule.builder.BuilderInput(c.sch.mod, TARGET) for c in candidates]
    broken, built = KernelBuilder(catalogue, shop).build(inputs)
    assert broken.error_msg
    given = [meta_schedule.runner.RunnerInput(built.artifact_path, "cpu", [])]
    (future,) = Runner(shop, 0.01, (3, 3)).run(given)
    failed = meta_schedule.runner.RunnerResult(None, broken.error_msg)
    model.update(context, candidates, [failed, future.result()])
    model_rows = model.rows[NEW]
    assert list(model_rows) == ['{"broken": 0, "rounds": 20}']
    assert 0 < model_rows['{"broken": 0, "rounds": 20}'] < 1
