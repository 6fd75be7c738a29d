"""Threads: what the process may use is counted, nothing is bound, sessions keep their number."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from t3c.runtime import threads
from t3c.runtime.session import load
from tests.runtime import toy


def topology(root: Path, siblings: dict[int, str]) -> Path:
    for number, text in siblings.items():
        folder = root / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    return root


def test_two_hyperthreads_are_one_core(tmp_path: Path) -> None:
    root = topology(tmp_path, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    assert threads.physical_cores(range(4), root) == 2
    assert threads.physical_cores([0, 2], root) == 1
    assert threads.physical_cores([1, 9], root) == 2


def test_a_control_group_or_its_parent_limits(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert threads.cgroup_cores("0::/a/b\n", tmp_path) is None
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "a" / "cpu.max").write_text("250000 100000\n")
    assert threads.cgroup_cores("0::/a/b\n", tmp_path) == 2.5
    old = tmp_path / "cpu" / "x"
    old.mkdir(parents=True)
    (old / "cpu.cfs_quota_us").write_text("150000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert threads.cgroup_cores("4:cpu,cpuacct:/x\n0::/\n", tmp_path) == 1.5


def test_variables_go_before_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "available_cores", lambda: 6)
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.default_threads() == 3
    monkeypatch.setenv("TVM_NUM_THREADS", "2")
    assert threads.default_threads() == 2
    monkeypatch.setenv("TVM_NUM_THREADS", "many")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads.default_threads() == 6


def test_recorded_threads_go_before_cores_and_after_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "available_cores", lambda: 4)
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads.default_threads(n) for n in (1, 4, 6, None)] == [1, 4, 4, 4]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.default_threads(1) == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_the_mask_of_the_process_limits() -> None:
    code = "import os; os.sched_setaffinity(0, {0}); from t3c.runtime import threads; "
    code += "print(threads.available_cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_sessions_with_different_numbers_agree_in_one_thread_and_bind_nothing(
    tmp_path: Path,
) -> None:
    artifact = toy.write_native(tmp_path / "a")
    x, before = toy.inputs(), os.sched_getaffinity(0)
    want = load(artifact, threads=1)(x).logits
    for count in (2, 1, 3, 2):
        session = load(artifact, threads=count)
        assert session.threads == count
        np.testing.assert_array_equal(session(x).logits, want)
    assert os.sched_getaffinity(0) == before


def test_each_calling_thread_has_a_pool_and_an_arena(tmp_path: Path) -> None:
    session = load(toy.write_native(tmp_path / "a"), threads=2)
    x = toy.inputs()
    want, wrong = session(x).logits, list[bool]()

    def work() -> None:
        wrong.extend(not np.array_equal(session(x).logits, want) for _ in range(50))

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(wrong) == 200
    assert not any(wrong)


def test_no_thread_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threads is 0; at least 1 is needed"):
        load(toy.write_native(tmp_path / "a"), threads=0)
