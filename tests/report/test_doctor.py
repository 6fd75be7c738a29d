"""The doctor says what works, and what to do about the rest."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from t3c.core.errors import TargetError
from t3c.report import doctor
from t3c.report.doctor import Check, examine, fits, healthy, pins
from t3c.runtime import emulate, host
from t3c.targets import get


def found(name: str) -> Check:
    return next(check for check in examine() if check.name == name)


def test_every_check_has_a_finding_and_every_problem_an_advice() -> None:
    checks = examine()
    assert all(check.found for check in checks)
    assert all(check.advice for check in checks if check.state == "missing")


def test_pins_are_read_from_requirement_lines() -> None:
    lines = ["torch==2.13.*", "numpy>=2", 'gt==0.1 ; extra == "demo"', 'x>1 ; extra == "y"']
    assert pins(lines) == {"torch": "2.13.*", "gt": "0.1"}


@pytest.mark.parametrize(
    ("installed", "pin", "keeps"),
    [
        ("2.13.0+cpu", "2.13.*", True),
        ("2.14.0", "2.13.*", False),
        ("0.27.0.post1", "0.27.0.post1", True),
        ("0.27.0", "0.27.0.post1", False),
    ],
)
def test_a_version_keeps_its_pin_or_not(installed: str, pin: str, keeps: bool) -> None:
    assert fits(installed, pin) is keeps


def only(*names: str) -> Callable[[str], str | None]:
    """Stands in for shutil.which."""
    return lambda name: f"/bin/{name}" if name in names else None


def test_without_a_linker_nothing_can_be_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", only())
    check = found("C++ compiler")
    assert check.state == "missing"
    assert not healthy([check])
    assert "g++" in check.advice


def test_arm_is_built_emulated_or_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(get("arm"), triple="riscv64-linux-gnu")  # foreign on every test machine
    ask = doctor._target  # pyright: ignore[reportPrivateUsage]
    assert spec.cross_compiler is not None
    assert spec.emulator is not None
    monkeypatch.setattr(shutil, "which", only())
    assert spec.cross_compiler in ask("arm", spec).advice
    monkeypatch.setattr(shutil, "which", only(spec.cross_compiler))
    assert ask("arm", spec).found == "builds only"
    monkeypatch.setattr(shutil, "which", only(spec.cross_compiler, spec.emulator))
    monkeypatch.setenv("T3C_RISCV64_RUNTIME", str(tmp_path))
    assert "let T3C_RISCV64_RUNTIME name" in ask("arm", spec).advice
    for name in emulate.LIBRARIES:
        (tmp_path / name).touch()
    assert ask("arm", spec).found == "builds, runs under emulation"


def test_missing_features_of_a_level_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(get("x86-avx2"), triple=host.machine(), features=frozenset({"avx9000"}))
    check = doctor._target("x86", spec)  # pyright: ignore[reportPrivateUsage]
    assert (check.found, check.advice) == ("builds only", "this processor lacks avx9000")


def test_a_target_without_kernels_does_not_claim_to_build() -> None:
    spec = replace(get("arm"), linear="abacus")
    check = doctor._target("arm", spec)  # pyright: ignore[reportPrivateUsage]
    assert (check.state, check.found) == ("warning", "no kernels")
    assert check.advice == "this version has no linear kernels 'abacus'"


def test_too_many_threads_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "4096")
    assert found("TVM_NUM_THREADS").state == "warning"


def test_a_broken_pin_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda _name: ["torch==1.0.*", "gone==3"])
    monkeypatch.setattr(doctor, "CHECKED", ("torch", "gone"))
    assert found("torch").advice == "T3C is tested with 1.0.*: pip install torch==1.0.*"
    assert (found("gone").state, found("gone").advice) == ("missing", "pip install gone==3")


def test_a_refused_tile_permission_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise TargetError("no tiles")

    monkeypatch.setattr(doctor, "cpu_features", lambda: frozenset({"amx_tile"}))
    monkeypatch.setattr(host, "allow_tiles", refuse)
    assert found("amx tiles").advice == "no tiles"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machine_has_a_level() -> None:
    assert found("cpu level").state == "ok"
