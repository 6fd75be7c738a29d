"""The composition root: model in, elastic model, chain of profiles, library, artifact, session."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from t3c import proof, targets
from t3c.calls import HELD_OUT_FROM, calibration_calls, held_out
from t3c.certificate import observed
from t3c.certificate.proxy import Meter, proxies, with_proxies
from t3c.certificate.sound import Domain
from t3c.certificate.sound import certify as sound_certify
from t3c.certifying import certify, fit_policy
from t3c.codegen.build import Built, build
from t3c.codegen.families import tuned_schedules
from t3c.codegen.kernels.schedule import Schedule
from t3c.codegen.tools import require
from t3c.codegen.tune.network import operators, tune
from t3c.codegen.tune.search import RECORDS
from t3c.controller.costs import check as check_objective
from t3c.controller.inversions import inversions
from t3c.controller.plan import SECONDS, Plan, plan
from t3c.controller.statistics import correct
from t3c.core.artifact import Artifact, check_replaceable
from t3c.core.code_storage import CodeStorage, parse_code_storage
from t3c.core.codes import SiteCodes
from t3c.core.errors import PassError, TargetError
from t3c.core.formats import Format
from t3c.core.manifest import (
    Manifest,
)
from t3c.core.objective import Mix, Objective, parse_objective
from t3c.core.sites import Site
from t3c.cost_models import COST_MODELS, AbstractCostModel
from t3c.cost_models import cost_model as predictor
from t3c.cost_models.device import this_device
from t3c.cost_models.learned import LearnedModel
from t3c.describing import captured_of, described, with_certificates
from t3c.elastic.conv import ElasticConv
from t3c.elastic.factorize import DEFAULT
from t3c.elastic.linear import ElasticLinear
from t3c.elastic.model import ElasticModel
from t3c.elastic.snap import Snap
from t3c.elastic.table import Table
from t3c.passes.capture import capture
from t3c.passes.pipeline import lowering_graph, rewrite
from t3c.passes.sites import Choice, Makers
from t3c.proof import TOLERANCE, Batch, Bench, Notes, Progress
from t3c.runtime import bundle
from t3c.runtime.session import load
from t3c.targets import TargetSpec

__all__ = ["TOLERANCE", "certify", "elasticize", "fit_policy", "load", "lower"]

Model = nn.Module | ExportedProgram | ElasticModel

ACTIVATIONS: Mapping[str, bool | None] = {"auto": None, "static": True, "dynamic": False}
PROXY_INPUTS = 3
"""Calibration inputs behind the norms of the proxies, at most."""
PROXY_SECONDS = 10.0
"""Time for the Jacobian norms of the proxies; layers left out lie between their neighbours."""


def elasticize(
    model: nn.Module | ExportedProgram,
    example_inputs: tuple[Any, ...] = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    conv: str = "tucker2",
    factorizer: str = DEFAULT,
    tables: bool = False,
) -> ElasticModel:
    """Capture a model and turn its linear and convolution layers into elastic ones.

    The model is never changed. Shapes of the example inputs become static.

    Args:
        model: A module, an FX graph module or an exported program.
        example_inputs: Positional arguments of one call.
        example_kwargs: Keyword arguments of that call.
        include: Globs over module paths; only these layers become elastic.
        exclude: Globs over module paths that stay as they are.
        conv: Factorization of k x k convolutions: ``tucker2`` or ``cp``.
        factorizer: What makes the low ranks of linear layers and 1x1 convolutions: ``svd``,
            ``whitened-svd`` (in the metric of the inputs), ``kronecker-svd`` (of both sides) or
            ``saes-svd`` (as before, and each layer makes up for errors of those before it).
        tables: Whether profiles read embedding tables in int8, with a scale for each row.

    Raises:
        PassError: The model cannot be captured (the message names every way that was tried), or a
            weight is not finite.
        ValueError: There is no such factorizer.
    """
    captured = capture(model, example_inputs, example_kwargs)
    makers = Makers(
        linear=ElasticLinear,
        conv=lambda site, w, b: ElasticConv(site, w, b, conv),
        snap=Snap,
        table=Table if tables else None,
    )
    graph, report = rewrite(captured.graph, makers, Choice(tuple(include), tuple(exclude)))
    elastic = ElasticModel(graph, captured, report)
    for name, layer in elastic.layers.items():
        layer.set_thin(factorizer)
        if not torch.isfinite(layer.weight).all():
            raise PassError(
                f"layer {name!r}: its weight holds NaN or infinity; load a sound checkpoint, or "
                "leave the layer out by exclude"
            )
    return elastic


def lower(
    model: Model,
    target: str | TargetSpec = "x86",
    example_inputs: tuple[Any, ...] = (),
    out: str | os.PathLike[str] | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    calibration: Sequence[tuple[Any, ...]] | None = None,
    profiles: int = 8,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    conv: str = "tucker2",
    factorizer: str = DEFAULT,
    tables: bool = False,
    activations: str = "auto",
    objective: str | Mix | Sequence[str] = Objective.LATENCY,
    codes: str | CodeStorage = CodeStorage.NESTED,
    keep: Sequence[str] = (),
    share_roles: bool = False,
    cost_model: str | os.PathLike[str] | AbstractCostModel = "roofline",
    plan_seconds: float | None = None,
    table: str | os.PathLike[str] | None = None,
    planner: Callable[..., Plan] = plan,
    checks: str | os.PathLike[str] | None = None,
    calls: int = 100,
    threads: int | None = None,
    domain: Domain | None = None,
    tune_minutes: float = 0.0,
    tune_folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Artifact:
    """Lower a model to one artifact in which every profile is compiled, and prove it.

    Args:
        model: What `elasticize` takes, or its result.
        target: Name of a target (``t3c.targets.TARGETS``) or a specification.
        example_inputs: Positional arguments of one call; unused for an elastic model.
        out: Folder of the artifact; None: ``<model class>-<target>`` in the current folder.
        example_kwargs: Keyword arguments of that call.
        calibration: Arguments of calls with real data, each a tuple; None: the example inputs.
        profiles: How many profiles the chain should have.
        include: See `elasticize`.
        exclude: See `elasticize`.
        conv: See `elasticize`.
        factorizer: See `elasticize`.
        tables: See `elasticize`.
        activations: How convolutions round their inputs: ``static``, to grids fixed on the
            calibration data, so that int8 tensors flow between them; ``dynamic``, to the range of
            each image; ``auto``, static where the target's kernels can.
        objective: What the profiles are chosen to save: ``latency``, ``macs``, ``bytes`` (linear
            layers take 4 bits), ``energy`` (estimated, unless `cost_model` knows a meter), or
            several, ``latency+bytes`` or a list: the mean of their shares of the dense
            network's. All profiles state all costs.
        codes: How dense linear layers of 8 and of 4 bits are stored: ``nested``, one array for both
            widths, or ``independent``, one for each: dense profiles lose no more than dense
            quantization to that width alone, and the file is larger.
        keep: Layers that stay dense int8 in every profile: roles (``head``, ``stem``, ``query``,
            ``up``, ...; `t3c.elastic.roles.ROLES`), or globs over module paths.
        share_roles: Whether layers of one role and shape have the same format in every profile
            (but for those that measure slower than dense): fewer kernels, coarser choices.
        cost_model: Predicts times of layers while the chain is planned: a name
            (``t3c.cost_models.COST_MODELS``), the file of a model that ``t3c fit`` wrote, or a
            model. A fitted one must be of this device, or for a target that does not run here of
            that target; profiles that nobody measures then have its intervals.
        plan_seconds: Time for calibration and damage table; None: the planner's default.
        table: File of the measured damage table. What an interrupted run had measured is not
            measured again, and a finished table is only read; without `plan_seconds` every entry
            is measured, however long it takes. None: nothing is written.
        planner: Chooses the chain; another one takes the arguments of `t3c.controller.plan.plan`.
        checks: Where to keep the artifact whose library has probes and traces, for measurements of
            single kernels (``traces.json`` names them); None: nowhere.
        calls: Most timed calls per profile where this machine can run the library, fewer where
            they take long; 0: none, and the profiles keep their predicted times.
        threads: Threads of the timed calls; None: see `load`.
        domain: Inputs for which drift is bounded by proof (`t3c.certificate.sound`); None: not.
        tune_minutes: Time for measuring how the kernels of this network are best cut into loops; 0:
            none, the package's records for this machine hold, and else the families' rules.
        tune_folder: Where the search keeps what it found, and goes on when it is called again; with
            no minutes its records are used as they are. None: a folder of the user's cache for a
            search, else none.
        progress: Called with (what, done, total).
        say: Told every assumption, a line each; None: standard error.

    Returns:
        The artifact: `path`, `library`, and `manifest` with profiles, report and parity.

    Raises:
        ArtifactError: `out` exists and is no artifact.
        TargetError: Unknown target (the known ones are listed), tools are missing, kernels shall
            be tuned for another machine, or the target cannot serve the objective.
        CostModelError: The cost model is damaged, stale, or of another device.
        LoweringError: The graph does not fit the target.
        T3CError: `table` is damaged, or of another model, data or menu.
        ValueError: `keep` names no layer, `activations` is none of the three, `objective` none of
            the four, or `codes` neither of the two.
        ParityError: A profile does not compute what its torch reference computes.
    """
    if activations not in ACTIVATIONS:
        raise ValueError(
            f"activations is {activations!r}; allowed are {', '.join(map(repr, ACTIVATIONS))}"
        )
    static = ACTIVATIONS[activations]
    objective = parse_objective(objective)
    codes = parse_code_storage(codes)
    spec = targets.get(target) if isinstance(target, str) else target
    require(spec)
    check_objective(objective, spec)
    if tune_minutes > 0 and not proof.runs_here(spec):
        raise TargetError(
            f"tune_minutes={tune_minutes:g}: kernels are timed, and this machine is no "
            f"{spec.name!r}; lower there, or bring the folder of a search there as tune_folder"
        )
    where = Path(out) if out is not None else Path(f"{type(model).__name__.lower()}-{spec.name}")
    check_replaceable(where)  # before the work, not after it
    predict = _predictor(cost_model, spec, threads)
    notes = Notes(say)
    if isinstance(model, ElasticModel):
        elastic = model
    else:
        elastic = elasticize(
            model,
            example_inputs,
            example_kwargs=example_kwargs,
            include=include,
            exclude=exclude,
            conv=conv,
            factorizer=factorizer,
            tables=tables,
        )
    notes.add(*captured_of(elastic).notes)
    batches = calibration_calls(elastic, calibration, notes)
    fitted, held = held_out(batches)
    if fitted is batches:
        notes.add(
            "observed drift is in-sample: measured on inputs that the chain was fitted to, other "
            f"data will drift more; with {HELD_OUT_FROM} calibration inputs or more, the last "
            "quarter is kept for it"
        )
    chosen = planner(
        elastic,
        fitted,
        spec,
        profiles=profiles,
        seconds=plan_seconds,
        static=static,
        objective=objective,
        progress=progress,
        **({} if table is None else {"table": Path(table)}),
        **({"keep": tuple(keep)} if keep else {}),
        **({"share": True} if share_roles else {}),
        **({} if codes is CodeStorage.NESTED else {"codes": codes}),
        **predict,
    )
    notes.add(*chosen.notes)
    if domain is not None and any(elastic.corrections(p.formats) for p in chosen.chain):
        elastic.forget_corrections()  # the bounds do not know them
        notes.add("means and variances are again what cutting left of them: proofs know no others")
    chosen = _observed(elastic, chosen, held, notes, progress)
    tuned = _tuned(elastic, chosen, spec, tune_minutes, tune_folder, notes, progress)
    bench = Bench(elastic, spec, batches, calls, threads, notes, progress)
    with tempfile.TemporaryDirectory() as scratch:
        built = _build(elastic, chosen, spec, progress, tuned)
        manifest = described(elastic, chosen, built, spec, batches)
        manifest, session = bench.prove(manifest, built, Path(scratch) / "first")
        if session is not None and calls:
            judged = chosen.judged(bench.layers(chosen, built, session))
            if judged.chain != chosen.chain:
                notes.add(_lost(chosen, judged))
                _corrected(elastic, chosen, judged, fitted, plan_seconds)
                judged = _observed(elastic, judged, held, notes, progress)
                built = _build(elastic, judged, spec, progress, tuned)
                manifest = described(elastic, judged, built, spec, batches)
                manifest, session = bench.prove(manifest, built, Path(scratch) / "second")
            chosen = judged
        if session is not None and calls:
            manifest = bench.timed(manifest, session)
        manifest = _certified(manifest, elastic, chosen, fitted, progress)
        if domain is not None:
            proven = sound_certify(elastic, manifest.chain, domain)
            manifest = with_certificates(manifest, {p.name: p.certificate for p in proven})
        manifest = replace(manifest, gate=chosen.gate, assumptions=tuple(notes.lines))
        library = Path(scratch) / "model.so"
        built.save(library)
        if checks is not None:
            proving = Path(scratch) / "checks.so"
            built.save(proving, checks=True)
            bundle.write(Path(checks), manifest, proving, built.tensors)
            traces = {name: asdict(trace) for name, trace in built.traces.items()}
            (Path(checks) / "traces.json").write_text(json.dumps(traces))
        return bundle.write(where, manifest, library, built.tensors)


def _predictor(
    model: str | os.PathLike[str] | AbstractCostModel, spec: TargetSpec, threads: int | None
) -> dict[str, AbstractCostModel]:
    """The planner's argument `model`; none for the default, which any planner knows itself."""
    if model == "roofline":
        return {}
    if isinstance(model, AbstractCostModel):
        found = model
    elif str(model) in COST_MODELS:
        found = predictor(spec, str(model))
    else:
        found = LearnedModel.load(Path(model))
    if isinstance(found, LearnedModel):
        here = this_device(spec, threads or 1)
        if found.device is not None and not proof.runs_here(spec):
            # lowered for a device that this is not: what it is called tells nothing
            here = replace(here, cpu=found.device.cpu, features=found.device.features)
        found.check(here)
    return {"model": found}


