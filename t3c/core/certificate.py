"""What is known of the output drift of a profile: labelled statements that are never merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from t3c.core.per_input import PerInput

PAPER = "operator-norm"
"""The proxy of the paper: sum over layers of L ||dW||_2 alpha."""
MEASURED = "measured"
"""The proxy from drifts that were measured with one layer changed at a time."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A proxy for the drift of one profile; no guarantee.

    Attributes:
        value: The estimate, never below that of a larger profile.
        raw: Before it was raised to those of larger profiles.
        teacher: Raw, against the largest profile instead of the original.
        rounding: What is added to `raw` by rounding activations.
    """

    value: float
    raw: float
    teacher: float
    rounding: float


@dataclass(frozen=True, slots=True)
class Share:
    """What one layer adds to the proxies of a profile, against the original.

    Attributes:
        gain: Jacobian norm L from the layer's output to the model's outputs.
        residual: Operator norm of the weight residual dW: rank and rounding together.
        alpha: RMS over inputs of the norm of the layer's input, in the profile.
        rounding: RMS over inputs of what rounding activations adds to the layer's output.
        estimates: Variant -> the layer's own estimate, rounding of activations included.
    """

    gain: float
    residual: float
    alpha: float
    rounding: float
    estimates: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Proxy:
    """What first-order estimates say of the drift of one profile.

    Attributes:
        estimates: Variant -> estimate; ``operator-norm`` is the paper's.
        shares: Site -> its part.
        spread: Largest over layers of (most - least) / mean of alpha over three draws of inputs.
        inputs: Inputs behind activation norms.
        gains_measured: Sites whose gain was iterated; the others' lie between their neighbours'.
        seconds: Time that the gains, shared by all profiles, and this profile's norms took.
    """

    estimates: Mapping[str, Estimate]
    shares: Mapping[str, Share]
    spread: float
    inputs: int
    gains_measured: int
    seconds: float

    @property
    def paper(self) -> Estimate:
        """The paper's form."""
        return self.estimates[PAPER]

    def ranked(self, variant: str) -> list[tuple[str, float]]:
        """Sites and their share of a variant's total, largest first.

        Shares of squares where the variant adds squares.

        Raises:
            KeyError: No such variant.
        """
        parts = {site: share.estimates[variant] for site, share in self.shares.items()}
        if variant in SQUARED:
            parts = {site: part**2 for site, part in parts.items()}
        total = sum(parts.values())
        found = [(site, part / total if total > 0 else 0.0) for site, part in parts.items()]
        return sorted(found, key=lambda item: -item[1])


SQUARED = frozenset({"jacobian-rms-rss", "kronecker-rss", MEASURED})
"""Variants that combine layers by the root of the sum of squares; the others add."""


@dataclass(frozen=True, slots=True)
class Drifts:
    """Drift ||dz||_2 measured against one reference, in float32 logits.

    Attributes:
        mean: Mean over the inputs.
        median: Median.
        p95: 95th percentile.
        max: Largest seen.
        relative: Mean drift over the mean norm of the reference's outputs.
        flips: Share of inputs whose arg-max differs; None where outputs are not class scores.
    """

    mean: float
    median: float
    p95: float
    max: float
    relative: float
    flips: float | None


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
        teacher: The same against the largest profile; None in artifacts that have only the above.
    """

    mean: float
    median: float
    p95: float
    max: float
    relative: float
    flips: float | None
    inputs: int
    teacher: Drifts | None = None


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
class Draw:
    """What one of several disjoint draws of the inputs says alone.

    Attributes:
        inputs: How many inputs.
        sha256: Hash of these inputs.
        bounds: Raw bound of each level from this draw.
        covered: Share of the other draws' inputs that each of these bounds covers.
        drift: Mean drift.
        agreement: Share of inputs with the original's arg-max; None where outputs are not class
            scores.
        accuracy: Share of inputs that are right; None without labels.
    """

    inputs: int
    sha256: str
    bounds: tuple[float, ...]
    covered: tuple[float, ...]
    drift: float
    agreement: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Shifted:
    """How the bounds fare on data that are drawn otherwise: measured, nothing is promised.

    Attributes:
        inputs: How many inputs.
        sha256: Hash of the inputs.
        coverage: Share of them that the bound of each level covers.
        drift: Mean drift.
    """

    inputs: int
    sha256: str
    coverage: tuple[float, ...]
    drift: float


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What held-out inputs say of the drift of one profile's library.

    Attributes:
        bounds: One for each level, rising.
        inputs: How many inputs.
        sha256: Hash of the inputs.
        draws: Disjoint draws of these inputs, each on its own.
        shifted: The bounds on other data, if such were given.
    """

    bounds: tuple[Bound, ...]
    inputs: int
    sha256: str
    draws: tuple[Draw, ...] = ()
    shifted: Shifted | None = None

    def at(self, level: float) -> Bound | None:
        """The bound of a level, if it was asked for."""
        return next((b for b in self.bounds if b.level == level), None)


