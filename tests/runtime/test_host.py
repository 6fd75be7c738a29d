"""Checks of the machine against what a library needs."""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from t3c.core.errors import TargetError
from t3c.core.manifest import TargetInfo
from t3c.runtime import host


@pytest.fixture(autouse=True)
def forget() -> None:
    host.allow_tiles.cache_clear()


def kernel_says(monkeypatch: pytest.MonkeyPatch, answer: int) -> list[tuple[int, ...]]:
    calls: list[tuple[int, ...]] = []

    def syscall(*args: int) -> int:
        calls.append(args)
        return answer

    monkeypatch.setattr(ctypes, "CDLL", lambda *_a, **_k: SimpleNamespace(syscall=syscall))
    return calls


def test_tiles_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = kernel_says(monkeypatch, 0)
    host.allow_tiles()
    host.allow_tiles()
    assert calls == [(158, 0x1023, 18)]


def test_a_refusal_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_says(monkeypatch, -1)
    with pytest.raises(TargetError, match="lower the model for a target without AMX"):
        host.allow_tiles()


def test_tiles_exist_on_linux_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(TargetError, match="Linux only"):
        host.allow_tiles()


def test_an_amx_library_asks_for_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = kernel_says(monkeypatch, 0)
    monkeypatch.setattr(host, "cpu_features", lambda: frozenset({"amx_tile"}))
    monkeypatch.setattr(host, "library_machine", lambda _path: host.machine())
    host.check(TargetInfo("x86-amx", "llvm", None, "spr", ("amx_tile",)), Path("x.so"))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("raw", "name"), [("AMD64", "x86_64"), ("arm64", "aarch64"), ("riscv64", "riscv64")]
)
def test_machines_are_spelled_as_in_triples(
    monkeypatch: pytest.MonkeyPatch, raw: str, name: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: raw)
    assert host.machine() == name


def test_an_unknown_elf_machine_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"\x7fELF" + bytes(14) + (250).to_bytes(2, "little"))
    assert host.library_machine(tmp_path / "x.so") == "ELF machine 250"
