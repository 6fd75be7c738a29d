"""What a chain of profiles is ordered by: the cost that every step down shall save."""

from enum import StrEnum


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


_UNITS = {
    Objective.LATENCY: "s",
    Objective.MACS: "multiply-adds",
    Objective.BYTES: "bytes",
    Objective.ENERGY: "J estimated",
}


def parse_objective(text: str) -> Objective:
    """The objective of that name.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    try:
        return Objective(text)
    except ValueError:
        known = ", ".join(map(repr, map(str, Objective)))
        raise ValueError(f"objective is {text!r}; allowed are {known}") from None
