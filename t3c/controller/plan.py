"""From an elastic model and calibration data to a chain of profiles for one target."""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from t3c.codegen.families import families_of
from t3c.controller import chain as search
from t3c.controller.calibrate import (
    Moment,
    collect,
    factorize,
    kind_of,
    one_thread_each,
    round_weights,
)
from t3c.controller.costs import ENERGY, check, has_four_bits, storage_bytes
from t3c.controller.damage import DamageTable, Menu, measure
from t3c.controller.grids import fit_grids
from t3c.controller.inversions import Inversion
from t3c.controller.ledger import verify
from t3c.controller.options import COUNTED, SHARES, gate
from t3c.controller.progress import Progress, silent
from t3c.controller.statistics import correct
from t3c.controller.suffix import Suffix
from t3c.controller.swaps import SWAP_BATCHES, drift_on, improve
from t3c.controller.verdict import Verdicts, settle
from t3c.controller.work import other_bytes, peak_bytes, rest_of
from t3c.core.code_storage import CodeStorage
from t3c.core.errors import TargetError
from t3c.core.formats import CP, Dense, Format
from t3c.core.gate import GateRow
from t3c.core.objective import Goal, Objective
from t3c.core.profile import Energy, Label, Profile, ProfileChain, Timing
from t3c.core.sites import LinearSite, Site
from t3c.cost_models import AbstractCostModel, cost_model
from t3c.cost_models.base import Row, Work
from t3c.elastic.model import ElasticModel
from t3c.elastic.roles import alike, matching
from t3c.targets.base import TargetSpec

