import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from t3c import targets
from t3c.core.errors import CostModelError, TargetError
from t3c.core.formats import Dense
from t3c.core.profile import Label
from t3c.cost_models.dataset import Dataset, kernel_key
from t3c.cost_models.design import design
from t3c.cost_models.device import this_device
from t3c.cost_models.features import kind_of
from t3c.cost_models.meters import AbstractMeter, EstimatedMeter
from t3c.measurement import energy, run
from t3c.measurement.hosts import Host, connect
from t3c.measurement.run import Plan, frequency, measure, measure_on, sample
from t3c.measurement.zoo import NETWORKS

LAYERS = Plan(kernels=1, networks=())
"""The formats of one layer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="module")
def measured(folder: Path) -> Dataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ROUNDS", 1)
        return measure_on(
            "local",
            folder / "rows.jsonl",
            plan=LAYERS,
            workers=0,
            folder=folder / "units",
            say=print,
        )


def test_every_designed_layer_is_measured_once(measured: Dataset) -> None:
    step = targets.detect_host().rank_step
    assert list(measured.rows) == [kernel_key(row) for row, _ in design(1, step)]
    assert len({row.group for row in measured.kernels}) == 1
    for row in measured.kernels:
        assert 1e-7 < row.seconds.p50_s < 1
        assert row.seconds.samples + row.seconds.dropped == run.SHARD_CALLS
        assert row.seconds.load >= 0
        assert row.seconds.when
        weights = row.row.site.elements(row.row.format) * row.row.format.bits / 8
        assert weights <= row.bytes <= 2 * weights + 1e5


def refuse(*_: object) -> None:
    raise AssertionError("nothing is left to do")


def test_rows_that_are_there_are_neither_built_nor_measured_again(
    measured: Dataset, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = measured.path.read_bytes()
    monkeypatch.setattr(run, "_build", refuse)
    monkeypatch.setattr(run, "timed", refuse)
    again = measure_on(
        "local", measured.path, plan=LAYERS, workers=0, folder=folder / "none", say=print
    )
    assert measured.path.read_bytes() == before
    assert again.rows == measured.rows


def test_a_run_that_was_killed_while_writing_goes_on_with_what_was_built(
    measured: Dataset, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(measured.path.read_bytes()[:-30])
    monkeypatch.setattr(run, "_build", refuse)
    monkeypatch.setattr(run, "ROUNDS", 1)
    told: list[str] = []
    again = measure_on(
        "local", path, plan=LAYERS, workers=0, folder=folder / "units", say=told.append
    )
    assert "dropped half a line" in told[0]
    assert set(again.rows) == set(measured.rows)
    kept = list(measured.rows)[:-1]
    assert [again.rows[key] for key in kept] == [measured.rows[key] for key in kept]


class Broken(Host):
    """A device whose connection is lost at once."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.here = False

    def load(self, unit: object) -> object:  # type: ignore[override]
        raise RuntimeError("socket closed")


def test_a_device_that_fails_leaves_its_work_to_the_others(
    measured: Dataset, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROUNDS", 1)
    spec, told = targets.detect_host(), list[str]()
    common = {"plan": LAYERS, "workers": 0, "folder": folder / "units", "say": told.append}
    device = this_device(spec)
    hosts = [Broken("one"), Host("two")]
    found = measure(tmp_path / "rows.jsonl", device, spec, hosts, **common)  # type: ignore[arg-type]
    assert set(found.rows) == set(measured.rows)
    with pytest.raises(CostModelError, match=r"no device is left, 1 batches .* socket closed"):
        measure(tmp_path / "none.jsonl", device, spec, [Broken("one")], **common)  # type: ignore[arg-type]
    assert "one failed and is left out: socket closed" in told


def test_no_time_measures_nothing_and_says_so(folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    found = measure_on(
        "local",
        tmp_path / "rows.jsonl",
        minutes=1e-9,
        plan=LAYERS,
        workers=0,
        folder=tmp_path / "units",
        say=told.append,
    )
    assert not found.rows
    assert told == ["0 of 1 units were built in time; run again to go on"]


def test_interrupted_calls_are_left_out_and_counted() -> None:
    found = sample([1.0, 1.1, 0.9, 1.0, 1.05, 9.0, 3.0])
    assert (found.samples, found.dropped) == (5, 2)
    assert found.p50_s == 1.0
    assert found.p95_s <= 1.1


def test_the_frequency_is_read_where_there_is_one(tmp_path: Path) -> None:
    none = tmp_path / "none"
    assert frequency(none, none) == 0.0
    (tmp_path / "cpuinfo").write_text("processor : 0\ncpu MHz\t\t: 2596.135\n")
    assert frequency(none, tmp_path / "cpuinfo") == 2596.135
    (tmp_path / "cur").write_text("1800000\n")
    assert frequency(tmp_path / "cur", none) == 1800.0


@pytest.mark.parametrize("device", ["nowhere", "host:", "tracker://127.0.0.1", "a:1,b"])
def test_devices_that_are_none_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match=r"device .*: write"):
        connect(device)


def test_a_device_that_does_not_answer_is_named() -> None:
    with pytest.raises(TargetError, match=r"'127.0.0.1:1' cannot be reached: .*rpc_server"):
        connect("127.0.0.1:1")


def test_a_target_of_another_machine_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"'arm' is not this machine: name the device"):
        measure_on("local", tmp_path / "rows.jsonl", target="arm")
    with pytest.raises(TargetError, match="'cuda' is no CPU"):
        measure_on("local", tmp_path / "rows.jsonl", target="cuda")
    with pytest.raises(ValueError, match="no network 'vgg'"):
        measure_on("local", tmp_path / "rows.jsonl", plan=Plan(1, ("vgg",)))


