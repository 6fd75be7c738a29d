"""CUDA libraries: schedules for the GPU, machine code by nvcc in a process of its own.

TVM loads its CUDA runtime only if it finds the driver library when it is imported, and otherwise
embeds CUDA source without a word. Building needs neither GPU nor driver: where there is none, the
process is given a stub of the nine driver functions, all of which fail if they are ever called.
The library is refused unless it holds machine code.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t3c.codegen.finish import finish
from t3c.codegen.tvm_api import relax, tvm
from t3c.core.errors import LoweringError, TargetError

FATBIN = bytes.fromhex("50ed55ba")
"""First bytes of compiled device code."""
DRIVER = "libcuda.so.1"
_STUB = 'extern "C" {\n%s\n}\n' % "\n".join(  # noqa: UP031
    f"int {name}(void) {{ return 100; }}"  # CUDA_ERROR_NO_DEVICE
    for name in (
        "cuDeviceGetName",
        "cuFuncSetAttribute",
        "cuGetErrorName",
        "cuGetErrorString",
        "cuLaunchKernelEx",
        "cuModuleGetFunction",
        "cuModuleLoadData",
        "cuModuleUnload",
        "cuTensorMapEncodeTiled",
    )
)


@dataclass(frozen=True, slots=True)
class Linked:
    """The bytes of a library that has been linked already."""

    content: bytes


def schedule(module: Any, target: Any) -> Any:
    """Give every unscheduled function a GPU schedule.

    The rules are told of a GPU without tensor cores: the code that TVM 0.27 gets out of their int8
    tensor-core schedule does not compile (its pass inject_software_pipeline fails).
    """
    gpu = tvm.s_tir.dlight.gpu
    rules = (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback())
    plain = tvm.target.Target({**json.loads(str(target)), "arch": "sm_61"})
    with plain:
        return tvm.s_tir.dlight.ApplyDefaultSchedule(*rules)(module)


def compile_module(
    module: Any, target: Any, planned: dict[str, int], cross_compiler: str | None
) -> Linked:
    """Compile and link a scheduled module.

    Args:
        module: Relax module, all functions scheduled.
        target: TVM's target, with its host.
        planned: Filled with the planned activation bytes of each function.
        cross_compiler: Linker of a foreign host; None links for this machine.

    Raises:
        TargetError: nvcc or a library of the CUDA toolkit is missing.
        LoweringError: The compiler refuses, or the library holds no machine code.
    """
    toolkit = _toolkit()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "module.json").write_text(tvm.ir.save_json(module))
        config = {"target": json.loads(str(target)), "compiler": cross_compiler}
        (folder / "config.json").write_text(json.dumps(config))
        done = subprocess.run(
            [sys.executable, "-m", "t3c.codegen.cuda", name],
            env=_environment(folder, toolkit),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise LoweringError(
                f"the CUDA library for {target.arch} cannot be built: {done.stderr.strip()[-2000:]}"
            )
        content = (folder / "model.so").read_bytes()
        planned.update(json.loads((folder / "planned.json").read_text()))
    if FATBIN not in content:
        raise LoweringError(
            f"the CUDA library for {target.arch} holds no machine code (no fatbin); is this nvcc "
            "older than the GPU, or TVM_CUDA_COMPILE_MODE not 'nvcc'? Nothing was written."
        )
    return Linked(content)


def _toolkit() -> Path:
    """Root of the CUDA toolkit, as nvcc itself says."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise TargetError("nvcc is not on the PATH; install the CUDA toolkit (no GPU is needed)")
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True).stderr
    for line in told.splitlines():
        key, _, value = line.removeprefix("#$").strip().partition("=")
        if key == "TOP":
            return Path(value).resolve()
    raise TargetError(f"{nvcc} does not say where its toolkit lies; it said: {told[-400:]}")


def _environment(folder: Path, toolkit: Path) -> dict[str, str]:
    """Variables of the compiling process; makes the stub where there is no driver."""
    paths = [os.environ.get("LD_LIBRARY_PATH", "")]
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        paths.append(str(_stub(folder)))
    paths += [str(p) for p in (toolkit / "lib64", toolkit / "lib") if p.is_dir()]
    return os.environ | {
        "CUDA_PATH": str(toolkit),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths)),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TVM_CUDA_COMPILE_MODE": "nvcc",
        "TVM_CUDA_NVCC_NO_FAST_MATH": "1",  # quantization needs exact quotients
    }


def _stub(folder: Path) -> Path:
    """A folder with a driver library that can do nothing."""
    made = folder / "driver"
    made.mkdir()
    source = made / "stub.cc"
    source.write_text(_STUB)
    command = [str(tvm.support.cc.get_cc()), "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}"]
    done = subprocess.run(
        [*command, str(source), "-o", str(made / DRIVER)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise TargetError(f"no C++ compiler can make a stub of {DRIVER}: {done.stderr[-400:]}")
    return made


def _main(folder: Path) -> None:
    """The compiling process."""
    if tvm.get_global_func("device_api.cuda", allow_missing=True) is None:
        raise TargetError(
            f"TVM cannot load libtvm_runtime_cuda.so; LD_LIBRARY_PATH is "
            f"{os.environ['LD_LIBRARY_PATH']!r} and must lead to {DRIVER} and to libcudart.so of "
            "the CUDA version that TVM was built with (13)"
        )
    config = json.loads((folder / "config.json").read_text())
    target = tvm.target.Target(config["target"])
    module = tvm.ir.load_json((folder / "module.json").read_text())
    planned: dict[str, int] = {}
    with target:
        executable = relax.build(module, target=target, relax_pipeline=finish(planned, target))
    options: dict[str, Any] = {}
    if config["compiler"]:
        options["fcompile"] = tvm.support.cc.cross_compiler(config["compiler"])
    executable.export_library(str(folder / "model.so"), **options)
    (folder / "planned.json").write_text(json.dumps(planned))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
