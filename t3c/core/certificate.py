"""What is known of the output drift of a profile: four labelled numbers that are never merged."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Observed:
    """Drift ||dz||_2 measured on held-out inputs against the original model, in float32 logits.

    Attributes:
        mean: Mean over the inputs.
        median: Median.
        p95: 95th percentile.
        max: Largest seen.
        relative: Mean drift over the mean norm of the original outputs.
        flips: Share of inputs whose arg-max changes; None where outputs are not class scores.
        inputs: How many inputs.
    """

    mean: float
    median: float
    p95: float
    max: float
    relative: float
    flips: float | None
    inputs: int


@dataclass(frozen=True, slots=True)
class Bound:
    """A split-conformal bound on the drift ||dz||_2 of one input.

    Attributes:
        level: Share of new inputs that it holds for: marginal, exchangeable data.
        value: The bound, never below that of a larger profile; infinite with too few inputs.
        raw: Before it was raised to those of larger profiles.
        teacher: Raw bound on the drift against the largest profile instead of the original.
        coverage: Share of each third of the inputs that the bound from the other two covers.
    """

    level: float
    value: float
    raw: float
    teacher: float
    coverage: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What held-out inputs say of the drift of one profile's library.

    Attributes:
        bounds: One for each level, rising.
        inputs: How many inputs.
        sha256: Hash of the inputs.
    """

    bounds: tuple[Bound, ...]
    inputs: int
    sha256: str

    def at(self, level: float) -> Bound | None:
        """The bound of a level, if it was asked for."""
        return next((b for b in self.bounds if b.level == level), None)


@dataclass(frozen=True, slots=True)
class Certificate:
    """Four statements on the drift of one profile; None where not computed.

    Attributes:
        proxy: Sum of gain x residual norm x activation norm (no guarantee).
        sound: A true bound over a stated domain (may be vacuous).
        calibrated: Split-conformal bounds (marginal coverage, exchangeable data).
        observed: Measured on held-out data.
    """

    proxy: float | None = None
    sound: float | None = None
    calibrated: Calibrated | None = None
    observed: Observed | None = None
