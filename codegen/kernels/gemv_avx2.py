"""4-bit weights on AVX2: VPMADDUBSW takes nibbles by codes and cannot saturate (4 x 15 x 127)."""

from typing import ClassVar, final

from t3c.codegen.kernels.gemv_groups import AbstractGroupFamily, GroupDot
from t3c.codegen.kernels.linear_tiles import CodeLayout


@final
class Avx2GroupDot(GroupDot):
    """8 outputs x 8 inputs: pairs of products in 16 bits, then fours in 32."""

    part: ClassVar[int] = 8
    panels: ClassVar[tuple[int, int, int]] = (4, 2, 1)
    height: ClassVar[int] = 4  # x 2 accumulators, 4 weights, 2 activations and a mask: 15 of 16
    most: ClassVar[int] = 8
    macs_us: ClassVar[float] = 8e4

    def add(self, acc: str, low: tuple[str, str], high: tuple[str, str]) -> str:
        """Two products of bytes, one of pairs with ones."""
        pair = '"int16x16", "llvm.x86.avx2.pmadd.ub.sw"'
        sums = (f"T.call_llvm_pure_intrin({pair}, {w}, {x})" for w, x in (low, high))
        name = '"int32x8", "llvm.x86.avx2.pmadd.wd"'
        ones = "T.broadcast(T.int16(1), 16)"
        return f"{acc} + T.call_llvm_pure_intrin({name}, {' + '.join(sums)}, {ones})"


@final
class Avx2Groups(AbstractGroupFamily):
    """4-bit kernels over the codes of `Avx2Linear`."""

    prefix: ClassVar[str] = "x86_avx2"
    rank_step: ClassVar[int] = 16
    dot: ClassVar[GroupDot] = Avx2GroupDot()

    def layout(self, m: int) -> CodeLayout:
        """Row by row, 16 bits; the kernels make bytes of them."""
        return CodeLayout(tiled=False, sums=False, dtype="int16")
