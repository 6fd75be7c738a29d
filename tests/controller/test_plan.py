import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from t3c.controller.calibrate import Moment, calibrate, collect, kind_of, split
from t3c.controller.costs import storage_bytes
from t3c.controller.damage import (
    DamageTable,
    Menu,
    _scaled,  # pyright: ignore[reportPrivateUsage]
    measure,
)
from t3c.controller.plan import Plan, plan, profile_names
from t3c.controller.suffix import Suffix, floats
from t3c.core.budget import Budget, Selector
from t3c.core.codes import Matrix, quantize_weight
from t3c.core.errors import T3CError
from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2
from t3c.core.profile import Label
from t3c.core.sites import LinearSite
from t3c.cost_models.base import Work
from t3c.cost_models.learned import LearnedModel
from t3c.elastic.conv import ElasticConv
from t3c.elastic.model import ElasticModel
from t3c.targets import get
from t3c.targets.base import Roofline
from tests.controller.models import Mlp, block, cnn, conv, elastic, linear, mlp, more

VNNI = get("x86-vnni")
STEEP = replace(  # arithmetic costs, nothing else: every rank below break-even pays
    VNNI, rank_step=8, roofline=Roofline(1e9, 1e9, 1e15, 1e-15, 1e-15, 1e-9)
)
MODELS = [mlp, cnn, block]


@pytest.fixture(scope="module", params=MODELS, ids=lambda make: make.__name__)
def planned(request: pytest.FixtureRequest) -> tuple[ElasticModel, Plan]:
    model = request.param()
    return model, plan(model, more(model, 3), STEEP, seconds=math.inf)


def test_eight_distinct_nested_profiles_from_tiny_to_dense(
    planned: tuple[ElasticModel, Plan],
) -> None:
    model, found = planned
    profiles = list(found.chain)
    assert [p.name for p in profiles] == ["tiny", "p1", "p2", "p3", "p4", "p5", "p6", "max"]
    assert all(fmt == Dense(8) for fmt in profiles[-1].formats.values())
    for small, large in itertools.pairwise(profiles):
        assert small.formats != large.formats
        assert small.macs < large.macs
        assert small.latency is not None
        assert large.latency is not None
        assert small.latency.p95_s < large.latency.p95_s
        assert small.latency.label is Label.PREDICTED
    assert set(profiles[0].formats) == set(model.sites)


def test_a_network_is_predicted_as_a_whole_with_its_interval_where_a_model_knows_one() -> None:
    model = mlp()
    learned = replace(
        LearnedModel.of(STEEP), network=(2.0, 0.0, 0.0, 0.0, 1e-3), network_spread=math.log(1.25)
    )
    found = plan(model, more(model, 1), STEEP, seconds=0.1, model=learned)
    for profile in found.judged({}).chain:
        timing = profile.latency
        assert timing is not None
        layers = sum(r.predicted_s for r in found.gate if profile.formats[r.site] == r.format)
        assert timing.p50_s == pytest.approx(2 * layers + 1e-3)
        assert timing.low_s == pytest.approx(timing.p50_s / 1.25)
        assert timing.limit_s("p50") == timing.limit_s("p95") == pytest.approx(timing.p50_s * 1.25)
        assert profile.latency_ms == pytest.approx(timing.p50_s * 1250)
        assert timing.label is Label.PREDICTED


def test_layers_of_a_role_share_formats_and_those_that_are_kept_stay_dense() -> None:
    model = mlp()
    found = plan(model, more(model, 1), STEEP, seconds=0.1, share=True, keep=["head", "*c0"])
    for profile in found.chain:
        assert profile.formats["head"] == profile.formats["fc0"] == Dense(8)
        assert profile.formats["fc1"] == profile.formats["fc2"]
    assert found.chain.profiles[0].formats["fc1"] != Dense(8)
    assert {row.format for row in found.gate if row.site == "head"} == {Dense(8)}
    assert "dense int8 in every profile, as asked: fc0, head" in found.notes
    with pytest.raises(ValueError, match=r"'tail', which is no .* roles here are .*head \(1\)"):
        plan(model, more(model, 1), STEEP, keep=["tail"])
    with pytest.raises(ValueError, match="swaps=3 give layers of one role different formats"):
        plan(model, more(model, 1), STEEP, share=True, swaps=3)


def test_drift_rises_downwards_and_every_format_runs(planned: tuple[ElasticModel, Plan]) -> None:
    model, found = planned
    drifts = [found.drift[p.name] for p in found.chain]
    assert drifts == sorted(drifts, reverse=True)
    for profile in found.chain:
        with torch.inference_mode(), model.using(profile.formats):
            result = model(*model.example_inputs)
        assert all(y.isfinite().all() for y in floats(result))


