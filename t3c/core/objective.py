"""What a chain of profiles is ordered by: the cost that every step down shall save."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import final


class Objective(StrEnum):
    """A cost of one call; every profile has all of them, one decides which steps are taken.

    Latency is what devices are short of, and the default. Multiply-adds and bytes are counted, so
    they hold on every machine. Energy is estimated from counted operations and bytes.
    """

    LATENCY = "latency"
    """Seconds: predicted, then measured where the library runs."""
    MACS = "macs"
    """Multiply-adds."""
    BYTES = "bytes"
    """Stored bytes of weights, scales and biases; linear layers take 4 bits."""
    ENERGY = "energy"
    """Joules, estimated."""

    @property
    def unit(self) -> str:
        """Of one cost, in words."""
        return _UNITS[self]

    @property
    def parts(self) -> tuple["Objective", ...]:
        """Itself; what a `Mix` has several of."""
        return (self,)


@final
@dataclass(frozen=True, slots=True)
class Mix:
    """Several objectives, each as a share of its cost in the dense network; their mean counts.

    Attributes:
        parts: Two or more, each once, in the order of `Objective`.
    """

    parts: tuple[Objective, ...]

    def __post_init__(self) -> None:
        """Refuse one objective alone, doubles and another order, so that equal mixes are equal."""
        if len(self.parts) < 2 or list(self.parts) != [o for o in Objective if o in self.parts]:
            raise ValueError(f"{self.parts} mixes nothing; name two or more objectives, each once")

    def __str__(self) -> str:
        """The spelled form: ``latency+bytes``."""
        return "+".join(self.parts)

    @property
    def unit(self) -> str:
        """Of one cost, in words."""
        return f"of the dense network's {self}"


Goal = Objective | Mix
"""What a chain is ordered by."""

_UNITS = {
    Objective.LATENCY: "s",
    Objective.MACS: "multiply-adds",
    Objective.BYTES: "bytes",
    Objective.ENERGY: "J estimated",
}


def parse_objective(text: str | Mix | Iterable[str]) -> Goal:
    """The objective of that name, or the mix of several: ``latency+bytes``, or a list of names.

    Raises:
        ValueError: There is none, or one is named twice; the message lists those there are.
    """
    if isinstance(text, Mix):
        return text
    names = text.split("+") if isinstance(text, str) else list(text)
    known = {str(o): o for o in Objective}
    found = [known[name] for name in names if name in known]
    if len(found) < max(1, len(names)) or len(set(found)) < len(found):
        listed = ", ".join(map(repr, known))
        shown = text if isinstance(text, str) else "+".join(names)
        raise ValueError(f"objective is {shown!r}; allowed are {listed}, and several joined by '+'")
    return found[0] if len(found) == 1 else Mix(tuple(o for o in Objective if o in found))
