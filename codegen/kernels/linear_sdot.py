"""Int8 linear layers on the Arm dot product (SDOT): blocks of 6 rows x 16 columns in registers."""

from typing import ClassVar, final

from t3c.codegen.kernels.family import AbstractGroupedKernels
from t3c.codegen.kernels.gemv_sdot import SdotGroups
from t3c.codegen.kernels.linear_row_family import AbstractRowFamily
from t3c.codegen.kernels.linear_rows import Dot, RowKernels
from t3c.codegen.kernels.linear_tiles import CodeLayout
from t3c.core.codes import I8


@final
class SdotDot(Dot):
    """SDOT on 128 bits: 4 outputs x 4 inputs."""

    layout: ClassVar[CodeLayout] = CodeLayout(tiled=False, sums=False)
    depth: ClassVar[int] = 4
    height: ClassVar[int] = 6  # x 4 accumulators, 4 weights and 1 activation: 29 of 32 registers
    wide: ClassVar[int] = 1
    alone: ClassVar[int] = 4
    part: ClassVar[int] = 4
    macs_us: ClassVar[float] = 3e4  # not measured
    quantized_us: ClassVar[float] = 1e3  # not measured

    def weight(self, line: str) -> str:
        """Sixteen signed bytes."""
        return line

    def inputs(self, codes: str) -> str:
        """Four codes, 4 times."""
        word = f'T.broadcast(T.reinterpret({codes}, dtype="int32"), 4)'
        return f'T.reinterpret({word}, dtype="int8x16")'

    def add(self, acc: str, weight: str, inputs: str) -> str:
        """One instruction."""
        name = '"int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8"'
        return f"T.call_llvm_pure_intrin({name}, {acc}, {weight}, {inputs})"


@final
class SdotLinear(AbstractRowFamily):
    """SDOT int8 linear kernels; weights [n/16][k/64][16][64]."""

    name: ClassVar[str] = "arm-sdot"
    rank_step: ClassVar[int] = 16
    grouped: ClassVar[AbstractGroupedKernels | None] = SdotGroups()
    _rows: ClassVar[RowKernels] = RowKernels("arm_sdot", SdotDot())

    @property
    def rows(self) -> RowKernels:
        """The kernels."""
        return self._rows

    def stored(self, packed: I8) -> I8:
        """As packed."""
        return packed
