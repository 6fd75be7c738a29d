import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest

import t3c.targets as targets
from t3c.core.errors import TargetError
from t3c.targets import TARGETS, best_level, cpu_features, detect_host, get
from t3c.targets.base import TargetSpec
from t3c.targets.x86 import AMX, AVX2, AVX_VNNI, BASELINE, LEVELS, VNNI
from tests.conformance.target import TargetConformance

NAMED = sorted(set(TARGETS) - {"x86"})
CPUINFO = "processor\t: 0\nflags\t\t: {}\n\nprocessor\t: 1\nflags\t\t: other\n"


class TestEveryTarget(TargetConformance):
    @pytest.fixture(params=NAMED)
    def spec(self, request: pytest.FixtureRequest) -> TargetSpec:
        return get(request.param)


@pytest.mark.parametrize("name", NAMED)
def test_a_target_is_called_what_the_registry_calls_it(name: str) -> None:
    assert get(name).name == name


def test_unknown_targets_are_refused_and_the_known_ones_named() -> None:
    with pytest.raises(TargetError, match=r"unknown target 'tpu'; known are arm, .*x86-vnni"):
        get("tpu")


@pytest.mark.parametrize("level", LEVELS, ids=lambda spec: spec.name)
def test_x86_is_the_best_level_of_the_machine(
    level: TargetSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "cpu_features", lambda: level.features)
    spec = get("x86")
    assert (spec.name, spec.mcpu, spec.linear) == ("x86", level.mcpu, level.linear)


def test_one_missing_feature_falls_to_the_next_level() -> None:
    features = AMX.features
    for spec, below, missing in (
        (AMX, VNNI, "amx_int8"),
        (VNNI, AVX_VNNI, "avx512_vnni"),
        (AVX_VNNI, AVX2, "avx_vnni"),
        (AVX2, BASELINE, "fma"),
    ):
        assert best_level("x86", LEVELS, features) is spec
        features -= {missing}
        assert best_level("x86", LEVELS, features) is below


def test_x86_on_a_machine_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "cpu_features", lambda: frozenset({"asimd"}))
    with pytest.raises(TargetError, match="name the level of the device instead: 'x86-amx'"):
        get("x86")


def test_features_are_those_of_the_first_processor() -> None:
    assert cpu_features(CPUINFO.format("sse2 avx2")) == {"sse2", "avx2"}
    assert cpu_features("Features\t: asimd asimddp\n") == {"asimd", "asimddp"}
    assert cpu_features("nothing here") == frozenset()


def test_the_host_needs_no_cross_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, features, name in (
        ("aarch64", {"asimd", "asimddp"}, "arm"),
        ("aarch64", {"asimd"}, "arm-neon"),
        ("x86_64", AVX2.features, "x86-avx2"),
    ):
        monkeypatch.setattr("platform.machine", lambda m=machine: m)
        monkeypatch.setattr(targets, "cpu_features", lambda f=features: frozenset(f))
        spec = detect_host()
        assert (spec.name, spec.triple, spec.cross_compiler) == (name, None, None)
    monkeypatch.setattr("platform.machine", lambda: "sparc64")
    with pytest.raises(TargetError, match="host architecture 'sparc64'"):
        detect_host()


def test_third_parties_add_targets_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("riscv", "t3c.targets._example:RISCV", "t3c.targets")

    def entry_points(**select: Any) -> EntryPoints:
        return EntryPoints([point]).select(**select)

    monkeypatch.setattr(targets, "entry_points", entry_points)
    assert get("riscv").name == "riscv"
    with pytest.raises(TargetError, match="riscv"):
        get("tpu")


def test_targets_load_neither_torch_nor_tvm() -> None:
    code = (
        "import sys, t3c.targets as t; [t.get(n) for n in t.TARGETS if n != 'x86'];"
        "sys.exit(bool({'torch', 'tvm', 'xgboost'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
