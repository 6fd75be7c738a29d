"""Which device a measurement holds for."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from t3c import targets
from t3c.core.errors import CostModelError, TargetError
from t3c.targets import cpu_features
from t3c.targets.base import TargetSpec

FEATURES = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "amx_int8", "amx_tile", "asimddp", "i8mm", "sve",
)  # fmt: skip
"""Processor features that kernels may use, or that tell processors apart."""
PACKAGES = ("t3c", "apache-tvm")
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Device:
    """What must agree for two measurements to mean the same.

    Attributes:
        cpu: Processor: its name, family, model and stepping.
        features: Of `FEATURES`, those that it has.
        target: LLVM's name of the processor that kernels were built for, or the target's.
        threads: Threads of a call.
        versions: Package -> version of what made and ran the kernels.
    """

    cpu: str
    features: tuple[str, ...]
    target: str
    threads: int
    versions: Mapping[str, str]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            CostModelError: A field is missing or of another type.
        """
        try:
            return cls(
                str(data["cpu"]),
                tuple(map(str, data["features"])),
                str(data["target"]),
                int(data["threads"]),
                {str(k): str(v) for k, v in dict(data["versions"]).items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CostModelError(f"no description of a device: {error!r} in {data!r}") from error

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "features": list(self.features), "versions": dict(self.versions)}

    def differences(self, other: "Device") -> list[str]:
        """What differs, a text each: ``cpu 'a' here, 'b' there``; empty if nothing does."""
        mine, theirs = self.to_json(), other.to_json()
        return [f"{k} {mine[k]!r}, not {theirs[k]!r}" for k in mine if mine[k] != theirs[k]]


def this_device(spec: TargetSpec, threads: int = 1, cpuinfo: Path = _CPUINFO) -> Device:
    """The machine that runs this.

    Args:
        spec: Target that kernels are built for.
        threads: Threads of a call.
        cpuinfo: Description of the processors.
    """
    return Device(
        processor(cpuinfo),
        tuple(f for f in FEATURES if f in cpu_features(_text(cpuinfo))),
        spec.mcpu or spec.name,
        threads,
        {name: _version(name) for name in PACKAGES},
    )


def target_of(device: Device) -> TargetSpec:
    """The target that a device's kernels were built for.

    Raises:
        CostModelError: This version has no such target.
    """
    for name in targets.TARGETS:
        try:
            spec = targets.get(name)
        except TargetError:  # a level of a machine that this is not
            continue
        if device.target in (spec.mcpu, spec.name):
            return spec
    raise CostModelError(
        f"no target of this version builds for {device.target!r}; known are "
        f"{', '.join(targets.TARGETS)}"
    )


def processor(cpuinfo: Path = _CPUINFO) -> str:
    """Name, family, model and stepping of the first processor, as far as they are known."""
    words: dict[str, str] = {}
    for line in _text(cpuinfo).splitlines():
        key, _, value = line.partition(":")
        words.setdefault(key.strip(), value.strip())
    name = words.get("model name", platform.processor() or platform.machine())
    numbers = [words[k] for k in ("cpu family", "model", "stepping") if k in words]
    return f"{name} {'/'.join(numbers)}".strip()


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
