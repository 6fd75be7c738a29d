"""4-bit weights on AVX-VNNI: the instruction of `gemv_vnni` at half the width."""

from typing import ClassVar, final

from t3c.codegen.kernels.gemv_groups import AbstractGroupFamily, GroupDot
from t3c.codegen.kernels.linear_tiles import CodeLayout


@final
class HalfVnniGroupDot(GroupDot):
    """Two instructions of 8 outputs x 4 inputs."""

    part: ClassVar[int] = 8
    panels: ClassVar[tuple[int, int, int]] = (4, 2, 1)
    height: ClassVar[int] = 4  # x 2 accumulators, 4 weights, 2 activations and a mask: 15 of 16
    most: ClassVar[int] = 8
    macs_us: ClassVar[float] = 1e5

    def add(self, acc: str, low: tuple[str, str], high: tuple[str, str]) -> str:
        """One instruction for each nibble."""
        name = '"int32x8", "llvm.x86.avx512.vpdpbusd.256"'
        for weights, codes in (low, high):
            acc = f"T.call_llvm_pure_intrin({name}, {acc}, {weights}, {codes})"
        return acc


@final
class AvxVnniGroups(AbstractGroupFamily):
    """4-bit kernels over the codes of `AvxVnniLinear`."""

    prefix: ClassVar[str] = "x86_avx_vnni"
    rank_step: ClassVar[int] = 16
    dot: ClassVar[GroupDot] = HalfVnniGroupDot()

    def layout(self, m: int) -> CodeLayout:
        """Row by row, sums behind the scales."""
        return CodeLayout(tiled=False, sums=True)
