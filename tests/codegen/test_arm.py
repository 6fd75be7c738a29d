"""ARM libraries: linked by the cross compiler, proved under emulation."""

import platform
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import t3c
from t3c import targets
from t3c.codegen import tools
from t3c.core.artifact import Artifact
from t3c.core.errors import LoweringError, TargetError
from t3c.runtime import emulate, host
from t3c.targets import TargetSpec
from tests.codegen.small_models import lower

foreign = pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is the target")


def machine(spec: TargetSpec) -> emulate.Machine:
    try:
        return emulate.machine(spec)
    except TargetError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    machine(targets.get("arm"))
    return lower("block", "arm", tmp_path_factory.mktemp("arm") / "block")[0]


def assert_proved(artifact: Artifact) -> None:
    assert str(artifact.manifest.stages) == "verified (emulated)"
    assert host.library_machine(artifact.library) == "aarch64"
    for compiled in artifact.manifest.profiles:
        assert compiled.parity is not None
        assert (compiled.parity.where, compiled.parity.relative < 1e-4) == ("emulated", True)


@pytest.mark.arm
@foreign
def test_a_transformer_block_agrees_with_torch(block: Artifact) -> None:
    assert_proved(block)
    with pytest.raises(TargetError, match="aarch64"):
        t3c.load(block)


@pytest.mark.arm
@foreign
def test_convolutions_agree_on_the_oldest_processor(tmp_path: Path) -> None:
    assert "cortex-a72" in machine(targets.get("arm-neon")).command
    assert_proved(lower("conv", "arm-neon", tmp_path / "artifact")[0])


@pytest.mark.arm
@foreign
def test_the_shipped_host_runs_every_profile(block: Artifact) -> None:
    emulated = emulate.Emulated(block, machine(targets.get("arm")))
    inputs = [np.ones(spec.shape, spec.dtype) for spec in block.manifest.inputs]
    assert (block.path / "run.cc").is_file()
    for compiled in block.manifest.profiles:
        (result,) = emulated.call(compiled.profile.name, inputs)
        assert np.isfinite(result).all()
    with pytest.raises(LoweringError, match="no profile huge"):
        emulated.call("huge", inputs)
    with pytest.raises(ValueError, match="is \\(1,\\), not"):
        emulated.call("max", [np.ones(1), inputs[1]])


@pytest.mark.arm
@foreign
def test_dot_products_fail_clearly_on_a_processor_without_them(block: Artifact) -> None:
    arm = targets.get("arm")
    old = emulate.Emulated(block, machine(replace(arm, mcpu="cortex-a53")))
    inputs = [np.ones(spec.shape, spec.dtype) for spec in block.manifest.inputs]
    with pytest.raises(LoweringError, match="illegal instruction"):
        old.call("max", inputs)


@foreign
def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = targets.get("arm")
    with pytest.raises(TargetError, match="names no emulator"):
        emulate.machine(replace(arm, emulator=None))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("T3C_AARCH64_RUNTIME", str(tmp_path))
    with pytest.raises(TargetError, match="make aarch64-runtime"):
        emulate.machine(arm)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(TargetError, match="qemu-user-static"):
        emulate.machine(arm)
    with pytest.raises(TargetError, match="apt-get install gcc-aarch64-linux-gnu"):
        tools.require(arm)
    with pytest.raises(TargetError, match="apt-get install gcc-aarch64-linux-gnu"):
        lower("mlp", "arm", tmp_path / "artifact")


@pytest.mark.arm
@foreign
def test_without_the_runtime_it_is_built_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T3C_AARCH64_RUNTIME", str(tmp_path))
    artifact, told = lower("mlp", "arm", tmp_path / "artifact")
    assert str(artifact.manifest.stages) == "built"
    assert any("make aarch64-runtime" in line for line in told)
    assert tuple(told) == artifact.manifest.assumptions
