"""4-bit weights on the Arm dot product: nibbles are small signed bytes to SDOT."""

from collections.abc import Sequence
from typing import ClassVar, final

from t3c.codegen.kernels.emit import Emitter
from t3c.codegen.kernels.gemv_groups import COARSE_EXCESS, ROWS, AbstractGroupFamily, GroupDot
from t3c.codegen.kernels.linear_tiles import CodeLayout
from t3c.core.codes import RATIO


@final
class SdotGroupDot(GroupDot):
    """Two instructions of 4 outputs x 4 inputs."""

    part: ClassVar[int] = 4
    panels: ClassVar[tuple[int, int, int]] = (4, 1, 1)
    height: ClassVar[int] = 4  # x 4 accumulators, 8 weights, 2 activations and a mask: 27 of 32
    most: ClassVar[int] = 16
    macs_us: ClassVar[float] = 3e4  # not measured
    excess: ClassVar[int] = COARSE_EXCESS

    def add(self, acc: str, low: tuple[str, str], high: tuple[str, str]) -> str:
        """One instruction for each nibble."""
        name = '"int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8"'
        for weights, codes in (low, high):
            acc = f"T.call_llvm_pure_intrin({name}, {acc}, {weights}, {codes})"
        return acc

    def operands(self, e: Emitter, lines: Sequence[str]) -> tuple[str, ...]:
        """Bytes of both planes less the coarse excess: signed, as SDOT takes them."""
        found = super().operands(e, lines)
        if len(lines) == 1:
            return found
        less = f"T.broadcast(T.int8({COARSE_EXCESS * RATIO}), {4 * self.part})"
        return tuple(e.let("byte", f"{x} - {less}") for x in found)


@final
class SdotGroups(AbstractGroupFamily):
    """4-bit kernels over the codes of `SdotLinear`."""

    prefix: ClassVar[str] = "arm_sdot"
    rank_step: ClassVar[int] = 16
    dot: ClassVar[GroupDot] = SdotGroupDot()

    def layout(self, m: int) -> CodeLayout:
        """Row by row."""
        return ROWS