SECONDS = 30.0
"""Time for the damage table where the caller names none."""
TABLE_BATCHES = 48
"""Batches that a table in a file is measured on, at most.

The default of the design: about 48 sequences or images.
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """A chain and everything that led to it.

    Attributes:
        chain: Profiles with predicted latency and estimated bytes, smallest first.
        gate: Every format considered, with its times, kept or not.
        table: Damage of the formats that were kept.
        drift: Profile name -> predicted relative drift (root of the summed damage).
        plain: Sites whose factors ignore the data, because they are too wide.
        notes: What the user should know, for example that there are fewer profiles than wanted.
        sites: Site name -> site.
        fixed: What all profiles share.
        objective: What the chain is ordered by.
        codes: How dense codes of 8 and of 4 bits are stored.
    """

    chain: ProfileChain
    gate: tuple[GateRow, ...]
    table: DamageTable
    drift: Mapping[str, float]
    plain: tuple[str, ...]
    notes: tuple[str, ...]
    sites: Mapping[str, Site]
    fixed: "Fixed"
    objective: Goal = Objective.LATENCY
    codes: CodeStorage = CodeStorage.NESTED

    def judged(self, verdicts: Verdicts) -> "Plan":
        """The plan with measured times in its gate, and without formats that do not win.

        Where the objective is no time, no format leaves: multiply-adds, bytes and energy are
        counted, and counting again gives the same.

        Args:
            verdicts: What was measured on the target.
        """
        rows = tuple(
            replace(row, measured=verdicts.get((row.site, row.format))) for row in self.gate
        )
        if self.objective is not Objective.LATENCY:
            return replace(self, gate=rows)
        settled = settle([(p.name, p.formats) for p in self.chain], verdicts)
        if len(settled) == len(self.chain) and all(
            formats == p.formats for (_, formats), p in zip(settled, self.chain, strict=True)
        ):
            return replace(self, gate=rows)
        plans = [
            search.Plan(formats, _seconds(formats, rows), self.table.damage(formats))
            for _, formats in settled
        ]
        return replace(self, gate=rows, **_chain(plans, rows, self.sites, self.fixed))

    def without(self, inverted: Sequence[Inversion]) -> "Plan":
        """The plan without profiles that drift more than a smaller one; it says so in its notes.

        Args:
            inverted: What was found where the drift of every profile was observed.
        """
        lost = {found.larger for found in inverted}
        kept = tuple(p for p in self.chain if p.name not in lost)
        drift = {name: d for name, d in self.drift.items() if name not in lost}
        notes = (*self.notes, *map(str, inverted))
        return replace(self, chain=ProfileChain(kept), drift=drift, notes=notes)


def plan(
    elastic: ElasticModel,
    batches: Sequence[tuple[Tensor, ...]],
    spec: TargetSpec,
    *,
    profiles: int = 8,
    seconds: float | None = None,
    threads: int = 1,
    model: AbstractCostModel | None = None,
    static: bool | None = None,
    objective: Goal = Objective.LATENCY,
    codes: CodeStorage = CodeStorage.NESTED,
    keep: Sequence[str] = (),
    share: bool = False,
    table: Path | None = None,
    swaps: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Calibrate, measure the damage table, search the chain.

    Args:
        elastic: The model; its factors are replaced by calibrated ones.
        batches: Flat inputs, as the graph takes them; at least one.
        spec: The target; its rank step and cost decide the menu.
        profiles: How many profiles are wanted; fewer come only where the menu has fewer choices.
        seconds: Time for calibration and the damage table together, beyond the least they need;
            None: `SECONDS`; infinity: everything on every batch.
        threads: Threads that one call will use on the target.
        model: Predicts times; None: the target's roofline.
        static: Whether convolutions round activations to grids that are fixed here, so that int8
            tensors flow between them; None: where the target's kernels can.
        objective: The cost that every step of the chain shall save.
        codes: How dense codes of 8 and of 4 bits are stored, where a layer may have both.
        keep: Layers that stay dense int8 in every profile: roles (`t3c.elastic.roles`) or globs
            over paths.
        share: Whether layers of one role and shape always have the same format.
        table: File of the damage table; a table there that is not finished is gone on with. Then
            `seconds` of None lets everything be measured, on `TABLE_BATCHES` batches at most; else
            what there was no time for is estimated, and measured by a later run. None: no file.
        swaps: How many whole plans may be measured to exchange levels between layers of a profile,
            for all profiles together; see `t3c.controller.swaps`.
        progress: Told where it is; None: nobody.

    Raises:
        T3CError: No batches, values that are not finite, or `table` is damaged or of another
            model, data or menu.
        TargetError: `static` or `objective` asks for kernels that the target does not have.
        ValueError: `profiles` is below 1, `swaps` below 0 or asked for beside `share`, or `keep`
            names nothing.
    """
    if profiles < 1:
        raise ValueError(f"{profiles} profiles wanted; a chain has at least 1")
    if swaps < 0:
        raise ValueError(f"swaps is {swaps}; allowed are 0 and above")
    if swaps and share:
        raise ValueError(f"swaps={swaps} give layers of one role different formats; leave out one")
    check(objective, spec)
    dense = matching(elastic, keep)
    progress = silent if progress is None else progress
    if table is not None:
        verify(table)  # before the work, not after it
    start = time.monotonic()
    limit = SECONDS if seconds is None else seconds
    # Factors fit the data that they are made from better than other data: damage is measured on
    # batches that they have not seen, then the factors are made again from all of them.
    elastic.set_grids({})
    elastic.forget_corrections()
    static = _static(spec, static) and bool(elastic.snaps)
    bits = families_of(spec).conv.activation_bits
    fit, held = (batches[::2], batches[1::2]) if len(batches) > 1 else (batches, batches)
    predict = cost_model(spec) if model is None else model
    decisions = menu_of(
        elastic,
        spec,
        predict,
        profiles,
        threads,
        codes=static,
        objective=objective,
        stored=codes,
        keep=dense,
    )
    menu: Menu = {
        name: [d.format for d in decisions if d.site == name and d.kept] for name in elastic.sites
    }
    most = largest(menu)
    # A table that is gone on with needs the same codes again, to the bit: no clock, one thread.
    looking, same = (limit / 8, nullcontext) if table is None else (None, one_thread_each)
    wanted = {*most, *(n for n, site in elastic.sites.items() if isinstance(site, LinearSite))}

    def rounded(moments: Mapping[str, Moment], data: Sequence[tuple[Tensor, ...]]) -> None:
        again = objective is Objective.BYTES and codes is CodeStorage.NESTED
        with same():
            made_up = data if again else ()
            round_weights(elastic, moments, menu, progress, batches=made_up, stored=codes)

    with same():
        seen = collect(elastic, fit, sites=wanted, seconds=looking, progress=progress)
        plain = factorize(elastic, seen, progress, most=most, batches=fit)
    rounded(seen, fit)
    if static:
        with same():
            elastic.set_grids(fit_grids(elastic, fit, bits))
    left = max(limit - (time.monotonic() - start), limit / 2)
    if table is not None and seconds is None:
        left = math.inf
    shown = held if table is None else held[:TABLE_BATCHES]
    damages = measure(elastic, shown, menu, seconds=left, progress=progress, table=table)
    if held is not fit:
        unseen = collect(elastic, held, sites=seen, seconds=looking, progress=progress)
        both = {name: moment + unseen[name] for name, moment in seen.items()}
        again = {n: most[n] for n in both if n in most}
        factorize(elastic, both, progress, most=again, batches=batches)
        rounded(both, batches)
        if static:
            elastic.set_grids(fit_grids(elastic, batches, bits))
    options = options_of(decisions, damages)
    groups = alike(elastic) if share else [(name,) for name in elastic.sites]
    choices = search.together(options, groups)
    path = search.path(choices, dense_first=objective is Objective.BYTES)
    if len(path) < profiles:
        path = search.fine_path(choices)
    through = search.last_dense(path) if objective is Objective.BYTES else 0
    plans = [search.apart(p, groups) for p in search.cut(path, profiles, through=through)]
    notes = []
    if dense:
        notes.append(f"dense int8 in every profile, as asked: {_listed(sorted(dense))}")
    if swaps:
        swapped = improve(plans, options, drift_on(elastic, held[:SWAP_BATCHES]), swaps, progress)
        plans = list(swapped.plans)
        notes.append(
            f"{swapped.kept} swaps of levels between layers made whole plans drift less, of "
            f"{swapped.evaluations} plans measured"
        )
    if static:
        notes.append(
            f"convolutions round activations to grids fixed on {len(batches)} calibration input(s);"
            " values beyond them are cut off (activations='dynamic' takes each call's own range, "
            "and longer)"
        )
    if held is fit:
        notes.append(
            "one calibration batch: drift is predicted on the data that the factors were made "
            "from and will be higher on other data; pass more batches"
        )
    if len(plans) < profiles:
        less = "faster" if objective is Objective.LATENCY else f"less ({objective.unit})"
        notes.append(
            f"{len(plans)} of {profiles} profiles: on {spec.name!r} only {len(path)} different "
            f"choices are {less} than dense (ranks are multiples of {spec.rank_step})"
        )
    corrected = correct(elastic, [p.formats for p in plans], batches, limit / 4)
    if corrected:
        notes.append(
            f"means and variances behind batch norms were brought back to the original's on "
            f"{corrected} calibration input(s), for every profile with cut ranks"
        )
    suffix = Suffix(elastic)
    suffix.load(batches[0])
    rest = rest_of(elastic.graph, suffix.values())
    fixed = Fixed(
        predict.predict_rest(rest, threads),
        rest,
        other_bytes(elastic.graph) + sum(table.nbytes for table in elastic.tables.values()),
        peak_bytes(elastic.graph, suffix.values()),
        threads,
        predict,
        static,
    )
    return Plan(
        **_chain(plans, decisions, elastic.sites, fixed, objective),
        gate=decisions,
        table=damages,
        plain=plain,
        notes=tuple(notes),
        sites=elastic.sites,
        fixed=fixed,
        objective=objective,
        codes=codes,
    )


