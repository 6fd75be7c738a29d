"""Every error T3C raises on purpose; each message names the value, what is allowed, what to do."""

from collections.abc import Mapping


class T3CError(Exception):
    """Base of all T3C errors."""


class PassError(T3CError):
    """A graph pass failed, or broke its contract; carries the name of the pass."""


class LoweringError(T3CError):
    """A graph could not be lowered to a library for the target."""


class ParityError(LoweringError):
    """The lowered library does not compute what its torch reference computes."""


class CertificateError(T3CError):
    """A certificate could not be computed, or was asked for what it cannot state."""


class CostModelError(T3CError):
    """Measurements or a cost model are damaged, stale, or of another device."""


class ArtifactError(T3CError):
    """An artifact folder is missing, damaged, too new, or built for another machine."""


class TargetError(T3CError):
    """A target is unknown, or this machine lacks what it needs."""


class InfeasibleBudget(T3CError):
    """No profile satisfies the budget.

    Attributes:
        failing: Names of the budget components that no single profile could meet.
        minimum: The smallest feasible budget: component name -> value in the unit of the name.
    """

    def __init__(
        self, message: str, failing: tuple[str, ...], minimum: Mapping[str, float]
    ) -> None:
        """Keep the failing components and the smallest feasible budget beside the message."""
        super().__init__(message)
        self.failing = failing
        self.minimum = dict(minimum)
