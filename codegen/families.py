"""Kernel families by name; a target names the ones that it uses."""

from typing import cast

from t3c.codegen.kernels.family import AbstractConvKernels, AbstractLinearKernels
from t3c.codegen.weights import Families
from t3c.core.errors import TargetError
from t3c.core.registry import resolve
from t3c.targets.base import TargetSpec

LINEAR = {
    "x86-amx": "t3c.codegen.kernels.linear_amx:AmxLinear",
    "x86-vnni": "t3c.codegen.kernels.linear_vnni:VnniLinear",
    "x86-avx2": "t3c.codegen.kernels.linear_avx2:Avx2Linear",
    "arm-sdot": "t3c.codegen.kernels.linear_sdot:SdotLinear",
    "portable": "t3c.codegen.kernels.linear_portable:PortableLinear",
    "generic": "t3c.codegen.generic:GenericLinear",
}
CONV = {
    "x86-amx": "t3c.codegen.kernels.conv_amx:AmxConv",
    "x86-vnni": "t3c.codegen.kernels.conv_vnni:VnniConv",
    "portable": "t3c.codegen.kernels.conv_portable:PortableConv",
    "generic": "t3c.codegen.generic:GenericConv",
}


def families_of(spec: TargetSpec) -> Families:
    """The kernel families that a target names.

    Raises:
        TargetError: The target names a family that does not exist.
    """
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