def _listed(names: Sequence[str]) -> str:
    """The first few, in words."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def options_of(gate: Sequence[GateRow], table: DamageTable) -> dict[str, list[search.Option]]:
    """What the search chooses from: site name -> kept formats with cost and damage, dense first."""
    options: dict[str, list[search.Option]] = {name: [] for name in table.entries}
    for row in gate:
        if row.kept:
            damage = table.entries[row.site][row.format].damage
            options[row.site].append(search.Option(row.format, row.cost, damage))
    return options


def _chain(
    plans: Sequence[search.Plan],
    gate: Sequence[GateRow],
    sites: Mapping[str, Site],
    fixed: "Fixed",
    objective: Goal = Objective.LATENCY,
) -> dict[str, Any]:
    """Profiles with their names, and their predicted drift."""
    names = profile_names(len(plans))
    made = [
        _profile(name, sites, p.formats, _timing(sites, p.formats, gate, fixed), fixed)
        for name, p in zip(names, plans, strict=True)
    ]
    made = [replace(p, energy=_energy(p, sites, fixed, objective)) for p in made]
    drift = {name: p.drift for name, p in zip(names, plans, strict=True)}
    return {"chain": ProfileChain(tuple(made)), "drift": drift}


def _seconds(formats: Mapping[str, Format], gate: Sequence[GateRow]) -> float:
    """Predicted time of all sites."""
    predicted = {(row.site, row.format): row.predicted_s for row in gate}
    return math.fsum(predicted[item] for item in formats.items())


def _timing(
    sites: Mapping[str, Site],
    formats: Mapping[str, Format],
    gate: Sequence[GateRow],
    fixed: "Fixed",
) -> Timing:
    """Predicted time of a call, with its interval where the model knows one."""
    if fixed.model is None:
        whole = _seconds(formats, gate) + fixed.seconds
        return Timing(whole, whole, Label.PREDICTED, threads=fixed.threads)
    layers = [Row(sites[n], fmt, fixed.threads, fixed.static) for n, fmt in formats.items()]
    whole = fixed.model.predict_network(layers, fixed.rest)
    low, high = fixed.model.predict_network_interval(layers, fixed.rest)
    ends = (low, high) if high < math.inf else (None, None)
    return Timing(whole, whole, Label.PREDICTED, None, fixed.threads, *ends)


def _energy(
    profile: Profile, sites: Mapping[str, Site], fixed: "Fixed", objective: Goal
) -> Energy | None:
    """Energy of one call: predicted by what a meter taught, else estimated where it counts."""
    if fixed.model is not None:
        layers = [Row(sites[n], f, fixed.threads, fixed.static) for n, f in profile.formats.items()]
        joules = fixed.model.predict_network_energy(layers, fixed.rest)
        if joules is not None:
            return Energy(joules, Label.PREDICTED)
    if Objective.ENERGY not in objective.parts:
        return None
    chosen = [(sites[name], fmt) for name, fmt in profile.formats.items()]
    inside = sum(ENERGY.site(site.macs(f), storage_bytes(site, f)) for site, f in chosen)
    return Energy(inside + ENERGY.rest(fixed.rest, fixed.bytes), Label.ESTIMATED)


def _static(spec: TargetSpec, wanted: bool | None) -> bool:
    """Whether grids are fixed: what is wanted, if the target can."""
    can = families_of(spec).conv.static
    if wanted and not can:
        raise TargetError(
            f"target {spec.name!r} has no convolutions on fixed grids; use activations='dynamic', "
            "or 'auto', which takes what the target has"
        )
    return can if wanted is None else wanted


def menu_of(
    elastic: ElasticModel,
    spec: TargetSpec,
    model: AbstractCostModel,
    profiles: int,
    threads: int = 1,
    *,
    codes: bool = False,
    objective: Goal = Objective.LATENCY,
    stored: CodeStorage = CodeStorage.NESTED,
    keep: Collection[str] = (),
) -> tuple[GateRow, ...]:
    """The coarse menu, or every rank where the coarse one is too small for that many profiles."""
    cp = {n: (x.fit_ranks(CP) or (0,))[0] for n, x in elastic.layers.items() if kind_of(x) is CP}

    def rows(shares: Sequence[float] | None) -> tuple[GateRow, ...]:
        return gate(
            elastic.sites,
            spec.rank_step,
            model,
            threads=threads,
            shares=shares,
            cp=cp,
            codes=codes,
            four=has_four_bits(spec),
            objective=objective,
            stored=stored,
            keep=keep,
        )

    coarse = rows(SHARES if objective is Objective.LATENCY else COUNTED)
    smaller = sum(d.kept and not isinstance(d.format, Dense) for d in coarse)
    return coarse if smaller >= 3 * profiles else rows(None)


def largest(menu: Menu) -> dict[str, tuple[int, ...]]:
    """Site name -> largest rank of each side on the menu; sites that stay dense are left out."""
    found = {}
    for name, formats in menu.items():
        ranks = [fmt.ranks for fmt in formats if not isinstance(fmt, Dense)]
        if ranks:
            found[name] = tuple(int(max(side)) for side in zip(*ranks, strict=True))
    return found


def profile_names(count: int) -> list[str]:
    """``tiny``, ``p1``, ``p2``, ... ``max``; a single profile is ``max``."""
    if count == 1:
        return ["max"]
    return ["tiny", *(f"p{i}" for i in range(1, count - 1)), "max"]


@dataclass(frozen=True, slots=True)
class Fixed:
    """What is the same in every profile: everything that is no elastic site.

    Attributes:
        seconds: Predicted time.
        rest: Its work.
        bytes: Of parameters and constants.
        peak: Most bytes of activations alive at once.
        threads: Of one call.
        model: Predicts the time of a network; None: that of its sites and `seconds` add up.
        static: Whether int8 codes flow between convolutions.
    """

    seconds: float
    rest: Work
    bytes: int
    peak: int
    threads: int
    model: AbstractCostModel | None = None
    static: bool = False


def _profile(
    name: str,
    sites: Mapping[str, Site],
    formats: Mapping[str, Format],
    latency: Timing,
    fixed: Fixed,
) -> Profile:
    """A profile with predicted time, counted multiply-adds and estimated bytes.

    Args:
        name: Its name.
        sites: Site name -> site.
        formats: Site name -> format.
        latency: Predicted time.
        fixed: Everything else.
    """
    stored = sum(storage_bytes(site, formats[n]) for n, site in sites.items()) + fixed.bytes
    macs = sum(site.macs(formats[n]) for n, site in sites.items()) + fixed.rest.f32_macs
    return Profile(
        name,
        dict(formats),
        macs=macs,
        storage_bytes=stored,
        ram_bytes=stored + fixed.peak,
        latency=latency,
    )
