"""Int8 linear layers on AVX-VNNI: blocks of 6 rows x 16 columns in registers of 256 bits.

The instruction of `linear_vnni` at half the width, for processors without AVX-512; weights are
stored plus 128 as there.
"""

from typing import ClassVar, final

import numpy as np

from t3c.codegen.kernels.family import AbstractGroupedKernels
from t3c.codegen.kernels.gemv_avx_vnni import AvxVnniGroups
from t3c.codegen.kernels.linear_row_family import AbstractRowFamily
from t3c.codegen.kernels.linear_rows import Dot, RowKernels
from t3c.codegen.kernels.linear_tiles import CodeLayout
from t3c.core.codes import I8


@final
class HalfVnniDot(Dot):
    """VPDPBUSD on 256 bits: 8 outputs x 4 inputs."""

    layout: ClassVar[CodeLayout] = CodeLayout(tiled=False, sums=True)
    depth: ClassVar[int] = 4
    height: ClassVar[int] = 6  # x 2 accumulators, 2 weights and 1 activation: 15 of 16 registers
    wide: ClassVar[int] = 1
    alone: ClassVar[int] = 4
    part: ClassVar[int] = 8
    registers: ClassVar[int] = 16
    macs_us: ClassVar[float] = 1e5
    quantized_us: ClassVar[float] = 4e3

    def weight(self, line: str) -> str:
        """Unsigned bytes, as they are stored."""
        return line

    def inputs(self, codes: str) -> str:
        """Four codes, 8 times."""
        word = f'T.broadcast(T.reinterpret({codes}, dtype="int32"), 8)'
        return f'T.reinterpret({word}, dtype="int8x32")'

    def add(self, acc: str, weight: str, inputs: str) -> str:
        """One instruction."""
        name = '"int32x8", "llvm.x86.avx512.vpdpbusd.256"'
        return f"T.call_llvm_pure_intrin({name}, {acc}, {weight}, {inputs})"


@final
class AvxVnniLinear(AbstractRowFamily):
    """AVX-VNNI int8 linear kernels; weights [n/16][k/64][16][64], plus 128."""

    name: ClassVar[str] = "x86-avx-vnni"
    rank_step: ClassVar[int] = 16
    grouped: ClassVar[AbstractGroupedKernels | None] = AvxVnniGroups()
    _rows: ClassVar[RowKernels] = RowKernels("x86_avx_vnni", HalfVnniDot())

    @property
    def rows(self) -> RowKernels:
        """The kernels."""
        return self._rows

    def stored(self, packed: I8) -> I8:
        """Codes plus 128, kept as the bytes of int8."""
        return (packed.view(np.uint8) ^ np.uint8(128)).view(np.int8)
