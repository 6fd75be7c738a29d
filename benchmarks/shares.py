"""Chains with given shares of the multiply-adds, for networks whose weights are random.

Such weights have no small singular values to drop, so that a plan by damage says nothing: what
these chains show is speed. Every site falls to the same share of its own dense multiply-adds, or
stays dense where the cost model sees no gain; the common share is then lowered until the whole
chain of sites reaches what was asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from t3c.codegen.families import families_of
from t3c.controller.calibrate import collect, factorize, round_weights
from t3c.controller.costs import storage_bytes
from t3c.controller.damage import DamageTable
from t3c.controller.grids import fit_grids
from t3c.controller.options import gate
from t3c.controller.plan import Fixed, Plan, largest
from t3c.controller.suffix import Suffix
from t3c.controller.work import other_bytes, peak_bytes, rest_of
from t3c.core.formats import Format
from t3c.core.profile import Label, Profile, ProfileChain, Timing
from t3c.core.sites import LinearSite
from t3c.cost_models import cost_model
from t3c.elastic.model import ElasticModel
from t3c.targets.base import TargetSpec

STEPS = 200
"""Common shares that are tried, evenly from 1 down."""


NAMES = {1.0: "max", 0.5: "half", 0.25: "quarter", 0.125: "eighth"}
"""Share -> name of its profile."""
BITS = 8
SECONDS = 10.0
"""Of watching activations for the factors."""


@dataclass(frozen=True, slots=True)
class SharePlanner:
    """A planner for `t3c.lower`.

    Attributes:
        shares: Of the multiply-adds of all sites, largest first; 1 is dense.
        threads: Threads of one call.
    """

    shares: tuple[float, ...]
    threads: int = 1

    def __call__(
        self,
        elastic: ElasticModel,
        batches: Sequence[tuple[Tensor, ...]],
        spec: TargetSpec,
        *,
        static: bool | None = None,
        **_: Any,
    ) -> Plan:
        """A profile for each share: ``max``, ``half``, ``quarter``, ``eighth``."""
        elastic.set_grids({})
        static = (families_of(spec).conv.static if static is None else static) and bool(
            elastic.snaps
        )
        model = cost_model(spec)
        decisions = gate(
            elastic.sites, spec.rank_step, model, threads=self.threads, shares=None, codes=static
        )
        rows = {
            name: [
                (row.format, site.macs(row.format))
                for row in decisions
                if row.site == name and row.kept and row.format.bits == BITS
            ]
            for name, site in elastic.sites.items()
        }
        chosen = {NAMES[share]: choose(rows, share) for share in self.shares}
        used = {name: [fmts[name] for fmts in chosen.values()] for name in elastic.sites}
        most = largest(used)
        lines = {n for n, site in elastic.sites.items() if isinstance(site, LinearSite)}
        seen = collect(elastic, batches, sites={*most, *lines}, seconds=SECONDS)
        factorize(elastic, seen, most=most)
        round_weights(elastic, seen, used)
        if static:
            elastic.set_grids(fit_grids(elastic, batches, families_of(spec).conv.activation_bits))
        suffix = Suffix(elastic)
        suffix.load(batches[0])
        rest = rest_of(elastic.graph, suffix.values())
        fixed = Fixed(
            model.predict_rest(rest, self.threads),
            rest,
            other_bytes(elastic.graph),
            peak_bytes(elastic.graph, suffix.values()),
            self.threads,
        )
        predicted = {(row.site, row.format): row.predicted_s for row in decisions}
        made = []
        for name, fmts in chosen.items():
            macs = sum(site.macs(fmts[n]) for n, site in elastic.sites.items()) + rest.f32_macs
            stored = sum(storage_bytes(site, fmts[n]) for n, site in elastic.sites.items())
            seconds = fixed.seconds + sum(predicted[pair] for pair in fmts.items())
            timing = Timing(seconds, seconds, Label.PREDICTED, threads=self.threads)
            sizes = (stored + fixed.bytes, stored + fixed.bytes + fixed.peak)
            made.append(Profile(name, fmts, macs, *sizes, latency=timing))
        chain = ProfileChain(tuple(reversed(made)))
        drift = {p.name: 0.0 for p in chain}
        nothing = DamageTable({}, 0.0)
        return Plan(chain, decisions, nothing, drift, (), (), elastic.sites, fixed)


def choose(rows: Mapping[str, list[tuple[Format, int]]], share: float) -> dict[str, Format]:
    """Formats whose multiply-adds are at most `share` of dense, or the smallest there are.

    Args:
        rows: Site name -> (format, multiply-adds), dense first, then falling.
        share: Of the dense multiply-adds of all sites together.
    """
    total = sum(row[0][1] for row in rows.values())
    found: dict[str, Format] = {}
    for step in range(STEPS, 0, -1):
        limit = step / STEPS
        picked = {name: _below(row, limit * row[0][1]) for name, row in rows.items()}
        found = {name: fmt for name, (fmt, _) in picked.items()}
        if sum(macs for _, macs in picked.values()) <= share * total:
            break
    return found


def _below(row: Sequence[tuple[Format, int]], limit: float) -> tuple[Format, int]:
    return next((pair for pair in row if pair[1] <= limit), row[-1])
