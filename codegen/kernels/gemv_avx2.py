"""4-bit weights on AVX2: VPMADDUBSW takes nibbles by codes and cannot saturate (4 x 15 x 127)."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import ClassVar, final

from t3c.codegen.kernels.emit import Emitter
from t3c.codegen.kernels.gemv_groups import AbstractGroupFamily, GroupDot
from t3c.codegen.kernels.linear_tiles import CodeLayout
from t3c.core.codes import RATIO


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
        return f"{acc} + {self._fours(self._pairs((low, high)), 1)}"

    def operands(self, e: Emitter, lines: Sequence[str]) -> tuple[str, ...]:
        """Planes stay apart: pairs of products of their bytes would not fit 16 bits."""
        return tuple(chain(*(self.nibbles(e, line) for line in lines)))

    def total(self, acc: str, operands: tuple[str, ...], codes: tuple[str, str]) -> str:
        """One sum of fours for each plane, the coarse one times its ratio."""
        factors = (RATIO, 1) if len(operands) > 2 else (1,)
        parts = [
            self._fours(self._pairs(zip(operands[2 * i : 2 * i + 2], codes, strict=True)), factor)
            for i, factor in enumerate(factors)
        ]
        return " + ".join([acc, *parts])

    def _pairs(self, products: Iterable[tuple[str, str]]) -> str:
        name = '"int16x16", "llvm.x86.avx2.pmadd.ub.sw"'
        return " + ".join(f"T.call_llvm_pure_intrin({name}, {w}, {x})" for w, x in products)

    def _fours(self, pairs: str, factor: int) -> str:
        name = '"int32x8", "llvm.x86.avx2.pmadd.wd"'
        factors = f"T.broadcast(T.int16({factor}), 16)"
        return f"T.call_llvm_pure_intrin({name}, {pairs}, {factors})"


@final
class Avx2Groups(AbstractGroupFamily):
    """4-bit kernels over the codes of `Avx2Linear`."""

    prefix: ClassVar[str] = "x86_avx2"
    rank_step: ClassVar[int] = 16
    dot: ClassVar[GroupDot] = Avx2GroupDot()

    def layout(self, m: int) -> CodeLayout:
        """Row by row, 16 bits; the kernels make bytes of them."""
        return CodeLayout(tiled=False, sums=False, dtype="int16")
