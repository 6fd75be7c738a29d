"""Kernel families by name; a target names the ones that it uses."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

from t3c.codegen.kernels.family import AbstractConvKernels, AbstractLinearKernels
from t3c.codegen.kernels.schedule import Schedule, Scheduled
from t3c.codegen.tune.machine import this_machine
from t3c.codegen.tune.records import read, shipped
from t3c.codegen.weights import Families
from t3c.core.errors import TargetError
from t3c.core.registry import resolve
from t3c.targets.base import TargetSpec

LINEAR = {
    "x86-amx": "t3c.codegen.kernels.linear_amx:AmxLinear",
    "x86-vnni": "t3c.codegen.kernels.linear_vnni:VnniLinear",
    "x86-avx-vnni": "t3c.codegen.kernels.linear_avx_vnni:AvxVnniLinear",
    "x86-avx2": "t3c.codegen.kernels.linear_avx2:Avx2Linear",
    "arm-sdot": "t3c.codegen.kernels.linear_sdot:SdotLinear",
    "portable": "t3c.codegen.kernels.linear_portable:PortableLinear",
    "generic": "t3c.codegen.generic:GenericLinear",
}
CONV = {
    "x86-amx": "t3c.codegen.kernels.conv_amx:AmxConv",
    "x86-vnni": "t3c.codegen.kernels.conv_vnni:VnniConv",
    "x86-avx-vnni": "t3c.codegen.kernels.conv_vnni:AvxVnniConv",
    "x86-avx2": "t3c.codegen.kernels.conv_avx2:Avx2Conv",
    "portable": "t3c.codegen.kernels.conv_portable:PortableConv",
    "generic": "t3c.codegen.generic:GenericConv",
}

KNOWN = frozenset(LINEAR) | frozenset(CONV)
F = TypeVar("F")


def families_of(spec: TargetSpec, tuned: Mapping[str, Schedule] | None = None) -> Families:
    """The kernel families that a target names, with the schedules that were tuned for it.

    Args:
        spec: The target.
        tuned: Key of an operator -> schedule; they go before the records of the package, which
            hold where this machine is of the class that they were measured on.

    Raises:
        TargetError: The target names a family that does not exist.
    """
    plain = _plain(spec)
    machine = this_machine()
    records: dict[str, Schedule] = {}
    if spec.triple is None:
        for family in scheduled(plain):
            path = shipped(family.name)
            if path.exists():
                records |= read(path, scheduled(plain), machine, KNOWN).schedules
    records |= tuned or {}
    return Families(
        _with(plain.linear, records),
        _with(plain.conv, records),
        plain.lanes,
    )


def tuned_schedules(spec: TargetSpec, path: Path) -> tuple[dict[str, Schedule], tuple[str, ...]]:
    """(schedules for `families_of`, what was skipped and why) of a file of records.

    Raises:
        LoweringError: There is no such file.
        TargetError: The target names a family that does not exist.
    """
    found = read(path, scheduled(_plain(spec)), this_machine(), KNOWN)
    return found.schedules, found.skipped


def scheduled(families: Families) -> tuple[Scheduled, ...]:
    """The families that have schedules."""
    return tuple(f for f in (families.linear, families.conv) if isinstance(f, Scheduled))


def _with(family: F, records: Mapping[str, Schedule]) -> F:
    return family.with_records(records) if isinstance(family, Scheduled) else family


def _plain(spec: TargetSpec) -> Families:
    """The families, which follow their rules."""
    if (spec.linear == "generic") != (spec.conv == "generic"):
        raise TargetError(
            f"target {spec.name!r}: linear is {spec.linear!r} and conv is {spec.conv!r}; 'generic' "
            "goes with 'generic' only"
        )
    linear = cast(
        type[AbstractLinearKernels],
        resolve(LINEAR, spec.linear, "linear kernel family", TargetError),
    )
    conv = cast(
        type[AbstractConvKernels],
        resolve(CONV, spec.conv, "convolution kernel family", TargetError),
    )
    return Families(linear(), conv(), spec.vector)
