"""A library for another processor, run here under user-mode emulation: what `lower` proves it with.

Three things are needed beside the library: the emulator, the cross compiler (for run.cc, the C++
host that ships in every artifact) and TVM's runtime libraries for that processor.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t3c.core.artifact import Artifact
from t3c.core.errors import LoweringError, TargetError
from t3c.core.probe import Probe
from t3c.runtime.template_host import RUN_CC
from t3c.targets.base import TargetSpec

LIBRARIES = ("libtvm_runtime.so", "libtvm_ffi.so")
TIMEOUT_S = 600.0
"""Seconds that one emulated call may take."""


@dataclass(frozen=True, slots=True)
class Machine:
    """An emulated processor.

    Attributes:
        command: The emulator with its options; a program of that processor follows.
        host: The compiled run.cc.
    """

    command: tuple[str, ...]
    host: Path


def runtime_folder(triple: str) -> Path:
    """Where TVM's runtime libraries for a processor are looked for.

    ``T3C_AARCH64_RUNTIME`` (the processor's name in capitals) names another folder than
    ``~/.cache/t3c/aarch64``.
    """
    processor = triple.partition("-")[0]
    named = os.environ.get(f"T3C_{processor.upper()}_RUNTIME")
    return Path(named) if named else _cache() / processor


def missing_runtime(triple: str) -> str:
    """What to do about the first runtime library that is missing; empty if all are there."""
    folder, processor = runtime_folder(triple), triple.partition("-")[0]
    for name in LIBRARIES:
        if not (folder / name).is_file():
            make = f"run `make {processor}-runtime`, or " if processor == "aarch64" else ""
            return (
                f"{folder} has no {name}: {make}let T3C_{processor.upper()}_RUNTIME name a folder "
                f"with {' and '.join(LIBRARIES)} of apache-tvm and apache-tvm-ffi for {processor}"
            )
    return ""


def machine(spec: TargetSpec) -> Machine:
    """Make the emulated processor of a target ready; the host is compiled once and kept.

    Raises:
        TargetError: A tool is missing; the message says what to install.
    """
    if spec.emulator is None or spec.triple is None or spec.cross_compiler is None:
        raise TargetError(f"target {spec.name!r} names no emulator")
    emulator = shutil.which(spec.emulator) or shutil.which(spec.emulator.removesuffix("-static"))
    if emulator is None:
        raise TargetError(
            f"{spec.emulator} is not on the PATH; on Debian or Ubuntu: "
            "apt-get install qemu-user-static"
        )
    if missing := missing_runtime(spec.triple):
        raise TargetError(missing)
    libraries = runtime_folder(spec.triple)
    host = _host(spec.cross_compiler, libraries)
    known = _run([emulator, "-cpu", "help"]).stdout.split()
    model = ("-cpu", spec.mcpu) if spec.mcpu in known else ()
    found = f"LD_LIBRARY_PATH={libraries.resolve()}"
    return Machine((emulator, *model, "-L", f"/usr/{spec.triple}", "-E", found), host)


@dataclass(frozen=True, slots=True)
class Emulated:
    """An artifact on an emulated processor. Every call starts a new program: half a second.

    Attributes:
        artifact: A complete artifact folder.
        machine: The processor.
    """

    artifact: Artifact
    machine: Machine

    def probe(self, probe: Probe, profile: str, inputs: Sequence[Any]) -> list[NDArray[Any]]:
        """Outputs, then the input of every elastic layer; see `Session.probe`.

        Raises:
            LoweringError: The program fails; the message ends with what it said.
        """
        *outputs, arena = self.call(profile, inputs, (probe.function, str(probe.arena_bytes)))
        return [*outputs, *probe.read(arena)]

    def call(
        self, profile: str, inputs: Sequence[Any], function: tuple[str, ...] = ()
    ) -> list[NDArray[Any]]:
        """Outputs of one call, flat.

        Args:
            profile: Name of the profile.
            inputs: One array (of any library) for each input of the manifest, in order.
            function: Name of another function on the same inputs and weights, and the bytes of its
                arena, which is returned behind the outputs.

        Raises:
            LoweringError: The program fails; the message ends with what it said.
        """
        with tempfile.TemporaryDirectory() as folder:
            specs = self.artifact.manifest.inputs
            for i, (spec, value) in enumerate(zip(specs, inputs, strict=True)):
                array = np.ascontiguousarray(np.asarray(value), np.dtype(spec.dtype))
                if array.shape != spec.shape:
                    raise ValueError(f"input {spec.name!r} is {array.shape}, not {spec.shape}")
                array.tofile(Path(folder) / f"{i}.in")
            command = [*self.machine.command, str(self.machine.host)]
            command += [str(self.artifact.path.resolve()), profile, folder]
            done = _run([*command, *function], cwd=folder)
            if done.returncode != 0:
                said = done.stderr.strip() or "nothing"
                raise LoweringError(
                    f"{self.artifact.library.name}, profile {profile!r}: the emulated program "
                    f"ended with status {done.returncode}; it said: {said[-800:]}. An illegal "
                    "instruction means that the library was built for more than this processor has."
                )
            lines = [line.split()[1:] for line in done.stdout.splitlines() if "output " in line]
            return [
                np.fromfile(Path(folder) / f"{i}.out", np.dtype(dtype)).reshape(
                    [int(n) for n in shape]
                )
                for i, (dtype, *shape) in enumerate(lines)
            ]


def _host(compiler: str, libraries: Path) -> Path:
    """run.cc compiled for the processor of `compiler`, from the cache where it has been made."""
    package = find_spec("tvm_ffi")
    if package is None or package.origin is None:
        raise TargetError("the C++ host needs the headers of apache-tvm-ffi; pip install it")
    headers = Path(package.origin).parent / "include"
    key = hashlib.sha256("\0".join((RUN_CC, compiler, str(headers))).encode())
    for name in LIBRARIES:
        key.update((libraries / name).read_bytes())
    made = _cache() / "hosts" / f"run-{key.hexdigest()[:16]}"
    if made.is_file():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        source, program = Path(folder) / "run.cc", Path(folder) / "run"
        source.write_text(RUN_CC)
        command = [compiler, "-O1", "-std=c++17", str(source), "-o", str(program)]
        command += ["-I", str(headers), "-L", str(libraries), "-Wl,--no-as-needed"]
        done = _run([*command, "-ltvm_runtime", "-ltvm_ffi", "-Wl,--allow-shlib-undefined"])
        if done.returncode != 0:
            raise TargetError(f"{compiler} cannot compile the C++ host: {done.stderr[-800:]}")
        os.replace(program, made)
    return made


def _run(command: list[str], cwd: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=cwd, check=False
        )
    except FileNotFoundError:
        raise TargetError(
            f"{command[0]} is not on the PATH; on Debian or Ubuntu: apt-get install "
            f"{_package(command[0])}"
        ) from None
    except subprocess.TimeoutExpired as error:
        raise LoweringError(f"{command[0]} did not end within {TIMEOUT_S:g} s") from error


def _package(compiler: str) -> str:
    return f"g++-{compiler.removesuffix('-g++')}"


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "t3c"