def test_every_prefix_of_the_plan_has_layers_and_networks_of_each_family() -> None:
    jobs = Plan(kernels=200).jobs(targets.detect_host(), 1)
    first = jobs[:8]
    assert sum(bool(job.rows) for job in first) == 4
    assert len({job.name.partition("-")[0] for job in first if not job.rows}) == 4
    assert {job.name for job in jobs if not job.rows} == set(NETWORKS)
    dense = [row for job in jobs for row in job.rows if row.format == Dense(8)]
    assert len(dense) > 40


def test_threads_are_part_of_what_must_agree() -> None:
    one = this_device(targets.detect_host())
    assert one.differences(replace(one, threads=2)) == ["threads 1, not 2"]
    assert one.differences(one) == []


def test_few_layers_are_spread_over_kinds_and_the_head_says_whose_model_they_adapt(
    folder: Path, tmp_path: Path
) -> None:
    spec = targets.detect_host()
    (job,) = Plan(kernels=12, networks=(), few=True).jobs(spec, 1)
    assert len(job.rows) == len({kind_of(row) for row in job.rows}) == 12
    source = replace(this_device(spec), cpu="Another")
    found = measure_on(
        "local",
        tmp_path / "rows.jsonl",
        minutes=1e-9,
        plan=Plan(kernels=12, networks=(), few=True),
        workers=0,
        folder=folder / "none",
        source=source,
        say=print,
    )
    assert Dataset.read(found.path).source == source


@dataclass
class Watts(AbstractMeter):
    """Ten watts, counted every ms."""

    name = "invented"
    label = Label.MEASURED
    period_s = 1e-3

    def read(self) -> float:
        return 10 * int(time.monotonic() / self.period_s) * self.period_s


@pytest.mark.slow
def test_a_meter_on_this_machine_gives_joules_of_every_layer_and_is_gone_on_with(
    measured: Dataset, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(measured.path.read_bytes())
    monkeypatch.setattr(energy, "ERROR", 0.1)
    told: list[str] = []
    early = {"plan": LAYERS, "workers": 0, "folder": folder / "units", "say": told.append}
    measure_on("local", path, meter=Watts(), minutes=1e-9, **early)  # type: ignore[arg-type]
    assert told == ["1 of 1 units to meter were not built in time; run again to go on"]
    more = {"plan": LAYERS, "workers": 0, "folder": folder / "units", "say": print}
    found = measure_on("local", path, meter=Watts(), **more)  # type: ignore[arg-type]
    assert found.meter == ("invented", Label.MEASURED)
    assert {e.row for e in found.kernel_energies} == {k.row for k in found.kernels}
    seconds = {k.row: k.seconds.p50_s for k in found.kernels}
    for one in found.kernel_energies:
        assert 0.3 < one.energy.joules / (10 * seconds[one.row]) < 30
    monkeypatch.setattr(run, "_build", refuse)
    units: list[int] = []
    monkeypatch.setattr(run, "meter_units", lambda _, found, *__: units.append(len(found)))
    again = measure_on("local", path, meter=Watts(), **more)  # type: ignore[arg-type]
    assert again.rows == found.rows
    assert units == [0]
    alone = measure_on("local", path, meter=EstimatedMeter(), **more)  # type: ignore[arg-type]
    assert alone.rows == found.rows
