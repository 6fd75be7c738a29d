"""The family without kernels computes what the kernels compute; here it runs on this machine."""

from dataclasses import replace
from pathlib import Path

import pytest

from t3c.codegen.families import families_of
from t3c.core.errors import TargetError
from t3c.targets import detect_host
from tests.codegen.small_models import lower

HOST = detect_host()
GENERIC = replace(HOST, name="generic", linear="generic", conv="generic")


@pytest.mark.parametrize("name", ["block", "rms", "conv"])
def test_generic_libraries_agree_with_torch(name: str, tmp_path: Path) -> None:
    artifact, _ = lower(name, GENERIC, tmp_path / "artifact")
    assert str(artifact.manifest.stages) == "verified (device)"
    assert len(artifact.manifest.profiles) == (1 if name == "conv" else 2)
    for compiled in artifact.manifest.profiles:
        assert compiled.parity is not None
        assert compiled.parity.relative < 1e-4


def test_generic_stands_alone() -> None:
    with pytest.raises(TargetError, match="'generic' goes with 'generic' only"):
        families_of(replace(GENERIC, conv="portable"))
