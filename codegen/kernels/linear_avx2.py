"""Int8 linear layers on AVX2: blocks of 6 rows x 16 columns in registers.

VPMADDWD adds two products of 16-bit numbers and is exact, so activations are kept as int16 and
weights are widened as they are loaded. (VPMADDUBSW would take bytes, but saturates.)
"""

from typing import ClassVar, final

from t3c.codegen.kernels.family import AbstractGroupedKernels
from t3c.codegen.kernels.gemv_avx2 import Avx2Groups
from t3c.codegen.kernels.linear_row_family import AbstractRowFamily
from t3c.codegen.kernels.linear_rows import Dot, RowKernels
from t3c.codegen.kernels.linear_tiles import CodeLayout
from t3c.core.codes import I8


@final
class PairDot(Dot):
    """VPMADDWD on 256 bits: 8 outputs x 2 inputs."""

    layout: ClassVar[CodeLayout] = CodeLayout(tiled=False, sums=False, dtype="int16")
    depth: ClassVar[int] = 2
    height: ClassVar[int] = 6  # x 2 accumulators, 2 weights and 1 activation: 15 of 16 registers
    wide: ClassVar[int] = 1
    alone: ClassVar[int] = 4
    part: ClassVar[int] = 8
    registers: ClassVar[int] = 16
    macs_us: ClassVar[float] = 5e4
    quantized_us: ClassVar[float] = 4e3

    def weight(self, line: str) -> str:
        """Sixteen bytes widened."""
        return f'T.cast({line}, "int16x16")'

    def inputs(self, codes: str) -> str:
        """Two codes, 8 times."""
        word = f'T.broadcast(T.reinterpret({codes}, dtype="int32"), 8)'
        return f'T.reinterpret({word}, dtype="int16x16")'

    def add(self, acc: str, weight: str, inputs: str) -> str:
        """One instruction and an addition."""
        name = '"int32x8", "llvm.x86.avx2.pmadd.wd"'
        return f"{acc} + T.call_llvm_pure_intrin({name}, {weight}, {inputs})"


@final
class Avx2Linear(AbstractRowFamily):
    """AVX2 int8 linear kernels; weights [n/16][k/64][32][32], activations int16."""

    name: ClassVar[str] = "x86-avx2"
    rank_step: ClassVar[int] = 16
    grouped: ClassVar[AbstractGroupedKernels | None] = Avx2Groups()
    _rows: ClassVar[RowKernels] = RowKernels("x86_avx2", PairDot())

    @property
    def rows(self) -> RowKernels:
        """The kernels."""
        return self._rows

    def stored(self, packed: I8) -> I8:
        """As packed."""
        return packed
