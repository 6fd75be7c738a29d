"""Operators of the lowering graph compute what torch computes."""

from pathlib import Path

from t3c.targets import detect_host
from tests.codegen.small_models import lower


def test_root_mean_square_norms_agree_with_torch(tmp_path: Path) -> None:
    artifact, _ = lower("rms", detect_host(), tmp_path / "artifact")
    assert str(artifact.manifest.stages) == "verified (device)"
    for compiled in artifact.manifest.profiles:
        assert compiled.parity is not None
        assert compiled.parity.relative < 1e-5