def test_the_sum_of_damages_predicts_whole_plans(planned: tuple[ElasticModel, Plan]) -> None:
    model, found = planned
    small = next(iter(found.chain))
    off, energy = 0.0, 0.0
    for batch in more(model, 4, 5):
        with torch.inference_mode(), model.using(None):
            before = list(floats(model(*batch)))
        with torch.inference_mode(), model.using(small.formats):
            after = list(floats(model(*batch)))
        off += sum(float((b - a).square().sum()) for a, b in zip(before, after, strict=True))
        energy += sum(float(a.square().sum()) for a in before)
    assert 0.4 < math.sqrt(off / energy) / found.drift["tiny"] < 2.0


def test_everything_is_measured_without_a_time_limit(planned: tuple[ElasticModel, Plan]) -> None:
    _, found = planned
    assert found.table.count(Label.ESTIMATED) == 0
    assert {e.batches for row in found.table.entries.values() for e in row.values()} == {1}


def test_budgets_select_from_the_chain(planned: tuple[ElasticModel, Plan]) -> None:
    _, found = planned
    selector = Selector(found.chain)
    for profile in found.chain:
        assert profile.latency_ms is not None
        assert selector.select(Budget(latency_ms=profile.latency_ms)) is profile


def test_planning_leaves_the_model_as_it_was() -> None:
    model = mlp()
    x = model.example_inputs[0]
    (before,) = model(x)
    plan(model, [(x,)], STEEP, seconds=1)
    assert torch.equal(model(x)[0], before)


def test_a_model_without_smaller_formats_gets_one_profile_and_a_note() -> None:
    model = elastic(Mlp(16, 1, 4), torch.randn(2, 16))
    found = plan(model, [model.example_inputs], VNNI, seconds=1)
    (only,) = found.chain
    assert only.name == "max"
    assert "1 of 8 profiles: on 'x86-vnni' only 1 different choices" in found.notes[-1]


def test_no_format_slower_than_dense_is_on_the_menu() -> None:
    model = mlp()
    found = plan(model, [model.example_inputs], VNNI, seconds=1)
    slow = {(d.site, d.format) for d in found.gate if not d.kept}
    assert slow
    for profile in found.chain:
        assert not slow & set(profile.formats.items())


@pytest.mark.parametrize("profiles", [1, 2, 5])
def test_as_many_profiles_as_wanted(profiles: int) -> None:
    model = mlp()
    found = plan(model, more(model, 2), STEEP, profiles=profiles, seconds=0.5)
    assert [p.name for p in found.chain] == profile_names(profiles)
    assert not found.notes


def test_one_batch_is_enough_but_noted() -> None:
    model = mlp()
    found = plan(model, [model.example_inputs], STEEP, seconds=1)
    assert "one calibration batch" in found.notes[0]
    assert not plan(model, more(model, 2), STEEP, seconds=1).notes


def test_damage_is_measured_on_batches_that_the_factors_have_not_seen() -> None:
    torch.manual_seed(4)
    model = elastic(Mlp(64, 2, 10), torch.randn(1, 64))
    few = [(torch.randn(1, 64),) for _ in range(8)]  # far too little data: factors fit it exactly
    fresh = [(torch.randn(1, 64),) for _ in range(40)]
    found = plan(model, few, STEEP, seconds=math.inf)
    small = next(iter(found.chain))
    off = energy = 0.0
    for batch in fresh:
        with torch.no_grad(), model.using(None):
            (before,) = model(*batch)
        with torch.no_grad(), model.using(small.formats):
            off += float((model(*batch)[0] - before).square().sum())
        energy += float(before.square().sum())
    assert found.drift["tiny"] > 0.5 * math.sqrt(off / energy)


def test_bad_arguments_are_refused() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="0 profiles wanted"):
        plan(model, [model.example_inputs], VNNI, profiles=0)
    with pytest.raises(T3CError, match="at least one batch"):
        plan(model, [], VNNI)
    with pytest.raises(T3CError, match="at least one batch"):
        measure(model, [], {})
    with pytest.raises(T3CError, match="'fc0' sees inputs that are not finite"):
        calibrate(model, [(torch.full((8, 64), float("nan")),)])
    with pytest.raises(T3CError, match="all zero or not finite"):
        measure(model, [(torch.full((8, 64), float("inf")),)], {})


