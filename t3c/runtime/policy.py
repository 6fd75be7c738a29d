"""The learned policy pi(b, s(x)): a small network from a budget to a place on the chain.

One curve for each component says how far along the chain its limit lets a profile go; the place is
the least of them. Curves never fall when the limit rises: their weights are not negative. The place
is continuous; snapping makes it the largest profile that keeps the budget, so that the policy never
exceeds one and equals an exhaustive search. With an input summary s(x), a further network says what
place the input is content with, and the least of all counts: never more than the budget allows.

Numpy is enough to use one; `t3c.controller.fit_policy` trains it (torch).
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from t3c.core.artifact import Artifact, with_policy
from t3c.core.budget import COSTS, PERCENTILES, Budget, Selector, costs
from t3c.core.errors import ArtifactError, T3CError
from t3c.core.profile import Percentile, Profile, ProfileChain

Array = NDArray[np.float64]
SCHEMA = 1
UNLIMITED = 1.15
"""What a component that is not limited enters as: clearly above the largest profile's 1."""
LEAST = -0.15
KNOWN = 4096
"""Budgets that are remembered."""
LOOKS = 8
"""Timed looks at each call."""
SUMMARY = 4
"""Features of an input summary."""


@final
@dataclass(frozen=True, slots=True)
class Layers:
    """One place from some numbers: out @ tanh(hidden @ x + bias) + shift.

    Attributes:
        hidden: [units, inputs]; not negative in curves of budgets.
        bias: [units].
        out: [units]; not negative in curves of budgets.
        shift: Added last.
    """

    hidden: Array
    bias: Array
    out: Array
    shift: float

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit, and numbers that are none."""
        units = self.bias.shape
        if self.hidden.ndim != 2 or (self.hidden.shape[0],) != units or self.out.shape != units:
            shapes = self.hidden.shape, units, self.out.shape
            raise ValueError(f"a network's weights are {shapes}; [n, inputs], [n] and [n] fit")
        if not all(np.isfinite(x).all() for x in (self.hidden, self.bias, self.out, self.shift)):
            raise ValueError("a network's weights hold NaN or infinity")

    def __call__(self, x: Array) -> float:
        """The place: 0 is the smallest profile, 1 the largest, and a little beyond."""
        return float(self.out @ np.tanh(self.hidden @ x + self.bias)) + self.shift

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.hidden.size + self.bias.size + self.out.size + 1

    def to_json(self) -> list[Any]:
        """Everything."""
        return [self.hidden.tolist(), self.bias.tolist(), self.out.tolist(), self.shift]


@final
@dataclass(frozen=True, slots=True)
class Policy:
    """A trained policy for one chain on one device.

    Attributes:
        components: Costs that it knows, in the order of its inputs; others are left to the chain.
        percentile: Of the latency.
        table: [components, profiles], what each profile costs; rises along the chain.
        curves: One for each component.
        content: Place that an input is content with, from its summary; None: budgets alone.
        centre: Mean of each feature of the summary.
        scale: Their standard deviations.
        floors: For each profile, where it is the largest feasible one: the smallest that an input
            may choose there. The profile itself where choosing did not pay on inputs that the
            policy was not fitted to: there the chain decides. Never falls; so choices do not.
        look_s: Seconds that looking at an input takes where the policy was fitted; they count as
            latency of the call.
    """

    components: tuple[str, ...]
    percentile: Percentile
    table: Array
    curves: tuple[Layers, ...]
    content: Layers | None = None
    centre: Array = field(default_factory=lambda: np.zeros(0))
    scale: Array = field(default_factory=lambda: np.zeros(0))
    floors: tuple[int, ...] = ()
    look_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is not monotone by construction, or does not fit together."""
        if not self.components or not set(self.components) <= set(COSTS):
            raise ValueError(f"components are {self.components}; some of {', '.join(COSTS)} are")
        if self.percentile not in PERCENTILES or not 0.0 <= self.look_s < math.inf:
            raise ValueError(f"percentile {self.percentile!r} or look_s {self.look_s} is none")
        if self.table.ndim != 2 or not ((0 < self.table) & (self.table < math.inf)).all():
            raise ValueError("costs must be positive, finite numbers, a row for each component")
        if self.table.shape[0] != len(self.components) or (np.diff(self.table) < 0).any():
            raise ValueError(
                "costs must rise along the chain, a row for each component; raise them to their "
                "running maximum (t3c.core.conservative.increasing)"
            )
        for name, curve in zip(self.components, self.curves, strict=True):
            if (curve.hidden < 0).any() or (curve.out < 0).any():
                raise ValueError(f"the curve of {name} has a negative weight; it could fall")
            if curve.hidden.shape[1] != 1:
                raise ValueError(f"the curve of {name} takes more than one limit")
        if self.content is not None:
            if {self.content.hidden.shape[1:], self.centre.shape, self.scale.shape} != {(SUMMARY,)}:
                raise ValueError(f"a summary has {SUMMARY} features; other ones were fitted")
            if not (np.isfinite(self.centre).all() and (self.scale > 0).all()):
                raise ValueError("centre and scale of summaries must be finite, scale above 0")
            valid = all(0 <= floor <= k for k, floor in enumerate(self.floors))
            if (
                not valid
                or len(self.floors) != self.profiles
                or list(self.floors) != sorted(self.floors)
            ):
                raise ValueError(
                    f"floors are {self.floors}; one a profile, at most it, none falling"
                )

    @property
    def profiles(self) -> int:
        """How many the chain has."""
        return int(self.table.shape[1])

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        nets = self.curves if self.content is None else (*self.curves, self.content)
        return sum(net.parameters for net in nets)

    def encode(self, budget: Budget) -> Array:
        """Limits as the network sees them: 0 at the smallest profile's cost, 1 at the largest's."""
        limits = budget.components
        low, high = np.log(self.table[:, 0]), np.log(self.table[:, -1])
        found = np.full(len(self.components), UNLIMITED)
        for i, name in enumerate(self.components):
            if name in limits:
                width = max(high[i] - low[i], 1e-9)
                found[i] = np.clip((math.log(limits[name]) - low[i]) / width, LEAST, UNLIMITED)
        return found

    def position(self, budget: Budget, summary: Array | None = None) -> float:
        """The continuous choice: 0 is the smallest profile, `profiles` - 1 the largest.

        Args:
            budget: Never lowers the result where a limit rises.
            summary: Of the input, as `summarize` makes it; None: the budget alone counts.
        """
        limits = self.encode(budget)
        places = [curve(limits[i : i + 1]) for i, curve in enumerate(self.curves)]
        if self.content is not None and summary is not None:
            places.append(self.content((summary - self.centre) / self.scale))
        return min(max(min(places), 0.0), 1.0) * (self.profiles - 1)

    def enough(self, summary: Array) -> int:
        """The profile that an input is content with, whatever the budget; the largest, untaught."""
        if self.content is None:
            return self.profiles - 1
        place = self.content((summary - self.centre) / self.scale)
        if math.isnan(place):  # an input that holds NaN says nothing
            return self.profiles - 1
        return whole(min(max(place, 0.0), 1.0) * (self.profiles - 1))

    def snap(self, budget: Budget, place: float) -> int:
        """The largest profile that keeps the budget, sought from a place on the chain; -1: none."""
        limits = [
            (row, limit)
            for name, row in zip(self.components, self.table, strict=True)
            if (limit := budget.components.get(name)) is not None
        ]

        def fits(k: int) -> bool:
            return all(row[k] <= limit for row, limit in limits)

        k = min(max(whole(place), 0), self.profiles - 1)
        while k >= 0 and not fits(k):
            k -= 1
        while k + 1 < self.profiles and fits(k + 1):
            k += 1
        return k

    def to_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        return {
            "schema": SCHEMA,
            "components": list(self.components),
            "percentile": self.percentile,
            "table": self.table.tolist(),
            "curves": [curve.to_json() for curve in self.curves],
            "content": None if self.content is None else self.content.to_json(),
            "centre": self.centre.tolist(),
            "scale": self.scale.tolist(),
            "floors": list(self.floors),
            "look_s": self.look_s,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Policy":
        """What `to_json` wrote.

        Raises:
            ArtifactError: A newer schema, or fields that are missing or malformed.
        """
        if (schema := data.get("schema")) != SCHEMA:
            raise ArtifactError(f"policy schema {schema}, known is {SCHEMA}; install a newer t3c")
        try:
            return Policy(
                tuple(data["components"]),
                data["percentile"],
                np.array(data["table"], np.float64),
                tuple(_layers(curve) for curve in data["curves"]),
                None if data["content"] is None else _layers(data["content"]),
                np.array(data["centre"], np.float64),
                np.array(data["scale"], np.float64),
                tuple(data["floors"]),
                float(data["look_s"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"this policy is damaged: {error}") from error


@final
class PolicySelector:
    """Picks profiles by a policy; what it does not know, and repeated budgets, cost a look-up."""

    def __init__(self, chain: ProfileChain, policy: Policy) -> None:
        """Check that the policy was made for this chain.

        Raises:
            T3CError: It was not.
        """
        if not fits(chain, policy):
            raise T3CError(
                "this policy was fitted to other costs or profiles than those that are recorded "
                "now; fit it again with `t3c policy`"
            )
        self.chain, self.policy = chain, policy
        self._selector = Selector(chain)
        self._known: dict[Budget, int] = {}
        self._looks = policy.content is not None and any(
            floor < k for k, floor in enumerate(policy.floors)
        )

    def index(self, budget: Budget, summary: Array | None = None) -> int:
        """Position of the profile to run.

        Without a summary the largest that keeps the budget, as `Selector.index`. With one that, or
        a smaller one that the input is content with; the time of looking counts as latency.

        Args:
            budget: Any; one that limits what the policy does not know is left to the chain.
            summary: As `summarize` makes it; None: budgets alone.

        Raises:
            InfeasibleBudget: As `Selector.index`.
        """
        least, largest = self._room(budget, looks=summary is not None)
        if summary is None or least == largest:
            return largest
        return max(least, min(largest, self.policy.enough(summary)))

    def index_of(self, budget: Budget, inputs: Sequence[Any]) -> int:
        """As `index` for the flat inputs of a call, which are looked at only where that can matter.

        Raises:
            InfeasibleBudget: As `index`.
        """
        least, largest = self._room(budget, looks=True)
        return largest if least == largest else self.index(budget, summarize(inputs))

    def select(self, budget: Budget, summary: Array | None = None) -> Profile:
        """The profile at `index`.

        Raises:
            InfeasibleBudget: As `index`.
        """
        return self.chain.profiles[self.index(budget, summary)]

    def _room(self, budget: Budget, *, looks: bool) -> tuple[int, int]:
        """Between which profiles an input may choose; equal ones: there is nothing to choose."""
        largest = self._known.get(budget)
        if largest is None:
            if len(self._known) >= KNOWN:
                self._known.clear()
            largest = self._known[budget] = self._largest(budget)
        policy = self.policy
        if not looks or not self._looks or not self._covers(budget):
            return largest, largest
        if budget.latency_ms is not None:
            left = budget.latency_ms - policy.look_s * 1e3
            # where no time is left for looking the smallest runs, which needs no look
            largest = policy.snap(replace(budget, latency_ms=left), largest) if left > 0 else 0
        return policy.floors[max(0, largest)], max(0, largest)

    def _covers(self, budget: Budget) -> bool:
        policy = self.policy
        known = budget.components.keys() <= set(policy.components)
        return known and (budget.latency_ms is None or budget.percentile == policy.percentile)

    def _largest(self, budget: Budget) -> int:
        if not self._covers(budget):
            return self._selector.index(budget)
        found = self.policy.snap(budget, self.policy.position(budget))
        return self._selector.index(budget) if found < 0 else found  # which tells why not


def keep(artifact: Artifact, policy: Policy, report: Mapping[str, Any]) -> Artifact:
    """Write a policy into an artifact, whole or not at all; it takes the place of an earlier one.

    Args:
        artifact: Its manifest is replaced.
        policy: Made for its chain.
        report: What else is known of the policy, for readers of the file.

    Raises:
        T3CError: It was made for another chain.
    """
    PolicySelector(artifact.manifest.chain, policy)
    text = json.dumps({**policy.to_json(), "report": report}, indent=1, allow_nan=False)
    return with_policy(artifact, text.encode() + b"\n")


def stored(artifact: Artifact) -> Policy | None:
    """The policy that an artifact names; None: it names none.

    Raises:
        ArtifactError: The file is damaged, or of a newer schema.
    """
    if artifact.manifest.policy is None:
        return None
    file = artifact.path / artifact.manifest.policy
    try:
        data = json.loads(file.read_bytes())
        return Policy.from_json(data)
    except (OSError, ValueError, AttributeError, ArtifactError) as error:
        raise ArtifactError(f"{file}: {error}; fit it again with `t3c policy`") from error


def opened(artifact: Artifact, wanted: bool | Literal["auto"]) -> PolicySelector | None:
    """What picks profiles by an artifact's policy; None: nothing shall, or with "auto" can.

    Raises:
        ArtifactError: A policy is wanted and there is none, or it is damaged.
        T3CError: It was fitted to other costs; "auto" leaves it out instead.
        ValueError: `wanted` is something else.
    """
    if wanted not in (False, True, "auto"):
        raise ValueError(f"policy is {wanted!r}; allowed are False, True, 'auto'")
    found = stored(artifact) if wanted else None
    if found is None:
        if wanted and wanted != "auto":
            raise ArtifactError(f"{artifact.path}: no policy in it; fit one with `t3c policy`")
        return None
    chain = artifact.manifest.chain
    if wanted == "auto" and not fits(chain, found):
        return None
    return PolicySelector(chain, found)


def fits(chain: ProfileChain, policy: Policy) -> bool:
    """Whether a policy was fitted to these profiles and their costs."""
    return np.array_equal(table_of(chain, policy.components, policy.percentile), policy.table)


def whole(place: float) -> int:
    """The profile at or below a place on the chain: the one above costs more than what is there."""
    return math.floor(place + 1e-6)


def table_of(
    chain: ProfileChain, components: Sequence[str], percentile: Percentile = "p95"
) -> Array:
    """[components, profiles]: what a budget compares."""
    rows = [costs(profile, percentile) for profile in chain]
    return np.array([[row[name] for row in rows] for name in components], np.float64)


def summarize(inputs: Sequence[Any]) -> Array:
    """s(x): four cheap statistics of a call's inputs [SUMMARY].

    Mean, standard deviation, share of zeros (padding) and mean step between neighbours, over the
    last input for the share of zeros (a mask comes last), the first for the others.
    """
    first = np.asarray(inputs[0], np.float64).ravel()
    last = np.asarray(inputs[-1]).ravel()
    steps = float(np.abs(np.diff(first)).mean()) if first.size > 1 else 0.0
    return np.array([first.mean(), first.std(), float((last == 0).mean()), steps])


def _layers(data: Sequence[Any]) -> Layers:
    hidden, bias, out, shift = data
    return Layers(np.array(hidden, np.float64), np.array(bias), np.array(out), float(shift))


def decision_seconds(
    selector: PolicySelector, budgets: Sequence[Budget], inputs: Sequence[Any] | None = None
) -> list[float]:
    """Seconds of each decision, the summary of the input included; for reports."""
    found = []
    for budget in budgets:
        start = time.perf_counter()
        selector.index(budget, None if inputs is None else summarize(inputs))
        found.append(time.perf_counter() - start)
    return found


def with_look(chain: ProfileChain, policy: Policy, calls: Sequence[Sequence[Any]]) -> Policy:
    """The policy with what looking at inputs takes here: the 95th percentile over some calls.

    Args:
        chain: What the policy was fitted to.
        policy: One that looks at inputs.
        calls: Flat inputs of each; at least one.
    """
    selector = PolicySelector(chain, policy)
    largest = Budget(**{policy.components[0]: float(policy.table[0, -1])})  # type: ignore[arg-type]
    times = [t for call in calls for t in decision_seconds(selector, [largest] * LOOKS, call)]
    return replace(policy, look_s=float(np.percentile(times, 95)))
