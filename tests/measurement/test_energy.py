"""A device with a known law of energy, metered by RAPL's code: ticks, a counter that wraps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t3c.core.errors import CostModelError
from t3c.core.formats import Dense
from t3c.core.profile import Label
from t3c.core.sites import LinearSite
from t3c.cost_models import meters
from t3c.cost_models.base import Row, Work
from t3c.cost_models.dataset import Dataset, Joules, KernelEnergy, Metered
from t3c.cost_models.design import design
from t3c.cost_models.learned import LearnedModel, energy_lacks
from t3c.cost_models.meters import RaplMeter
from t3c.cost_models.scores import score
from t3c.measurement.energy import meter_units
from t3c.measurement.hosts import Host
from t3c.measurement.run import Plan
from t3c.measurement.units import TOGETHER, Function, Unit
from t3c.targets.x86 import VNNI
from tests.cost_models.measured import DEVICE, kernels, profiles, true_seconds
from tests.cost_models.test_learned import larger

RANGE_UJ = 3_000_000
"""The counter begins again every 3 joules: some dozens of times in all."""
PERIOD_S = 1e-3
IDLE_W = 8.0
NOISE = 0.03


def true_joules(row: Row) -> float:
    """Idle power, products, and weights from memory; a bend that no sum of counts has."""
    macs, weights = row.site.macs(row.format), row.site.elements(row.format)
    work = 40e-12 * macs * (1 + 0.3 * math.tanh(math.log10(macs) - 7)) + 400e-12 * weights
    return IDLE_W * true_seconds(row) + work


def network_joules(layers: Sequence[Row], rest: Work) -> float:
    return 1.05 * math.fsum(map(true_joules, layers)) + 2e-9 * rest.bytes_moved + 2e-4


@dataclass
class Device(Host):
    """A machine whose time and energy are numbers that calls move."""

    now: float = 0.0
    joules: float = 0.0
    loads: int = 0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def __post_init__(self) -> None:
        self.name, self.here = "invented", True

    def use_threads(self, count: int) -> None:
        assert count == DEVICE.threads

    def clock(self) -> float:
        return self.now

    def counter(self, zone: Path) -> int:
        """As RAPL: updated every ms, within a range; between updates idle time passes."""
        del zone
        self.pass_time(2e-5, IDLE_W * 2e-5)
        ticked = self.joules - IDLE_W * (self.now % PERIOD_S)
        return int(ticked * 1e6) % RANGE_UJ

    def pass_time(self, seconds: float, joules: float) -> None:
        self.now += seconds
        self.joules += joules

    def load(self, unit: Unit) -> Any:
        self.loads += 1
        return Loaded(self)


@dataclass
class Loaded:
    device: Device

    def runner(self, function: Function) -> Callable[[], object]:
        """Calls of one function differ from the law by a factor that is drawn once."""
        factor = math.exp(NOISE * self.device.rng.standard_normal())
        seconds = math.fsum(map(true_seconds, function.rows))
        joules = factor * (
            network_joules(function.rows, function.rest)
            if function.call
            else math.fsum(map(true_joules, function.rows))
        )
        return lambda: self.device.pass_time(seconds, joules)


def function(rows: tuple[Row, ...], group: str, profile: str = "", rest: Work = Work()) -> Function:  # noqa: B008
    sizes: tuple[int, ...] = tuple(range(len(rows)))
    return Function("trace", profile, profile, 1, (), (), (), rows, sizes, sizes, (group,), rest)


def units() -> list[Unit]:
    """Shards of one layer a function, as `Plan.metered` builds them, and networks."""
    found = [
        Unit(Path(), f"joules{i}", False, (function((row,) * TOGETHER, group),))
        for i, (row, group) in enumerate(design(200, VNNI.rank_step))
    ]
    nets = [
        Unit(Path(), p.network, True, (function(p.layers, "", p.profile, p.rest),))
        for p in profiles(10)
    ]
    return [*nets, *found]


def refuse(text: str) -> None:
    raise AssertionError(text)


@pytest.fixture(scope="module")
def metered(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("joules")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    device = Device()
    rows = Dataset.open(folder / "rows.jsonl", DEVICE, print)
    rows.append([*kernels(200), *profiles(10)], DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meters, "counter", device.counter)
        meter = RaplMeter((folder,))
        half = units()[:60]
        told: list[str] = []
        for some, limit in ((half, math.inf), (units(), device.now), (units(), math.inf)):
            meter_units(
                rows, some, device, meter, limit, lambda *_: None, told.append, device.clock
            )
    assert told == [f"energy of {len(units())} units is left for the time; run again to go on"]
    assert device.joules * 1e6 > 50 * RANGE_UJ
    return rows


@pytest.fixture(scope="module")
def model(metered: Dataset) -> LearnedModel:
    return LearnedModel.learn(metered, VNNI)


def test_what_is_metered_is_what_the_device_used_whatever_the_counter_does(
    metered: Dataset,
) -> None:
    assert metered.meter == ("rapl", Label.MEASURED)
    assert len(metered.kernel_energies) == len(design(200, VNNI.rank_step))
    errors = [math.log(k.energy.joules / true_joules(k.row)) for k in metered.kernel_energies]
    assert np.std(errors) == pytest.approx(NOISE, rel=0.25)
    assert abs(float(np.mean(errors))) < 0.02
    again = Dataset.read(metered.path)
    assert again.rows == metered.rows


def test_energy_of_new_layers_and_networks_is_predicted_to_a_few_times_the_noise(
    model: LearnedModel,
) -> None:
    rows = [row for row, _ in design(150, VNNI.rank_step, seed=9)]
    true = np.array([true_joules(row) for row in rows])
    found = model.predict_energy(rows)
    assert found is not None
    one = score(true, np.array(found), list(range(len(rows))))
    assert one.mape < 2.5 * NOISE
    assert one.spearman > 0.99
    for p in profiles(10)[2:]:
        joules = model.predict_network_energy(p.layers, p.rest)
        assert joules == pytest.approx(network_joules(p.layers, p.rest), rel=0.15)
    assert model.metered is not None
    assert model.metered.meter == "rapl"
    held = [
        low <= t <= high
        for t, (low, high) in zip(true, model.metered.model.predict_interval(rows), strict=True)
    ]
    assert 0.8 < np.mean(held) <= 1


def test_more_rank_bits_and_batch_never_take_less_energy(model: LearnedModel) -> None:
    rng = np.random.default_rng(0)
    drawn = [row for row, _ in design(400, VNNI.rank_step, seed=11)]
    small = [drawn[int(i)] for i in rng.integers(len(drawn), size=1_500)]
    less, more = model.predict_energy(small), model.predict_energy([larger(r, rng) for r in small])
    assert less is not None
    assert more is not None
    assert all(a <= b for a, b in zip(less, more, strict=True))


def test_the_file_keeps_the_meter_and_predicts_the_same(
    model: LearnedModel, tmp_path: Path
) -> None:
    model.save(tmp_path / "model.json")
    again = LearnedModel.load(tmp_path / "model.json")
    assert again == model
    assert again.metered is not None
    assert again.metered.meter == "rapl"


ROW = Row(LinearSite("", 64, 64, 4, True), Dense(8))
OTHER = Row(LinearSite("", 64, 64, 8, True), Dense(8))


@pytest.mark.parametrize(
    "other",
    [Joules(1e-3, "nvml"), Joules(1e-3, "rapl", Label.ESTIMATED)],
    ids=["another meter", "an estimate"],
)
def test_joules_of_two_sources_are_never_in_one_file(other: Joules, tmp_path: Path) -> None:
    rows = Dataset.open(tmp_path / "rows.jsonl", DEVICE, print)
    rows.append([KernelEnergy(ROW, Joules(1e-3, "rapl"))], DEVICE)
    before = rows.path.read_bytes()
    with pytest.raises(CostModelError, match=r"would hold joules of .* Measure into another file"):
        rows.append([KernelEnergy(OTHER, other)], DEVICE)
    assert rows.path.read_bytes() == before
    alien = Dataset.open(tmp_path / "alien.jsonl", DEVICE, print)
    alien.append([KernelEnergy(OTHER, other)], DEVICE)
    rows.path.write_bytes(before + alien.path.read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(CostModelError, match="would hold joules of"):
        Dataset.read(rows.path)


def test_nothing_is_learnt_from_estimates_or_from_too_few_rows(tmp_path: Path) -> None:
    few = Dataset.open(tmp_path / "few.jsonl", DEVICE, print)
    few.append([*kernels(40), KernelEnergy(ROW, Joules(1e-3, "rapl"))], DEVICE)
    assert LearnedModel.learn(few, VNNI).metered is None
    assert "1 kernels and 0 networks are metered; energy is learnt from 40" in energy_lacks(few)
    with pytest.raises(ValueError, match="joules is nan"):
        Joules(math.nan, "rapl")


def guess(energy: Joules) -> Joules:
    return replace(energy, label=Label.ESTIMATED)


def test_estimated_joules_are_refused_by_the_fit(metered: Dataset, tmp_path: Path) -> None:
    rows = Dataset.open(tmp_path / "rows.jsonl", DEVICE, print)
    estimated: list[Metered] = [
        *(replace(k, energy=guess(k.energy)) for k in metered.kernel_energies),
        *(replace(p, energy=guess(p.energy)) for p in metered.profile_energies),
    ]
    rows.append([*kernels(40), *estimated], DEVICE)
    with pytest.raises(CostModelError, match="a model learns from a meter only"):
        LearnedModel.learn(rows, VNNI)


def test_functions_that_are_metered_repeat_one_layer() -> None:
    jobs = Plan(kernels=60, networks=(), joules=40).metered(VNNI, 1)
    assert [job.name.partition("-")[0] for job in jobs] == ["joules"]
    assert all(key.startswith("joules ") for key in jobs[0].keys(1))
