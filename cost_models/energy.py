"""Energy of one call, estimated: counted operations and bytes times the cost of each.

The constants are those of one process and one kind of chip, without what a processor spends on
instructions, and without its idle power. Ratios of profiles mean more than joules do.
Source: Horowitz, Computing's energy problem (ISSCC 2014), figure 1.1.9, 45 nm, .9 V.
"""

from dataclasses import dataclass
from typing import final

from t3c.cost_models.base import Work


@final
@dataclass(frozen=True, slots=True)
class EnergyModel:
    """Joules of one operation each.

    Attributes:
        int8_mac_j: Multiply of 8 bits (.2 pJ) and addition of 32 bits (.1 pJ).
        f32_mac_j: Multiply (3.7 pJ) and addition (.9 pJ) of float32.
        weight_byte_j: A byte from memory outside the chip: 1.3 nJ for 64 bits, its lower end;
            every weight is read once in a call.
        moved_byte_j: A byte from the last cache: 100 pJ for 64 bits out of 1 MB.
    """

    int8_mac_j: float = 0.3e-12
    f32_mac_j: float = 4.6e-12
    weight_byte_j: float = 1.3e-9 / 8
    moved_byte_j: float = 100e-12 / 8

    def site(self, macs: int, weight_bytes: int) -> float:
        """Joules of an elastic layer.

        Args:
            macs: Its multiply-adds, on integers; 4-bit codes are widened to 8 bits first.
            weight_bytes: Codes, scales and bias.
        """
        return macs * self.int8_mac_j + weight_bytes * self.weight_byte_j

    def rest(self, work: Work, parameter_bytes: int) -> float:
        """Joules of everything else, which is float32.

        Args:
            work: Its operations.
            parameter_bytes: Of its parameters, which do not count as moved: nearly all of them are
                lookup tables, of which a call reads a few rows.
        """
        moved = max(0, work.bytes_moved - parameter_bytes)
        return work.f32_macs * self.f32_mac_j + moved * self.moved_byte_j