def test_progress_is_told_every_step() -> None:
    model, seen = mlp(), []
    plan(
        model,
        [model.example_inputs],
        STEEP,
        seconds=1,
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    steps = [
        "collecting statistics",
        "factorizing",
        "rounding weights",
        "measuring layers",
        "measuring damage",
    ]
    assert list(dict.fromkeys(what for what, _, _ in seen)) == steps
    assert all(0 <= done <= total for _, done, total in seen)


def test_linear_layers_are_rounded_for_their_inputs() -> None:
    model = mlp()
    batches = more(model, 6)
    plan(model, batches, STEEP, seconds=1)
    name, layer = next(iter(model.layers.items()))
    moment = collect(model, batches)[name].mean()
    weight = layer.weight.detach()

    def loss(made: Matrix) -> float:
        off = weight - torch.from_numpy(made.dequantize())
        return float(torch.einsum("ij,jk,ik->", off, moment, off))

    dense = model.codes(name).dense
    assert dense is not None
    assert loss(dense) < loss(quantize_weight(weight.numpy()))


# -- statistics -------------------------------------------------------------------------------


def test_moments_are_those_of_the_inputs() -> None:
    model = mlp()
    batches = more(model, 3)
    moments = collect(model, batches)
    x = torch.cat([batch[0] for batch in batches])
    assert moments["fc0"].rows == 24
    torch.testing.assert_close(moments["fc0"].total, x.T @ x)
    mean = moments["fc0"].mean()
    assert float(torch.linalg.eigvalsh(mean)[0]) > 0  # 24 rows of 64 features: shrinkage fills up


def test_calibrated_factors_beat_plain_ones_on_data_with_directions() -> None:
    torch.manual_seed(3)
    model = elastic(Mlp(64, 1, 10), torch.randn(8, 64))
    stretch = torch.diag(0.85 ** torch.arange(64.0))
    data = [(torch.randn(8, 64) @ stretch,) for _ in range(20)]
    fresh = [(torch.randn(8, 64) @ stretch,) for _ in range(5)]
    formats: dict[str, Format] = {"fc0": LowRank(16)}

    def error() -> float:
        total = 0.0
        for batch in fresh:
            with torch.inference_mode(), model.using(None):
                before = model(*batch)[0]
            with torch.inference_mode(), model.using(formats, quantize=False):
                total += float((model(*batch)[0] - before).square().sum())
        return total

    plain = error()
    assert calibrate(model, data) == ()
    assert error() < 0.5 * plain


def test_gains_protect_the_outputs_that_matter() -> None:
    torch.manual_seed(5)
    layer = elastic(Mlp(64, 1, 10), torch.randn(8, 64)).layers["fc0"]
    rows = torch.randn(500, 64)
    back = torch.randn(500, 64) * (0.9 ** torch.arange(64.0))  # the first outputs matter most
    gains, weight = back.T @ back, layer.weight.detach()

    def loss(moment: Moment) -> float:
        factors = split(layer, moment)
        off = weight - factors["high"][:, :16] @ factors["low"][:16]
        return float(torch.trace(off.T @ gains @ off))

    one = loss(Moment(rows.T @ rows, None, 500))
    two = loss(Moment(rows.T @ rows, gains, 500))
    assert two < 0.8 * one


def test_gains_are_none_where_no_gradient_arrives() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = linear("fc", 64, 64, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x * self.fc(x).argmax(1, keepdim=True),)

    model = elastic(Blind(), torch.randn(2, 64))
    (moment,) = collect(model, [model.example_inputs]).values()
    assert moment.gains is None
    assert moment.directions() is None
    assert calibrate(model, [model.example_inputs]) == ()


def test_frozen_parameters_still_give_gains() -> None:
    model = mlp()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    moments = collect(model, [model.example_inputs])
    assert all(moment.gains is not None for moment in moments.values())


@pytest.mark.parametrize("make", MODELS)
def test_full_ranks_keep_the_function(make: Callable[[], ElasticModel]) -> None:
    model = make()
    calibrate(model, more(model, 2))
    full: dict[str, Format] = {}
    for name, site in model.sites.items():
        flat = isinstance(site, LinearSite)
        full[name] = (
            LowRank(site.full_rank) if flat else Tucker2(site.in_channels, site.out_channels)  # type: ignore[union-attr]
        )
    with torch.inference_mode():
        before = list(floats(model(*model.example_inputs)))
        with model.using(full, quantize=False):
            after = list(floats(model(*model.example_inputs)))
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_time_limit_cuts_batches_but_never_the_first() -> None:
    model = mlp()
    assert collect(model, more(model, 5), seconds=0)["fc0"].rows == 8


def test_cp_convolutions_plan_cp_formats() -> None:
    model = cnn()
    layer = conv("mid", 64, 32, 12, 2)
    layer.kxk = "cp"
    assert kind_of(layer) is CP
    assert kind_of(model.layers["mid"]) is Tucker2
    assert kind_of(model.layers["head"]) is LowRank
    swapped = model.layers["mid"]
    assert isinstance(swapped, ElasticConv)
    swapped.kxk = "cp"
    found = plan(model, [model.example_inputs], STEEP, seconds=1)
    kinds = {type(d.format) for d in found.gate if d.site == "mid"}
    assert kinds == {Dense, CP}


# -- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
def test_rerunning_the_suffix_equals_running_the_model(make: Callable[[], ElasticModel]) -> None:
    model = make()
    calibrate(model, [model.example_inputs])
    suffix = Suffix(model)
    suffix.load(model.example_inputs)
    with torch.inference_mode():
        before = list(floats(model(*model.example_inputs)))
    for name in model.sites:
        with torch.inference_mode(), model.using({name: Dense(8)}):
            after = list(floats(model(*model.example_inputs)))
            whole = sum(float((b - a).square().sum()) for a, b in zip(before, after, strict=True))
            assert suffix.drift(name) == pytest.approx(whole, rel=1e-3, abs=1e-12)
            assert 0 < suffix.local(name) < 0.01


def menu_of(model: ElasticModel) -> Menu:
    return {
        name: [Dense(8), *(LowRank(r) for r in (48, 32, 16))]
        if site.full_rank >= 64
        else [Dense(8)]
        for name, site in model.sites.items()
    }


def test_estimates_are_close_to_measurements() -> None:
    model = mlp()
    batches = more(model, 2)
    calibrate(model, batches)
    menu = menu_of(model)
    whole = measure(model, batches, menu)
    none = measure(model, batches, menu, seconds=0)
    assert none.count(Label.MEASURED) == 0
    assert whole.count(Label.ESTIMATED) == 0
    for site, row in whole.entries.items():
        for fmt, entry in row.items():
            points = [(1.0, entry.damage)]
            assert _scaled(1.0, points) == pytest.approx(entry.damage)
            assert none.entries[site][fmt].damage > 0
    formats: dict[str, Format] = {"fc0": LowRank(16), "head": Dense(8)}
    parts = [whole.entries[s][f].damage for s, f in formats.items()]
    assert whole.damage(formats) == pytest.approx(sum(parts))


def test_damage_never_falls_with_rank() -> None:
    model = block()
    table = measure(model, [model.example_inputs], menu_of(model), seconds=0.05)
    for row in table.entries.values():
        damages = [entry.damage for entry in row.values()]
        assert damages == sorted(damages)


def test_a_time_limit_is_kept_and_labelled() -> None:
    model = mlp()
    menu = menu_of(model)
    begin = time.monotonic()
    table: DamageTable = measure(model, more(model, 400), menu, seconds=0.3)
    assert time.monotonic() - begin < 5
    counts = [e.batches for row in table.entries.values() for e in row.values()]
    assert max(counts) < 400
    assert table.count(Label.MEASURED) + table.count(Label.ESTIMATED) == len(counts)


def test_scaling_interpolates_between_measured_points() -> None:
    points = [(0.01, 0.1), (0.1, 10.0)]
    assert _scaled(0.01, points) == pytest.approx(0.1)
    assert _scaled(0.1, points) == pytest.approx(10.0)
    assert 0.1 < _scaled(0.03, points) < 10.0
    assert _scaled(0.005, points) == pytest.approx(0.05)
    assert _scaled(0.2, points) == pytest.approx(20.0)
    assert _scaled(0.0, points) == 0.0
    assert _scaled(0.3, []) == 0.3


# -- bytes ------------------------------------------------------------------------------------


def test_bytes_count_codes_scales_and_bias() -> None:
    site = LinearSite("fc", 100, 50, 1, True)
    assert storage_bytes(site, Dense(8)) == 5000 + 800
    assert storage_bytes(site, LowRank(10)) == 1500 + 4 * 110 + 400
    shape = conv("c", 32, 16, 8).site
    assert storage_bytes(shape, Tucker2(8, 16)) == 16 * 8 + 8 * 16 * 9 + 16 * 32 + 4 * 56 + 128


def test_memory_holds_weights_and_live_activations(planned: tuple[ElasticModel, Plan]) -> None:
    model, found = planned
    biggest = max(x.nbytes for x in model.example_inputs)
    for profile in found.chain:
        assert profile.ram_bytes - profile.storage_bytes >= biggest


def test_other_work_is_counted() -> None:
    from t3c.controller.work import peak_bytes, rest_of

    model = block()
    suffix = Suffix(model)
    suffix.load(model.example_inputs)
    work = rest_of(model.graph, suffix.values())
    assert work.f32_macs >= 0
    assert work.calls > 0
    assert work.bytes_moved > 4 * 12 * 64
    assert peak_bytes(model.graph, suffix.values()) >= 4 * 12 * 64
    assert Work() == Work(0, 0, 0)
