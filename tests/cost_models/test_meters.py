import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from t3c.core.errors import TargetError
from t3c.core.formats import Dense, LowRank
from t3c.core.profile import Label
from t3c.core.sites import LinearSite
from t3c.cost_models.base import Row, Work
from t3c.cost_models.energy import EnergyModel
from t3c.cost_models.meters import (
    AbstractMeter,
    EstimatedMeter,
    NvmlMeter,
    RaplMeter,
    access,
    best_meter,
    per_call,
    rapl_zones,
    weight_bytes,
)

RANGE = 262_143_328_850


def zone(root: Path, name: str, label: str, energy_uj: int) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "name").write_text(f"{label}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """As Linux has it: a package, its cores and its memory, and another package."""
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 500_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 200_000)
    zone(tmp_path, "intel-rapl:1", "package-1", RANGE - 1_000_000)
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def put(root: Path, name: str, energy_uj: int) -> None:
    (root / name / "energy_uj").write_text(f"{energy_uj}\n")


def test_packages_and_memory_count_and_cores_do_not_count_twice(root: Path) -> None:
    assert [z.name for z in rapl_zones(root)] == ["intel-rapl:0", "intel-rapl:0:1", "intel-rapl:1"]
    meter = best_meter(root)
    assert isinstance(meter, RaplMeter)
    assert meter.label is Label.MEASURED
    assert meter.read() == 0
    put(root, "intel-rapl:0", 3_000_000)
    put(root, "intel-rapl:0:0", 2_500_000)
    put(root, "intel-rapl:0:1", 700_000)
    assert meter.read() == pytest.approx(2.5)


def test_a_counter_that_passes_its_range_goes_on(root: Path) -> None:
    meter = RaplMeter(rapl_zones(root))
    put(root, "intel-rapl:1", 500_000)  # past the range, 1.5 J further
    assert meter.read() == pytest.approx(1.5)
    put(root, "intel-rapl:1", 400_000)  # and once around
    assert meter.read() == pytest.approx(1.5 + RANGE / 1e6 - 0.1)


def test_without_a_counter_energy_is_estimated_and_says_so(tmp_path: Path) -> None:
    meter = best_meter(tmp_path)
    assert isinstance(meter, EstimatedMeter)
    assert meter.label is Label.ESTIMATED
    with pytest.raises(TargetError, match="no RAPL counter on this machine"):
        RaplMeter(())


def test_a_counter_without_permission_is_explained(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    rapl = access(root)[0]
    assert not rapl.works
    assert "sudo chmod a+r" in rapl.advice
    assert "intel-rapl:0/energy_uj" in rapl.advice
    monkeypatch.undo()
    assert access(root)[0].works
    assert access(root)[0].found == "package-0, dram, package-1"

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(TargetError, match=r"no right to read .*sudo chmod a\+r"):
        RaplMeter((root / "intel-rapl:0",))


class Nvml:
    """What pynvml has, of a GPU that used some millijoules."""

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules: list[int]) -> None:
        self.left: Iterator[int] = iter(millijoules)

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, number: int) -> str:
        if number:
            raise self.NVMLError("Invalid Argument")
        return "gpu"

    def nvmlDeviceGetTotalEnergyConsumption(self, device: str) -> int:
        assert device == "gpu"
        return next(self.left)


def test_a_gpu_counts_from_where_it_was() -> None:
    meter = NvmlMeter(library=Nvml([5_000, 5_250, 7_000]))
    assert meter.read() == 0.25
    assert meter.read() == 2.0
    with pytest.raises(TargetError, match="GPU 1 has no energy counter: Invalid Argument"):
        NvmlMeter(1, Nvml([]))


LINEAR = LinearSite("fc", 128, 64, 4, True)


def test_the_estimate_is_counted_by_hand() -> None:
    meter = EstimatedMeter()
    layers = (Row(LINEAR, Dense(8)), Row(LINEAR, LowRank(16)))
    m = EnergyModel()
    weights = 128 * 64 + 16 * (128 + 64)
    inside = 4 * weights * m.int8_mac_j + weights * m.weight_byte_j
    rest = 1000 * m.f32_mac_j + 500 * m.moved_byte_j
    assert meter.estimate(layers, Work(1000, 500, 3)) == pytest.approx(inside + rest)
    meter.count(layers, Work(1000, 500, 3), 3)
    assert meter.read() == pytest.approx(3 * (inside + rest))
    assert weight_bytes(Row(LINEAR, Dense(4))) == 128 * 64 // 2 + 128 * 64 * 2 // 64
    assert weight_bytes(Row(LINEAR, Dense(8))) == 128 * 64
    assert weight_bytes(Row(LINEAR, Dense(32))) == 4 * 128 * 64
    with pytest.raises(ValueError, match="calls is -1"):
        meter.count(layers, Work(), -1)


@dataclass
class Ticking(AbstractMeter):
    """A counter of 10 W that is updated every 10 ms of a clock that calls advance."""

    name = "ticking"
    label = Label.MEASURED
    period_s = 0.01
    now: float = 0.0035
    stuck: bool = False
    reads: list[float] = field(default_factory=list)

    def read(self) -> float:
        self.now += 1e-5  # reading takes time, too
        return 0.0 if self.stuck else 10 * int(self.now / self.period_s) * self.period_s

    def call(self) -> None:
        self.now += 0.0007

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize("share", [0.1, 0.01])
def test_short_calls_are_measured_to_a_share_of_a_tick(share: float) -> None:
    meter = Ticking()
    joules = per_call(meter, meter.call, error=share, clock=meter.clock)
    assert joules == pytest.approx(0.007, rel=1.1 * share)


def test_a_counter_that_stands_still_is_refused() -> None:
    meter = Ticking(stuck=True)
    with pytest.raises(TargetError, match="ticking: the counter stood still"):
        per_call(meter, meter.call, clock=meter.clock)
    with pytest.raises(ValueError, match="error is 0"):
        per_call(meter, meter.call, error=0, clock=meter.clock)


def test_every_meter_rises() -> None:
    meter = EstimatedMeter()
    before = meter.read()
    for _ in range(3):
        meter.count((Row(LINEAR, Dense(8)),), Work(), 1)
        assert meter.read() > before
        before = meter.read()
