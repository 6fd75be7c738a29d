"""How a layer is stored and computed in one profile: dense, low rank, Tucker-2 or CP, and its bits.

Formats of one site are partially ordered by (rank, bits); `Dense` is full rank. A chain of profiles
is nested when every site's format never falls in that order.
"""

import math
import re
from dataclasses import dataclass

from t3c.core.errors import T3CError

BITS = (4, 8, 32)


def _check(bits: int, **ranks: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; allowed are 4, 8 and 32 (float)")
    for name, rank in ranks.items():
        if rank < 1:
            raise ValueError(f"{name} is {rank}; a rank is at least 1")


def _kind(bits: int) -> str:
    return "float32" if bits == 32 else f"int{bits}"


@dataclass(frozen=True, slots=True)
class Dense:
    """The whole weight. `bits=32` is the float original."""

    bits: int = 8

    def __post_init__(self) -> None:
        """Refuse unknown widths."""
        _check(self.bits)

    @property
    def ranks(self) -> tuple[float, ...]:
        """Full rank, whatever the shape."""
        return (math.inf, math.inf)

    def __str__(self) -> str:
        """The spelled form, as manifests store it."""
        return f"dense-{_kind(self.bits)}"


@dataclass(frozen=True, slots=True)
class LowRank:
    """W ~ U[:, :rank] V[:rank, :], a linear layer or a 1x1 convolution as two thin products."""

    rank: int
    bits: int = 8

    def __post_init__(self) -> None:
        """Refuse unknown widths and ranks below 1."""
        _check(self.bits, rank=self.rank)

    @property
    def ranks(self) -> tuple[float, ...]:
        """The one rank, twice, so that formats of a site compare component by component."""
        return (self.rank, self.rank)

    def __str__(self) -> str:
        """The spelled form, as manifests store it."""
        return f"lowrank-r{self.rank}-{_kind(self.bits)}"


@dataclass(frozen=True, slots=True)
class Tucker2:
    """Convolution as 1x1 (to rank_in), core k x k (to rank_out), 1x1 (to the outputs)."""

    rank_in: int
    rank_out: int
    bits: int = 8

    def __post_init__(self) -> None:
        """Refuse unknown widths and ranks below 1."""
        _check(self.bits, rank_in=self.rank_in, rank_out=self.rank_out)

    @property
    def ranks(self) -> tuple[float, ...]:
        """(rank_in, rank_out)."""
        return (self.rank_in, self.rank_out)

    def __str__(self) -> str:
        """The spelled form, as manifests store it."""
        return f"tucker2-r{self.rank_in}x{self.rank_out}-{_kind(self.bits)}"


@dataclass(frozen=True, slots=True)
class CP:
    """Convolution as 1x1, depthwise k x 1, depthwise 1 x k, 1x1, all of one rank."""

    rank: int
    bits: int = 8

    def __post_init__(self) -> None:
        """Refuse unknown widths and ranks below 1."""
        _check(self.bits, rank=self.rank)

    @property
    def ranks(self) -> tuple[float, ...]:
        """The one rank, twice."""
        return (self.rank, self.rank)

    def __str__(self) -> str:
        """The spelled form, as manifests store it."""
        return f"cp-r{self.rank}-{_kind(self.bits)}"


Format = Dense | LowRank | Tucker2 | CP

_SPELLED = re.compile(
    r"(?P<kind>dense|lowrank|tucker2|cp)(-r(?P<a>\d+)(x(?P<b>\d+))?)?-(?P<bits>int4|int8|float32)"
)


def parse_format(text: str) -> Format:
    """Read the spelled form back; the inverse of `str(format)`.

    Raises:
        T3CError: `text` spells no format.
    """
    found = _SPELLED.fullmatch(text)
    if found is not None:
        bits = {"int4": 4, "int8": 8, "float32": 32}[found["bits"]]
        match (found["kind"], found["a"], found["b"]):
            case ("dense", None, None):
                return Dense(bits)
            case ("lowrank", str(a), None):
                return LowRank(int(a), bits)
            case ("tucker2", str(a), str(b)):
                return Tucker2(int(a), int(b), bits)
            case ("cp", str(a), None):
                return CP(int(a), bits)
            case _:
                pass
    raise T3CError(
        f"{text!r} spells no format; write for example 'dense-int8', 'lowrank-r64-int8', "
        "'tucker2-r32x64-int8' or 'cp-r16-int8'"
    )


def at_most(small: Format, large: Format) -> bool:
    """Whether `small` lies at or below `large` in the order of (ranks, bits)."""
    return small.bits <= large.bits and all(
        a <= b for a, b in zip(small.ranks, large.ranks, strict=True)
    )
