"""4-bit weights on AVX-512 VNNI: nibbles are the unsigned operand of VPDPBUSD, codes the signed."""

from typing import ClassVar, final

from t3c.codegen.kernels.gemv_groups import AbstractGroupFamily, GroupDot
from t3c.codegen.kernels.linear_tiles import CodeLayout


@final
class VnniGroupDot(GroupDot):
    """Two instructions of 16 outputs x 4 inputs."""

    part: ClassVar[int] = 16
    panels: ClassVar[tuple[int, int, int]] = (4, 4, 2)
    height: ClassVar[int] = 6  # x 2 accumulators and 2 sums, 4 weights and 1 activation: 29 of 32
    most: ClassVar[int] = 16
    macs_us: ClassVar[float] = 2e5

    def add(self, acc: str, low: tuple[str, str], high: tuple[str, str]) -> str:
        """One instruction for each nibble."""
        name = '"int32x16", "llvm.x86.avx512.vpdpbusd.512"'
        for weights, codes in (low, high):
            acc = f"T.call_llvm_pure_intrin({name}, {acc}, {weights}, {codes})"
        return acc


@final
class VnniGroups(AbstractGroupFamily):
    """4-bit kernels over the codes of `VnniLinear`."""

    prefix: ClassVar[str] = "x86_vnni"
    rank_step: ClassVar[int] = 16
    dot: ClassVar[GroupDot] = VnniGroupDot()

    def layout(self, m: int) -> CodeLayout:
        """Row by row, sums behind the scales."""
        return CodeLayout(tiled=False, sums=True)
