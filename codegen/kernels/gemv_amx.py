"""4-bit weights beside AMX: rows of codes times nibbles on AVX-512 VNNI.

Codes come in tiles where there is more than one row, and are copied row by row first; tiles of
unpacked weights would need a float32 sum of every tile at each group.
"""

from typing import ClassVar, final

from t3c.codegen.kernels.gemv_groups import AbstractGroupFamily, GroupDot
from t3c.codegen.kernels.gemv_vnni import VnniGroupDot
from t3c.codegen.kernels.linear_tiles import CodeLayout


@final
class AmxGroups(AbstractGroupFamily):
    """4-bit kernels over the codes of `AmxLinear`."""

    prefix: ClassVar[str] = "x86_amx"
    rank_step: ClassVar[int] = 32
    dot: ClassVar[GroupDot] = VnniGroupDot()

    def layout(self, m: int) -> CodeLayout:
        """Tiles; one row lies as VNNI reads it."""
        return CodeLayout(tiled=m > 1, sums=m == 1)