def _lost(before: Plan, after: Plan) -> str:
    """What the measured gate took away, in a line."""
    lost = [r for r in after.gate if r.measured is not None and not r.kept]
    shown = "; ".join(r.reason for r in lost[:3]) + ("; ..." if len(lost) > 3 else "")
    return (
        f"{len(lost)} formats are not faster than dense on this machine and were left out, "
        f"{len(after.chain)} of {len(before.chain)} profiles remain: {shown}"
    )


def _observed(
    elastic: ElasticModel,
    chosen: Plan,
    held: Sequence[Batch],
    notes: Notes,
    progress: Progress | None,
) -> Plan:
    """The plan with the observed drift of every profile, and none that a smaller one dominates."""
    chain, drifts = observed.measured(elastic, chosen.chain, held, progress=progress)
    if not (found := inversions(drifts)):
        return replace(chosen, chain=chain)
    notes.add(*map(str, found))
    rest = chosen.without(found)
    return replace(rest, chain=observed.certify(elastic, rest.chain, held, progress=progress))


def _corrected(
    elastic: ElasticModel,
    before: Plan,
    after: Plan,
    fitted: Sequence[Batch],
    seconds: float | None,
) -> None:
    """Corrections for choices of formats that are new, if the earlier ones had any."""
    if not any(elastic.corrections(p.formats) for p in before.chain):
        return  # a planner of the caller's own that wants none, or nothing to correct
    new = [p.formats for p in after.chain if not elastic.corrections(p.formats)]
    correct(elastic, new, fitted, (SECONDS if seconds is None else seconds) / 4)


