"""The table of the gate: what each format of each layer was said and seen to cost."""

from dataclasses import dataclass

from t3c.core.formats import Dense, Format
from t3c.core.objective import Goal, Objective


@dataclass(frozen=True, slots=True)
class Measured:
    """A layer's format against its dense form, timed in turn inside one library.

    Attributes:
        seconds: Median time of the layer.
        dense_seconds: Median time of its dense form.
        ratio: Median of the ratios of all turns.
        high: Upper end of the 95 % interval of that median.
    """

    seconds: float
    dense_seconds: float
    ratio: float
    high: float

    @property
    def wins(self) -> bool:
        """Whether the format is faster beyond noise."""
        return self.high < 1.0


@dataclass(frozen=True, slots=True)
class GateRow:
    """One format of one layer.

    Attributes:
        site: Name of the layer.
        format: The format.
        predicted_s: Its predicted time.
        dense_predicted_s: Predicted time of the fastest dense form.
        cost: Its cost in units of the objective.
        dense_cost: Of the cheapest dense form.
        measured: What was measured on the target; None: nothing, or no profile asked for it.
        objective: What the chain is ordered by. Times decide where it is latency, else costs.
    """

    site: str
    format: Format
    predicted_s: float
    dense_predicted_s: float
    cost: float
    dense_cost: float
    measured: Measured | None = None
    objective: Goal = Objective.LATENCY

    @property
    def kept(self) -> bool:
        """Whether profiles may use the format: measured times win over predicted ones."""
        if isinstance(self.format, Dense):
            return True
        if self.objective is not Objective.LATENCY:
            return self.cost < self.dense_cost
        if self.measured is not None:
            return self.measured.wins
        return self.predicted_s < self.dense_predicted_s

    @property
    def reason(self) -> str:
        """The comparison, in words."""
        what = f"{self.format} at {self.site}"
        if self.objective is not Objective.LATENCY:
            verdict = "less" if self.cost < self.dense_cost else "not less"
            unit = self.objective.unit
            return (
                f"{what}: {self.cost:.3g} {unit}, {verdict} than dense with {self.dense_cost:.3g}"
            )
        if self.measured is None:
            verdict = "faster" if self.predicted_s < self.dense_predicted_s else "not faster"
            return (
                f"{what}: {self.predicted_s * 1e6:.0f} us predicted, {verdict} than dense at "
                f"{self.dense_predicted_s * 1e6:.0f} us"
            )
        verdict = "faster" if self.measured.wins else "not faster beyond noise"
        return (
            f"{what}: {self.measured.seconds * 1e6:.0f} us measured, {verdict} than dense at "
            f"{self.measured.dense_seconds * 1e6:.0f} us "
            f"(ratio {self.measured.ratio:.2f}, at most {self.measured.high:.2f})"
        )
