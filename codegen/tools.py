"""Programs that a target needs beside TVM, asked for before any long work begins."""

import shutil

from t3c.codegen.build import is_host
from t3c.core.errors import TargetError
from t3c.targets.base import TargetSpec


def require(spec: TargetSpec) -> None:
    """Check that this machine can build for a target.

    Raises:
        TargetError: A tool is missing; the message says what to install.
    """
    compiler = spec.cross_compiler
    if compiler is not None and not is_host(spec) and shutil.which(compiler) is None:
        triple = compiler.removesuffix("-g++")
        raise TargetError(
            f"target {spec.name!r} is linked by {compiler}, which is not on the PATH; on Debian or "
            f"Ubuntu: apt-get install gcc-{triple} g++-{triple}"
        )
    if spec.kind == "cuda" and shutil.which("nvcc") is None:
        raise TargetError(
            f"target {spec.name!r} is compiled by nvcc, which is not on the PATH; install the CUDA "
            "toolkit 13 (no GPU and no driver are needed to build) and put its bin folder on the "
            "PATH, or lower for a CPU target"
        )