def _certified(
    manifest: Manifest,
    elastic: ElasticModel,
    chosen: Plan,
    fitted: Sequence[Batch],
    progress: Progress | None,
) -> Manifest:
    """The manifest with the proxy of every profile."""
    damage = {
        site: {fmt: entry.damage for fmt, entry in row.items()}
        for site, row in chosen.table.entries.items()
    }
    meter = Meter(elastic, fitted[:PROXY_INPUTS], seconds=PROXY_SECONDS, damage=damage)
    chain = with_proxies(manifest.chain, proxies(meter, manifest.chain, progress))
    return with_certificates(manifest, {p.name: p.certificate for p in chain})


def _build(
    elastic: ElasticModel,
    chosen: Plan,
    spec: TargetSpec,
    progress: Progress | None,
    tuned: Mapping[str, Schedule],
) -> Built:
    """Compile every profile of the chain."""
    corrections = {p.name: elastic.corrections(p.formats) for p in chosen.chain}
    return build(*_parts(elastic, chosen), spec, progress, tuned, corrections)


def _parts(
    elastic: ElasticModel, chosen: Plan
) -> tuple[
    ExportedProgram,
    Mapping[str, Site],
    Mapping[str, SiteCodes],
    Mapping[str, Mapping[str, Format]],
]:
    """Graph, sites, integer weights and profiles, as the compiler takes them."""
    used: dict[str, set[Format]] = {site: set() for site in elastic.sites}
    for profile in chosen.chain:
        for site, fmt in profile.formats.items():
            used[site].add(fmt)
    graph = lowering_graph(elastic.graph)
    return (
        torch.export.export(graph, elastic.example_inputs, strict=False),
        elastic.sites,
        {site: elastic.codes(site, formats) for site, formats in used.items()},
        {p.name: p.formats for p in chosen.chain},
    )


def _tuned(
    elastic: ElasticModel,
    chosen: Plan,
    spec: TargetSpec,
    minutes: float,
    folder: str | os.PathLike[str] | None,
    notes: Notes,
    progress: Progress | None,
) -> Mapping[str, Schedule]:
    """Schedules that were tuned for this network; none where nobody asked for them."""
    if minutes <= 0:
        if folder is None:
            return {}
        schedules, skipped = tuned_schedules(spec, Path(folder) / RECORDS)
        notes.add(*skipped)
        return schedules
    ops = operators(*_parts(elastic, chosen), spec)
    if not ops:
        notes.add(f"nothing to tune: the kernels of {spec.name!r} have no choices")
        return {}
    where = Path(folder) if folder is not None else _cache() / "tune" / spec.linear
    return tune(ops, spec, where, minutes, progress or (lambda *_: None), notes.add)


def _cache() -> Path:
    """The user's cache folder of T3C."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "t3c"
