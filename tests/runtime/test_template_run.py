"""run.py of an artifact works with plain TVM: t3c is not installed there."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from t3c.core.artifact import Artifact
from tests.runtime import toy

BLOCK = "import sys; sys.modules['t3c'] = None; import runpy; sys.argv = sys.argv[1:]; "


@pytest.mark.parametrize("write", [toy.write, toy.write_native])
@pytest.mark.parametrize("name", toy.NAMES)
def test_run_py_needs_no_t3c(tmp_path: Path, name: str, write: Callable[[Path], Artifact]) -> None:
    artifact = write(tmp_path / "artifact")
    x = toy.inputs()
    np.savez(tmp_path / "in.npz", x=x)
    code = BLOCK + "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-I", "-c", code, str(artifact.path / "run.py"), name, "in.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, _, last = done.stdout.splitlines()
    assert first.startswith("logits (4, 32) float32 mean ")
    assert float(first.split()[-1]) == pytest.approx(toy.expected(name, x).mean(), abs=1e-5)
    assert last.startswith(f"profile {name}: ")
    assert "t3c" not in (artifact.path / "run.py").read_text()
