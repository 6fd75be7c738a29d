"""Servers of TVM's RPC on loopback, each a process of its own."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from t3c import targets
from t3c.core.errors import TargetError
from t3c.cost_models.dataset import Dataset
from t3c.cost_models.device import this_device
from t3c.measurement import run
from t3c.measurement.hosts import Host, Loaded, connect
from t3c.measurement.run import Plan, measure
from t3c.measurement.tracker import Tracker
from t3c.measurement.units import Unit

pytestmark = pytest.mark.slow
START_S = 120
LAYERS = Plan(kernels=1, networks=("mlp-1x768x3072-d3",))


@contextmanager
def servers(count: int, *more: str) -> Generator[tuple[list[subprocess.Popen[bytes]], list[int]]]:
    """So many servers and their ports; they end with the block."""
    made: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as scratch:
        logs = [Path(scratch) / str(i) for i in range(count)]
        try:
            for i, log in enumerate(logs):
                ports = ("--port", str(9300 + 20 * i), "--port-end", str(9319 + 20 * i))
                command = [sys.executable, "-m", "tvm.exec.rpc_server", "--host", "127.0.0.1"]
                with log.open("wb") as to:
                    made.append(subprocess.Popen([*command, *ports, *more], stdout=to, stderr=to))
            yield made, [port_of(log) for log in logs]
        finally:
            for one in made:
                end(one)


def port_of(log: Path) -> int:
    """The port that a server says it took."""
    limit = time.monotonic() + START_S
    while (found := re.search(r"bind to 127\.0\.0\.1:(\d+)", log.read_text())) is None:
        assert time.monotonic() < limit, log.read_text()
        assert "Error" not in log.read_text(), log.read_text()
        time.sleep(0.1)
    return int(found[1])


def end(one: subprocess.Popen[bytes]) -> None:
    """A server serves from processes of its own: end it with all that it started."""
    for pid in (*children(one.pid), one.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    one.wait(10)


def reach(ports: list[int]) -> list[Host]:
    """Hosts of servers that may not listen yet."""
    limit = time.monotonic() + START_S
    while True:
        try:
            return connect(",".join(f"127.0.0.1:{port}" for port in ports))
        except TargetError:
            assert time.monotonic() < limit
            time.sleep(0.1)


@pytest.fixture(scope="module", autouse=True)
def short() -> Generator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ROUNDS", 1), ("SHARD", 2), ("BATCH", 1)):
            patch.setattr(run, name, value)
        yield


def measured(path: Path, hosts: list[Host], folder: Path, said: list[str]) -> Dataset:
    spec = targets.detect_host()
    return measure(
        path, this_device(spec), spec, hosts, plan=LAYERS, workers=0, folder=folder, say=said.append
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("units")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Dataset:
    """What one server measures."""
    with servers(1) as (_, ports):
        hosts = reach(ports)
        return measured(folder / "one.jsonl", hosts, folder, [])


class Counted(Host):
    """A host that notes its units."""

    units: list[str]

    def load(self, unit: Unit) -> Loaded:
        self.units.append(unit.name)
        return super().load(unit)


def counted(host: Host) -> Counted:
    host.__class__ = Counted
    assert isinstance(host, Counted)
    host.units = []
    return host


def test_two_servers_together_measure_the_rows_of_one(alone: Dataset, folder: Path) -> None:
    with servers(2) as (_, ports):
        hosts = [counted(h) for h in reach(ports)]
        both = measured(folder / "two.jsonl", list(hosts), folder, [])
    assert set(both.rows) == set(alone.rows)
    assert len(alone.kernels) >= 4
    assert len(alone.profiles) == 5
    assert all(host.units for host in hosts)
    pairs = zip(_timed(both), _timed(alone), strict=True)
    assert all(0.1 < one / other < 10 for one, other in pairs)


def _timed(rows: Dataset) -> list[float]:
    """Medians, by key."""
    found = {row.key: row.seconds.p50_s for row in rows.kernels}
    found |= {row.key: row.seconds.p50_s for row in rows.profiles}
    return [found[key] for key in sorted(found)]


class Doomed(Host):
    """A host whose server is killed while it measures."""

    process: subprocess.Popen[bytes]
    loads: int

    def load(self, unit: Unit) -> Loaded:
        found = super().load(unit)
        self.loads += 1
        end(self.process)
        return found


def children(pid: int) -> list[int]:
    """Processes that a process started, and those that they did."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found += [int(path.parent.name), *children(int(path.parent.name))]
    return found


def test_a_server_that_is_killed_loses_no_row(alone: Dataset, folder: Path) -> None:
    told: list[str] = []
    with servers(2) as (processes, ports):
        hosts = reach(ports)
        doomed = hosts[0]
        doomed.__class__ = Doomed
        assert isinstance(doomed, Doomed)
        doomed.process, doomed.loads = processes[0], 0
        found = measured(folder / "killed.jsonl", hosts, folder, told)
    assert set(found.rows) == set(alone.rows)
    assert doomed.loads == 1
    assert any("failed and is left out" in line for line in told)
    assert Dataset.read(found.path).rows == found.rows


def test_servers_are_found_through_a_tracker(alone: Dataset, folder: Path) -> None:
    with Tracker() as tracker:
        worker = threading.Thread(target=tracker.serve_forever)
        worker.start()
        try:
            address = "{}:{}".format(*tracker.address)
            with servers(2, "--tracker", address, "--key", "board"):
                limit = time.monotonic() + START_S
                while tracker.board.counts().get("board", {}).get("free", 0) < 2:
                    assert time.monotonic() < limit
                    time.sleep(0.05)
                hosts = connect(f"tracker://{address}/board")
                assert len(hosts) == 2
                found = measured(folder / "tracked.jsonl", hosts, folder, [])
        finally:
            tracker.shutdown()
            worker.join()
    assert set(found.rows) == set(alone.rows)
