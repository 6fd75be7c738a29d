"""run.cc of an artifact computes what the session computes, on this machine."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.runtime import toy

COMPILER = shutil.which("g++")


def folder(package: str, *parts: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.joinpath(*parts)


@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs g++ on Linux")
def test_run_cc_computes_every_profile(tmp_path: Path) -> None:
    artifact = toy.write_native(tmp_path / "artifact")
    libraries = [folder("tvm", "lib"), folder("tvm_ffi", "lib")]
    command = [str(COMPILER), "-O1", "-std=c++17", str(artifact.path / "run.cc"), "-o", "run"]
    command += ["-I", str(folder("tvm_ffi", "include"))]
    command += [f"-L{path}" for path in libraries]
    command += ["-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    x = toy.inputs()
    x.tofile(tmp_path / "0.in")
    found = os.pathsep.join(map(str, libraries))
    for name in toy.NAMES:
        done = subprocess.run(
            ["./run", str(artifact.path), name, "."],
            cwd=tmp_path,
            env=os.environ | {"LD_LIBRARY_PATH": found},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == "output float32 4 32"
        y = np.fromfile(tmp_path / "0.out", np.float32).reshape(toy.ROWS, toy.N)
        np.testing.assert_allclose(y, toy.expected(name, x), rtol=1e-4, atol=1e-4)
