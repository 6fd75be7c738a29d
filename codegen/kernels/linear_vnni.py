"""Int8 linear layers on AVX-512 VNNI: blocks of 6 rows x 64 columns in registers.

The instruction multiplies unsigned by signed bytes, so weights are stored plus 128 (the codes
with their sign bit flipped) and every product exceeds the true one by 128 * sum(codes of the row).
The quantization pass writes that excess, negative, behind the scales; accumulators start there.
"""

from typing import ClassVar, final

import numpy as np

from t3c.codegen.kernels.family import AbstractGroupedKernels
from t3c.codegen.kernels.gemv_vnni import VnniGroups
from t3c.codegen.kernels.linear_row_family import AbstractRowFamily
from t3c.codegen.kernels.linear_rows import Dot, RowKernels
from t3c.codegen.kernels.linear_tiles import DEPTH, CodeLayout
from t3c.core.codes import I8


@final
class VnniDot(Dot):
    """VPDPBUSD on 512 bits: 16 outputs x 4 inputs."""

    layout: ClassVar[CodeLayout] = CodeLayout(tiled=False, sums=True)
    depth: ClassVar[int] = 4
    height: ClassVar[int] = 6  # x 4 accumulators, 4 weights and 1 activation: 29 of 32 registers
    wide: ClassVar[int] = 4
    alone: ClassVar[int] = 14
    part: ClassVar[int] = 16
    tables: ClassVar[bool] = True
    macs_us: ClassVar[float] = 3.5e5
    quantized_us: ClassVar[float] = 6e3

    def __init__(self, *, offset: bool) -> None:
        """Say whether the weights are stored plus 128; else the kernels add it."""
        self._offset = offset

    def weight(self, line: str) -> str:
        """Unsigned bytes."""
        return line if self._offset else f"{line} ^ T.broadcast(T.int8(-128), {DEPTH})"

    def inputs(self, codes: str) -> str:
        """Four codes, 16 times."""
        word = f'T.broadcast(T.reinterpret({codes}, dtype="int32"), 16)'
        return f'T.reinterpret({word}, dtype="int8x64")'

    def add(self, acc: str, weight: str, inputs: str) -> str:
        """One instruction."""
        name = '"int32x16", "llvm.x86.avx512.vpdpbusd.512"'
        return f"T.call_llvm_pure_intrin({name}, {acc}, {weight}, {inputs})"


@final
class VnniLinear(AbstractRowFamily):
    """AVX-512 VNNI int8 linear kernels; weights [n/16][k/64][16][64], plus 128."""

    name: ClassVar[str] = "x86-vnni"
    rank_step: ClassVar[int] = 16
    grouped: ClassVar[AbstractGroupedKernels | None] = VnniGroups()
    _rows: ClassVar[RowKernels] = RowKernels("x86_vnni", VnniDot(offset=True))

    @property
    def rows(self) -> RowKernels:
        """The kernels."""
        return self._rows

    def stored(self, packed: I8) -> I8:
        """Codes plus 128, kept as the bytes of int8."""
        return (packed.view(np.uint8) ^ np.uint8(128)).view(np.int8)
