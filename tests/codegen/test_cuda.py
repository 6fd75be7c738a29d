"""CUDA libraries hold machine code for their GPU, or are refused."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from t3c import targets
from t3c.codegen import cuda, tools
from t3c.codegen.build import tvm_target
from t3c.codegen.tvm_api import relax, tvm
from t3c.core.errors import LoweringError, TargetError
from t3c.runtime import host
from tests.codegen.small_models import lower

nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the CUDA toolkit (nvcc)")
cross = pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="needs aarch64-linux-gnu-g++"
)


@pytest.mark.cuda
@nvcc
def test_a_transformer_block_becomes_machine_code(tmp_path: Path) -> None:
    artifact, told = lower("block", "cuda-sm90", tmp_path / "artifact")
    assert cuda.FATBIN in artifact.library.read_bytes()
    assert b"sm_90" in artifact.library.read_bytes()
    assert str(artifact.manifest.stages) == "built"
    assert any("built, not run" in line for line in told)
    assert len(artifact.manifest.profiles) == 2
    for compiled in artifact.manifest.profiles:
        assert compiled.function.encode() in artifact.library.read_bytes()
        assert compiled.profile.ram_bytes > compiled.profile.storage_bytes > 0


@pytest.mark.cuda
@nvcc
@cross
def test_jetson_links_convolutions_for_its_own_processor(tmp_path: Path) -> None:
    artifact, _ = lower("conv", "jetson", tmp_path / "artifact")
    assert cuda.FATBIN in artifact.library.read_bytes()
    assert host.library_machine(artifact.library) == "aarch64"


def test_a_missing_toolkit_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(TargetError, match="CUDA toolkit"):
        tools.require(targets.get("cuda"))
    with pytest.raises(TargetError, match="CUDA toolkit"):
        lower("mlp", "cuda", tmp_path / "artifact")


@pytest.mark.parametrize(("status", "message"), [(0, "no machine code"), (1, "nvcc is unwell")])
def test_a_library_without_machine_code_is_refused(
    status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[-1])
        (folder / "model.so").write_bytes(b"\x7fELF and CUDA source")
        (folder / "planned.json").write_text(json.dumps({}))
        return subprocess.CompletedProcess(command, status, "", "nvcc is unwell")

    monkeypatch.setattr(cuda, "_toolkit", lambda: Path("/"))
    monkeypatch.setattr(cuda, "_environment", lambda folder, toolkit: {})
    monkeypatch.setattr(subprocess, "run", run)
    target = tvm_target(targets.get("cuda"))
    with pytest.raises(LoweringError, match=message):
        cuda.compile_module(tvm.IRModule(), target, {}, None)


def test_generic_schedules_bind_threads() -> None:
    target = tvm_target(targets.get("cuda"))
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((64, 64), "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.op.nn.relu(x)))
    with target:
        module = cuda.schedule(relax.transform.LegalizeOps()(builder.finalize()), target)
    assert "threadIdx.x" in module.script()
