"""This machine: CPU features, architecture of a library, permission to use matrix tiles."""

import ctypes
import platform
import sys
from functools import cache
from pathlib import Path

from t3c.core.errors import ArtifactError, TargetError
from t3c.core.manifest import TargetInfo
from t3c.targets import cpu_features

_MACHINES = {3: "x86", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}  # ELF e_machine
_ALIASES = {"amd64": "x86_64", "arm64": "aarch64", "i386": "x86", "i686": "x86", "armv7l": "arm"}
_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


def machine() -> str:
    """Architecture of this process, spelled as in an LLVM triple."""
    name = platform.machine().lower()
    return _ALIASES.get(name, name)


def library_machine(library: Path) -> str:
    """Architecture of a shared library, from its ELF header.

    Raises:
        ArtifactError: The file is no ELF library.
    """
    with library.open("rb") as stream:
        head = stream.read(20)
    if head[:4] != b"\x7fELF" or len(head) < 20:
        raise ArtifactError(f"{library}: is no ELF shared library")
    code = int.from_bytes(head[18:20], "little")
    return _MACHINES.get(code, f"ELF machine {code}")


def check(target: TargetInfo, library: Path) -> None:
    """Refuse a library that this machine cannot run.

    Raises:
        TargetError: Another architecture, or CPU features that are missing here.
    """
    built = library_machine(library)
    if built != machine():
        raise TargetError(
            f"{library.name} was built for {target.triple or built} (target {target.name!r}); this "
            f"machine is {machine()}; lower the model for this machine or copy it to that device"
        )
    missing = sorted(set(target.features) - cpu_features())
    if missing:
        raise TargetError(
            f"{library.name} needs CPU features that this machine lacks: {', '.join(missing)}; "
            "lower the model again for a target without them (t3c doctor lists what runs here)"
        )
    if any(feature.startswith("amx") for feature in target.features):
        allow_tiles()


@cache
def allow_tiles() -> None:
    """Ask Linux for the AMX tile registers, once per process; without it the first use is SIGILL.

    Raises:
        TargetError: The kernel refuses.
    """
    if sys.platform != "linux":
        raise TargetError("AMX libraries run on Linux only")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) != 0:
        raise TargetError(
            f"Linux refuses the AMX tile registers (errno {ctypes.get_errno()}); "
            "lower the model for a target without AMX"
        )
