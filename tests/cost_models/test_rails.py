"""Rails of a Jetson, on a tree of files as Linux has it and on what jetson-stats gives."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from t3c.core.errors import TargetError
from t3c.core.profile import Label
from t3c.cost_models import meters, rails
from t3c.cost_models.meters import HwmonMeter, JtopMeter, access, best_meter, per_call
from t3c.cost_models.rails import (
    AbstractPower,
    HwmonPower,
    Integral,
    JtopPower,
    feeding,
    rails_of,
)


def chip(root: Path, number: int, listed: Mapping[str, tuple[int, int]]) -> Path:
    """Rail -> (mV, mA), as the driver of the INA3221 shows it."""
    folder = root / f"hwmon{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text("ina3221\n")
    for i, (name, (volts, amperes)) in enumerate(listed.items(), 1):
        (folder / f"in{i}_label").write_text(f"{name}\n")
        (folder / f"in{i}_input").write_text(f"{volts}\n")
        (folder / f"curr{i}_input").write_text(f"{amperes}\n")
    (folder / "in7_label").write_text("sum of shunt voltages\n")
    (folder / "in7_input").write_text("40\n")
    return folder


@pytest.fixture
def orin_nx(tmp_path: Path) -> Path:
    fan = tmp_path / "hwmon0"
    fan.mkdir()
    (fan / "name").write_text("pwmfan\n")
    chip(
        tmp_path,
        4,
        {"VDD_IN": (5000, 1200), "VDD_CPU_GPU_CV": (5000, 400), "VDD_SOC": (5000, 300)},
    )
    return tmp_path


def test_the_rail_that_feeds_all_is_the_power(orin_nx: Path) -> None:
    assert set(rails_of(orin_nx)) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
    power = HwmonPower(orin_nx)
    assert power.names == ("VDD_IN",)
    assert power.watts() == pytest.approx(6.0)


def test_rails_that_together_feed_the_module_are_added(tmp_path: Path) -> None:
    chip(
        tmp_path,
        1,
        {"VDD_GPU_SOC": (19000, 100), "VDD_CPU_CV": (19000, 50), "VIN_SYS_5V0": (5000, 600)},
    )
    chip(tmp_path, 2, {"VDDQ_VDD2_1V8AO": (5000, 200)})
    assert HwmonPower(tmp_path).watts() == pytest.approx(1.9 + 0.95 + 3.0)


def test_rails_of_an_unknown_board_are_named_and_refused(tmp_path: Path) -> None:
    chip(tmp_path, 1, {"VDD_NEW": (5000, 1)})
    with pytest.raises(TargetError, match=r"rails VDD_NEW: which of them feed .* VDD_IN"):
        HwmonPower(tmp_path)
    with pytest.raises(TargetError, match="no INA3221 on this machine"):
        HwmonPower(tmp_path / "none")
    assert feeding(["A", "POM_5V_IN"]) == ("POM_5V_IN",)
    assert not access(tmp_path / "none", tmp_path)[2].works


def test_without_the_right_to_read_doctor_says_how_to_get_it(
    orin_nx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = access(orin_nx / "none", orin_nx)[2]
    assert (found.name, found.works) == ("rails", False)
    assert "sudo chmod a+r" in found.advice
    monkeypatch.undo()
    assert access(orin_nx / "none", orin_nx)[2].found == "VDD_IN"
    none = access(orin_nx / "none", orin_nx / "none")[2]
    assert "no Jetson" in none.found
    assert "jetson-stats" in none.advice

    def refuse(self: Path, *_: object, **__: object) -> str:
        if self.name.endswith("_input"):
            raise PermissionError(13, "Permission denied")
        with self.open() as file:
            return file.read()

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(TargetError, match=r"no right to read .*in1_input: sudo chmod a\+r"):
        HwmonPower(orin_nx)


class Power(AbstractPower):
    """Power that a test sets."""

    def __init__(self, *watts: float) -> None:
        self.left: Iterator[float] = iter(watts)
        self.closed = False

    def watts(self) -> float:
        try:
            return next(self.left)
        except StopIteration:
            raise TargetError("the sensor is gone") from None

    def close(self) -> None:
        self.closed = True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_power_is_added_up_over_the_time_that_passed_even_where_a_sample_is_late() -> None:
    clock = Clock()
    total = Integral(Power(2.0, 4.0, 4.0), 0.01, clock, start=False)
    assert total.read() == 0
    clock.now = 0.01
    total.sample()
    assert total.read() == pytest.approx(0.03)
    clock.now = 0.06  # five periods late
    total.sample()
    assert total.read() == pytest.approx(0.03 + 0.05 * 4)


def test_a_sensor_that_fails_and_a_thread_that_does_not_run_are_told() -> None:
    clock = Clock()
    total = Integral(Power(1.0), 0.01, clock, start=False)
    clock.now = 3.0
    with pytest.raises(TargetError, match=r"last sample of power is 3 s old, every 0\.01 s"):
        total.read()
    power = Power(1.0)
    gone = Integral(power, 1e-3)
    _wait(lambda: _fails(gone))
    with pytest.raises(TargetError, match="the sensor is gone"):
        gone.read()
    gone.close()
    assert power.closed


def _fails(total: Integral) -> bool:
    try:
        total.read()
    except TargetError:
        return True
    return False


def _wait(until: Any) -> None:
    limit = time.monotonic() + 10
    while not until():
        assert time.monotonic() < limit
        time.sleep(1e-3)


def test_one_sample_that_fails_is_no_failure() -> None:
    class Shaky(Power):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def watts(self) -> float:
            self.count += 1
            if self.count % 3 == 0:
                raise TargetError("the bus is busy")
            return 1.0

    power = Shaky()
    total = Integral(power, 1e-3)
    _wait(lambda: power.count > 20)
    assert total.read() > 0
    total.close()


def test_a_thread_samples_the_files_and_ends(orin_nx: Path) -> None:
    meter = HwmonMeter(orin_nx)
    assert (meter.name, meter.label, meter.period_s) == ("rails", Label.MEASURED, 0.01)
    _wait(lambda: meter.read() > 0)
    before = meter.read()
    (orin_nx / "new").write_text("2400\n")
    (orin_nx / "new").replace(orin_nx / "hwmon4" / "curr1_input")
    _wait(lambda: meter.read() > before)
    meter.close()
    assert not any(thread.name == "rails" for thread in threading.enumerate())


def jtop(power: object, error: Exception | None = None) -> SimpleNamespace:
    """The module, of a board with this power."""

    class Client:
        def __init__(self, interval: float) -> None:
            self.interval, self.power, self.open = interval, power, False

        def start(self) -> None:
            if error is not None:
                raise error
            self.open = True

        def close(self) -> None:
            self.open = False

    return SimpleNamespace(jtop=Client)


NX = {
    "rail": {"VDD_SOC": {"power": 1500, "avg": 1400}},
    "tot": {"name": "VDD_IN", "power": 6100, "avg": 6000},
}
AGX = {
    "rail": {
        "VDD_GPU_SOC": {"power": 1900},
        "VDD_CPU_CV": {"power": 950},
        "VIN_SYS_5V0": {"power": 3000},
        "VDDQ_VDD2_1V8AO": {"power": 1000},
    },
    "tot": {"power": 6850, "avg": 6850},
}
"""jetson-stats adds a rail that hangs on another one."""


def test_jetson_stats_gives_the_same_rails() -> None:
    assert JtopPower(jtop(NX)).watts() == pytest.approx(6.1)
    assert JtopPower(jtop(AGX)).watts() == pytest.approx(5.85)
    meter = JtopMeter(jtop(NX))
    assert (meter.name, meter.period_s) == ("jtop", 0.5)
    assert meter.read() == 0
    meter.close()
    with pytest.raises(TargetError, match="no power of this board"):
        JtopPower(jtop({}))
    with pytest.raises(TargetError, match=r"does not answer: inactive; sudo systemctl start jtop"):
        JtopPower(jtop(NX, RuntimeError("inactive")))
    with pytest.raises(TargetError, match="no package jetson-stats"):
        JtopPower()


def test_the_library_is_preferred_to_the_files(
    orin_nx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = best_meter(orin_nx / "none", orin_nx)
    assert isinstance(plain, HwmonMeter)
    plain.close()
    monkeypatch.setattr(rails, "import_module", lambda _: jtop(NX))
    found = best_meter(orin_nx / "none", orin_nx)
    assert isinstance(found, JtopMeter)
    found.close()
    assert access(orin_nx / "none", orin_nx)[2].found == "jetson-stats"


def test_windows_shorter_than_the_sampling_are_refused() -> None:
    meter = JtopMeter(jtop(NX))
    with pytest.raises(
        TargetError, match=r"jtop is updated every 0\.5 s; 2 s are too short .* 5 s"
    ):
        per_call(meter, lambda: None, most_s=2.0)
    meter.close()


def test_calls_are_repeated_until_the_window_is_long_enough() -> None:
    """Calls of 3 ms at 5 W, sampled every 10 ms of a clock that they move."""
    clock = Clock()

    class Busy(Power):
        def watts(self) -> float:
            return 5.0

    total = Integral(Busy(), 0.01, clock, start=False)
    sampled = 0.0

    def passes(seconds: float) -> None:
        nonlocal sampled
        clock.now += seconds
        while clock.now - sampled >= 0.01:
            sampled += 0.01
            total.sample()

    class Meter(meters.AbstractMeter):
        name = "rails"
        label = Label.MEASURED
        period_s = 0.01

        def read(self) -> float:
            passes(1e-4)
            return total.read()

    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        passes(3e-3)

    joules = per_call(Meter(), call, error=0.01, clock=clock)
    assert calls >= 300
    assert joules == pytest.approx(5.0 * 3e-3, rel=0.02)
