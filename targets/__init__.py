"""Device families as data, and the registry that names them."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import cast

from t3c.core.errors import TargetError
from t3c.core.registry import resolve
from t3c.targets.base import Roofline, TargetSpec

__all__ = ["TARGETS", "Roofline", "TargetSpec", "best_level", "cpu_features", "detect_host", "get"]

TARGETS: Mapping[str, str] = {
    "x86": "t3c.targets.x86:LEVELS",
    "x86-amx": "t3c.targets.x86:AMX",
    "x86-vnni": "t3c.targets.x86:VNNI",
    "x86-avx-vnni": "t3c.targets.x86:AVX_VNNI",
    "x86-avx2": "t3c.targets.x86:AVX2",
    "x86-64": "t3c.targets.x86:BASELINE",
    "arm": "t3c.targets.arm:DOTPROD",
    "arm-neon": "t3c.targets.arm:NEON",
    "cuda": "t3c.targets.cuda:SM80",
    "cuda-sm90": "t3c.targets.cuda:SM90",
    "jetson": "t3c.targets.cuda:JETSON",
}
"""Name -> "module:ATTRIBUTE": a TargetSpec, or levels (best first): the machine takes one."""

_HOSTS = {
    "x86_64": "t3c.targets.x86:LEVELS",
    "amd64": "t3c.targets.x86:LEVELS",
    "aarch64": "t3c.targets.arm:LEVELS",
    "arm64": "t3c.targets.arm:LEVELS",
}
_ENTRY_POINTS = "t3c.targets"


def get(name: str) -> TargetSpec:
    """The target called `name`; third parties add theirs by the entry point ``t3c.targets``.

    Raises:
        TargetError: Unknown name (the message lists the known ones), or ``x86`` on a machine that
            is none.
    """
    found = entry_points(group=_ENTRY_POINTS) if name not in TARGETS else ()
    registry = {**{point.name: point.value for point in found}, **TARGETS}
    spec = resolve(registry, name, "target", TargetError)
    if isinstance(spec, TargetSpec):
        return spec
    levels = cast(Sequence[TargetSpec], spec)
    return replace(best_level(name, levels, cpu_features()), name=name)


def detect_host() -> TargetSpec:
    """The best CPU target of this machine, under the name of its level.

    Raises:
        TargetError: This machine is neither x86-64 nor 64-bit ARM.
    """
    machine = platform.machine().lower()
    levels = cast(Sequence[TargetSpec], resolve(_HOSTS, machine, "host architecture", TargetError))
    spec = best_level(machine, levels, cpu_features())
    # On its own machine a target needs neither a foreign triple nor a cross compiler.
    return replace(spec, triple=None, cross_compiler=None, emulator=None)


def best_level(name: str, levels: Sequence[TargetSpec], features: frozenset[str]) -> TargetSpec:
    """The first of `levels` whose features are all among `features`.

    Args:
        name: What was asked for, for the message.
        levels: Best first.
        features: What the processor has.

    Raises:
        TargetError: None fits; the message names a level to ask for instead.
    """
    for spec in levels:
        if spec.features <= features:
            return spec
    names = ", ".join(repr(spec.name) for spec in levels)
    raise TargetError(
        f"target {name!r} means this machine, but its processor has the features of none of its "
        f"levels; name the level of the device instead: {names}"
    )


def cpu_features(cpuinfo: str | None = None) -> frozenset[str]:
    """Feature names of the first processor, as /proc/cpuinfo spells them; empty where unknown.

    Args:
        cpuinfo: Text to read instead of this machine's /proc/cpuinfo.
    """
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.exists() else ""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
