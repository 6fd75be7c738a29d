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
class Certificate:
    """Four statements on the drift of one profile; None where not computed.

    Attributes:
        proxy: Sum of gain x residual norm x activation norm (no guarantee).
        sound: A true bound over a stated domain (may be vacuous).
        calibrated: Split-conformal quantile (marginal coverage, exchangeable data).
        observed: Measured on held-out data.
    """

    proxy: float | None = None
    sound: float | None = None
    calibrated: float | None = None
    observed: Observed | None = None