@dataclass(frozen=True, slots=True)
class Margin:
    """The inputs whose top two scores, in the original, lie so far apart.

    Attributes:
        low: Smallest margin among them.
        high: Largest margin among them.
        inputs: How many inputs.
        flips: Share whose arg-max differs from the original's.
        confidence: Mean change of the largest softmax probability.
        ece: Change of the expected calibration error on them; None without labels.
    """

    low: float
    high: float
    inputs: int
    flips: float
    confidence: float
    ece: float | None


@dataclass(frozen=True, slots=True)
class Checked:
    """Inputs whose label a bound D fixes, because sqrt(2) D is below their top-two margin.

    Attributes:
        level: Level of the calibrated bound; None: the sound bound.
        certified: Share of inputs that the bound certifies; calibrated bounds come from the other
            draws, so that no input certifies itself.
        flips: Share of inputs that are certified and flip: at most 1 - level in the mean, 0 if
            sound and inside its domain.
    """

    level: float | None
    certified: float
    flips: float


@dataclass(frozen=True, slots=True)
class Labels:
    """What becomes of the labels of held-out inputs in one profile's library.

    Attributes:
        inputs: How many inputs.
        flips: Share whose arg-max differs from the original's.
        teacher: Share whose arg-max differs from the largest profile's.
        confidence: Mean change of the largest softmax probability.
        accuracy: Share that is right; None without labels.
        original_accuracy: The same of the original.
        ece: Expected calibration error, 15 bins; None without labels.
        original_ece: The same of the original.
        margins: By the original's top-two margin, rising.
        checked: One for each level, and one for a sound bound if there is one.
    """

    inputs: int
    flips: float
    teacher: float
    confidence: float
    accuracy: float | None
    original_accuracy: float | None
    ece: float | None
    original_ece: float | None
    margins: tuple[Margin, ...]
    checked: tuple[Checked, ...]


SoundStatus = Literal["bound", "vacuous", "unavailable"]


@dataclass(frozen=True, slots=True)
class Sound:
    """A proven upper bound on the drift ||dz||_2 of every input of a stated domain.

    Attributes:
        status: ``bound``; ``vacuous``: not below the extent of the original's outputs, seen at
            points of the domain; ``unavailable``: no finite bound is known.
        value: The bound, never below that of a larger profile; infinite where unavailable.
        raw: Before it was raised to those of larger profiles.
        teacher: Raw bound on the drift against the largest profile instead of the original.
        domain: The inputs that it holds for.
        reason: Why it is vacuous or unavailable; empty for a bound.
    """

    status: SoundStatus
    value: float
    raw: float
    teacher: float
    domain: str
    reason: str


@dataclass(frozen=True, slots=True)
class Certificate:
    """Statements on the drift of one profile; None where not computed.

    Attributes:
        proxy: First-order estimates, the paper's sum L ||dW||_2 alpha among them (no guarantee).
        sound: A true bound over a stated domain (may be vacuous).
        calibrated: Split-conformal bounds (marginal coverage, exchangeable data).
        observed: Measured on held-out data.
        labels: Flips, confidence and calibration on the data behind `calibrated`; None where
            outputs are not class scores.
        per_input: What bounds the drift of one input from its outputs, from the data behind
            `calibrated`; None where those were too few.
    """

    proxy: Proxy | None = None
    sound: Sound | None = None
    calibrated: Calibrated | None = None
    observed: Observed | None = None
    labels: Labels | None = None
    per_input: PerInput | None = None
