"""Commands that ask a budget or call a library: run, plan, bench."""

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer

from t3c.cli.console import Out, command
from t3c.cli.inputs import invent_inputs, read_npz, write_npz
from t3c.cli.options import (
    Debug,
    Folder,
    Inputs,
    Joules,
    Json,
    Kind,
    Latency,
    Level,
    MaxDrift,
    Quiet,
    Ram,
    Size,
    Threads,
)
from t3c.core.artifact import Artifact
from t3c.core.budget import LEVEL, Budget, Selector, costs, drift_bound
from t3c.core.explain import Explanation, doubts, explain
from t3c.core.manifest import Manifest
from t3c.core.structure import flatten
from t3c.report import tables


def run(
    artifact: Folder,
    profile: Annotated[str | None, typer.Option("--profile", "-p", help="Profile by name.")] = None,
    latency_ms: Latency = None,
    energy_mj: Joules = None,
    size_mb: Size = None,
    ram_mb: Ram = None,
    max_drift: MaxDrift = None,
    level: Level = None,
    drift: Kind = "calibrated",
    inputs: Inputs = None,
    outputs: Annotated[Path | None, typer.Option("--outputs", help="npz file to write.")] = None,
    threads: Threads = None,
    by_policy: Annotated[
        bool,
        typer.Option(
            "--policy", help="The artifact's policy picks, and looks at the inputs if it does so."
        ),
    ] = False,
    govern: Annotated[
        float | None,
        typer.Option(help="Call it for so many seconds, the profile by what calls really take."),
    ] = None,
    percentile: Annotated[
        float, typer.Option(help="With --govern: share of calls that must keep --latency-ms.")
    ] = 95.0,
    metrics: Annotated[
        Path | None, typer.Option(help="With --govern: Prometheus text file to write.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run one profile, by name or by budget; or many calls under a governed budget."""
    with command(as_json, quiet, debug) as console:
        limits = {
            "latency_ms": latency_ms,
            "energy_mj": energy_mj,
            "size_mb": size_mb,
            "ram_mb": ram_mb,
            "max_drift": max_drift,
            "level": level,
        }
        budget = {name: limit for name, limit in limits.items() if limit is not None}
        if profile is not None and budget:
            raise ValueError(f"--profile and a budget ({', '.join(budget)}) exclude each other")
        if govern is None and metrics is not None:
            raise ValueError("--metrics goes with --govern SECONDS")
        if govern is not None and (profile is not None or outputs is not None):
            raise ValueError("--govern takes a budget, not --profile, and writes no --outputs")
        if by_policy and (govern is not None or not budget):
            raise ValueError("--policy goes with a budget, and not with --govern")
        session = _open(artifact, threads, by_policy)
        if govern is not None:
            given = _inputs(session.manifest, inputs, console)
            wanted = {**budget, "percentile": percentile, "drift": drift}
            _govern(console, session, given, govern, metrics, wanted)
            return
        given = _inputs(session.manifest, inputs, console)
        if profile is not None:
            session.set_profile(profile)
        if budget:
            seen = given if by_policy and session.policy.content is not None else None
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                session.set_budget(**budget, drift=drift, inputs=seen)
            for warning in told:
                console.remark(str(warning.message))
        session(**given)
        start = time.perf_counter()
        result = session(**given)
        seconds = time.perf_counter() - start
        flat = flatten(session.manifest.output_tree, result, "outputs")
        named = {s.name: v for s, v in zip(session.manifest.outputs, flat, strict=True)}
        if outputs is not None:
            write_npz(outputs, named)
        rows = [
            {"output": name, "shape": list(value.shape), "dtype": str(value.dtype)}
            for name, value in named.items()
        ]
        console.show(tables.plain(rows))
        console.show(f"profile {session.profile.name}: {seconds * 1e3:.3f} ms")
        console.data({"profile": session.profile.name, "seconds": seconds, "outputs": rows})


def plan(
    artifact: Folder,
    latency_ms: Latency = None,
    energy_mj: Joules = None,
    size_mb: Size = None,
    ram_mb: Ram = None,
    percentile: Annotated[
        Literal["p50", "p95"], typer.Option(help="Which latency --latency-ms compares.")
    ] = "p95",
    max_drift: MaxDrift = None,
    level: Level = None,
    drift: Kind = "calibrated",
    why: Annotated[
        bool, typer.Option("--explain", help="What each limit leaves, and which one binds.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say which profile a budget picks: the largest within its costs. Needs no TVM.

    With --max-drift alone, the smallest whose bound keeps it. With both, the largest within the
    costs, refused where its bound is above.
    """
    with command(as_json, quiet, debug) as console:
        budget = Budget(latency_ms, energy_mj, size_mb, ram_mb, percentile, max_drift, level, drift)
        found = Artifact.read(artifact)
        found.verify()
        selector = Selector(found.manifest.chain)
        told = explain(selector, budget) if why else None
        if told is not None and told.profile is None:
            console.show(_limits(told))
        chosen = selector.select(budget)
        for text in doubts(chosen, budget):
            console.remark(text)
        row: dict[str, object] = {"profile": chosen.name}
        row |= {n: v if v < math.inf else None for n, v in costs(chosen, percentile).items()}
        if max_drift is not None:
            row["drift_bound"] = drift_bound(chosen, drift, LEVEL if level is None else level)
        shown = {n: tables.UNKNOWN if v is None else v for n, v in row.items()}
        console.show(tables.plain([shown], f"budget {budget}"))
        if told is not None:
            console.show(_limits(told), str(told))
            row["explanation"] = told.to_json()
        row["latency"] = None if chosen.latency is None else asdict(chosen.latency)
        console.data({"budget": str(budget), **row})


def bench(
    artifact: Folder,
    calls: Annotated[int, typer.Option(help="Timed calls of each profile.")] = 200,
    warmup: Annotated[int, typer.Option(help="Calls before, not timed.")] = 10,
    inputs: Inputs = None,
    threads: Threads = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--record",
            help="Time in five fresh processes, and write into the artifact what budgets compare: "
            "the p95 that another process stays below (with 99 %).",
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time all profiles, call by call in turn."""
    with command(as_json, quiet, debug) as console:
        if keep:
            _record(console, artifact, inputs, calls, threads)
            return
        session = _open(artifact, threads)
        given = _inputs(session.manifest, inputs, console)
        names = [profile.name for profile in session.profiles]
        samples = session.samples(names, given, calls, warmup)
        summarize = import_module("t3c.runtime.session").summarize
        rows = [
            tables.BenchRow(
                name,
                summarize(times, session.threads),
                float(np.percentile(times, 90)),
                float(np.min(times)),
            )
            for name, times in samples.items()
        ]
        console.show(tables.bench(rows, f"{session.manifest.target.name}, calls interleaved"))
        console.data({"profiles": [row.to_json() for row in rows]})


def _record(console: Out, path: Path, inputs: Path | None, calls: int, threads: int | None) -> None:
    """Measure in fresh processes and keep it."""
    artifact = Artifact.read(path)
    artifact.verify()
    module: Any = import_module("t3c.runtime.record")
    given = _inputs(artifact.manifest, inputs, console)
    each = max(20, calls // module.PROCESSES)
    found = module.record(artifact, given, calls=each, threads=threads)
    console.show(tables.profiles(found.manifest.profiles, str(found.manifest)))
    console.data({"artifact": str(found.path), "manifest": found.manifest.to_json()})


def _limits(told: Explanation) -> Any:
    """A table: each limit, what it is compared with, and whether it binds."""
    picked = "smallest feasible" if told.profile is None else told.profile
    rows: list[dict[str, object]] = []
    for row in told.limits:
        cells: dict[str, object] = {"limit": row.component, "budget": row.limit}
        cells[picked] = tables.UNKNOWN if row.cost is None else row.cost
        if told.next is not None:
            cells[told.next] = tables.UNKNOWN if row.next_cost is None else row.next_cost
        cells["binds" if told.profile else "fails"] = "yes" if row.binding else ""
        rows.append(cells)
    return tables.plain(rows)


def _govern(
    console: Out,
    session: Any,
    given: Mapping[str, Any],
    seconds: float,
    metrics: Path | None,
    budget: Mapping[str, Any],
) -> None:
    """Call a session under a governor for some time, and tell what happened."""
    if not 0.0 < seconds < float("inf"):
        raise ValueError(f"--govern {seconds}: give a positive number of seconds")
    govern: Any = import_module("t3c.runtime.governor").govern
    with govern(session, **budget) as governor:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            governor(**given)
        found = governor.statistics()
        if metrics is not None:
            metrics.write_text(governor.prometheus())
    rows = [
        {
            "profile": name,
            "calls": row["calls"],
            "mean ms": row["seconds"] / row["calls"] * 1e3,
            "over budget": row["over_budget"],
        }
        for name, row in found["profiles"].items()
        if row["calls"]
    ]
    console.show(tables.plain(rows))
    console.show(
        f"{found['over_budget']} of {found['calls']} calls over the budget, "
        f"{found['switches']} switches, slowdown {found['slowdown']:.2f}"
    )
    console.data(found)


def _open(path: Path, threads: int | None, policy: bool = False) -> Any:
    return import_module("t3c.runtime.session").load(path, threads=threads, policy=policy)


def _inputs(manifest: Manifest, path: Path | None, console: Out) -> dict[str, Any]:
    if path is None:
        console.remark("no --inputs: invented ones (normal numbers or ones, seed 0)")
        return invent_inputs(manifest)
    return read_npz(path)
