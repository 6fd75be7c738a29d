"""What a library for checking holds beside the profiles, and how a host reads it.

Such a library is linked from the same kernels as the one that ships, for `lower` and for
measurements; no artifact contains it.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Tap:
    """One value inside a call.

    Attributes:
        site: The elastic layer that it enters.
        shape: Its shape.
        dtype: Numpy name of its data type.
        offset: First byte in the arena.
    """

    site: str
    shape: tuple[int, ...]
    dtype: str
    offset: int


@dataclass(frozen=True, slots=True)
class Probe:
    """A function that does what its profile does and leaves what enters each layer in the arena.

    Attributes:
        function: Its name; it takes what the profile's function takes.
        arena_bytes: Size of the arena, larger than that of the profile.
        taps: The values, in the order of the layers' calls.
    """

    function: str
    arena_bytes: int
    taps: tuple[Tap, ...]

    def read(self, arena: NDArray[np.uint8]) -> list[NDArray[Any]]:
        """The values that a call left in its arena, copied."""
        found = []
        for tap in self.taps:
            size = prod(tap.shape) * np.dtype(tap.dtype).itemsize
            flat = arena[tap.offset : tap.offset + size].view(tap.dtype)
            found.append(flat.reshape(tap.shape).copy())
        return found


@dataclass(frozen=True, slots=True)
class Trace:
    """A function that also notes the cycle counter before the first kernel and after each.

    Attributes:
        function: Its name; it takes an array of int64 behind the profile's arguments.
        kernels: Names, in the order of the calls.
        sites: The elastic layer that each call belongs to; None: no layer.
    """

    function: str
    kernels: tuple[str, ...]
    sites: tuple[str | None, ...]
