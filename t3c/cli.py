"""The command line: what each command takes, and its exit codes; the work is done elsewhere."""

import json
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from t3c import targets
from t3c.cli_inputs import (
    arguments,
    example_inputs,
    invent_inputs,
    load_calls,
    load_labelled,
    load_model,
    read_npz,
)
from t3c.core.artifact import Artifact
from t3c.core.budget import LEVEL, Budget, Selector, costs, drift_bound
from t3c.core.errors import (
    ArtifactError,
    CostModelError,
    InfeasibleBudget,
    ParityError,
    T3CError,
    TargetError,
)
from t3c.core.explain import Explanation, doubts, explain
from t3c.core.manifest import Manifest
from t3c.core.objective import parse_objective
from t3c.core.structure import flatten
from t3c.report import tables
from t3c.runtime import transfer
from t3c.runtime.export import export as export_profiles
from t3c.runtime.storage import storage

EXIT_CODES = """
Exit codes: 0 ok, 1 failed, 2 wrong usage or input, 3 no profile fits the budget, 4 library and
torch reference disagree, 5 artifact, measurements or cost
model damaged or stale, 6 something this machine lacks.
"""
_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (InfeasibleBudget, 3),
    (ParityError, 4),
    (ArtifactError, 5),
    (CostModelError, 5),
    (TargetError, 6),
    (ImportError, 6),
    (ValueError, 2),
    (TypeError, 2),
)

app = typer.Typer(
    name="t3c",
    help="Budget-elastic neural networks: one library per device, every budget already in it.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Folder = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder that `t3c lower` wrote.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of each call; else the cores it may use.")
]
Latency = Annotated[float | None, typer.Option(help="Budget: p95 of one call.")]
Joules = Annotated[float | None, typer.Option(help="Budget: energy of one call.")]
Size = Annotated[float | None, typer.Option(help="Budget: stored weights, 10^6 B.")]
Ram = Annotated[float | None, typer.Option(help="Budget: memory, 10^6 B.")]
MaxDrift = Annotated[
    float | None, typer.Option(help="Budget: bound on the drift of one input's outputs.")
]
Level = Annotated[
    float | None, typer.Option(help="Share of inputs that the calibrated bound holds for; 0.9.")
]
Kind = Annotated[
    Literal["calibrated", "sound"], typer.Option(help="Which bound --max-drift compares.")
]
AnyFamily = Annotated[bool, typer.Option("--any-family", help="Even from another instruction set.")]
Inputs = Annotated[
    Path | None,
    typer.Option("--inputs", help="npz file: input name -> array. Default: invented, seed 0."),
]


@dataclass(frozen=True, slots=True)
class Out:
    """Where a command writes.

    Attributes:
        as_json: One JSON object on stdout.
        quiet: Neither progress nor remarks.
    """

    as_json: bool
    quiet: bool

    def show(self, *parts: object) -> None:
        """Results for people, on stdout; tables or text."""
        if not self.as_json:
            wide = None if sys.stdout.isatty() else 200
            Console(width=wide, highlight=False).print(*parts)

    def data(self, value: Mapping[str, object]) -> None:
        """Results for programs, on stdout."""
        if self.as_json:
            print(json.dumps(value, indent=1, allow_nan=False))

    def remark(self, text: str) -> None:
        """What was assumed, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr)


@contextmanager
def command(as_json: bool, quiet: bool, debug: bool) -> Generator[Out]:
    """Turn every error into one line on stderr and the exit code that belongs to it."""
    try:
        yield Out(as_json, quiet)
    except (typer.Exit, typer.BadParameter):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = exit_code(error)
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"t3c: {text}", file=sys.stderr)
        if as_json:
            print(json.dumps(_error_json(error, text, code), indent=1))
        raise typer.Exit(code) from None


def exit_code(error: BaseException) -> int:
    """The exit code of an error; see EXIT_CODES."""
    if type(error) is T3CError:  # a bad name or spelling, not a failed step
        return 2
    if isinstance(error, T3CError) and not isinstance(
        error, InfeasibleBudget | ParityError | ArtifactError | CostModelError | TargetError
    ):
        return 1
    return next((code for kind, code in _CODES if isinstance(error, kind)), 1)


@app.command(epilog=EXIT_CODES)
def lower(
    model: Annotated[
        str,
        typer.Argument(
            help="module:callable that returns (model, example inputs) or (model, example inputs, "
            "list of calls with real data), or a .pt2 exported program."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the artifact.")],
    target: Annotated[
        str, typer.Option("--target", "-t", help="Device family; `t3c doctor` lists them.")
    ] = "x86",
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", help="npz file with example inputs: name -> array."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape", help="Shape of one float32 example input, 1,3,224,224; repeatable."
        ),
    ] = None,
    profiles: Annotated[int, typer.Option(min=1, help="Profiles of the chain, at most.")] = 8,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Glob: only these layers; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Glob: not these layers; repeatable.")
    ] = None,
    activations: Annotated[
        Literal["auto", "static", "dynamic"],
        typer.Option(help="How convolutions round inputs: fixed grids, or each image's range."),
    ] = "auto",
    objective: Annotated[
        str,
        typer.Option(
            help="What profiles are chosen to save: latency, macs, bytes, energy (estimated "
            "without a meter), or several, latency+bytes."
        ),
    ] = "latency",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            help="Role (head, stem, query, up, ...) or glob of layers that stay dense; repeatable.",
        ),
    ] = None,
    share_roles: Annotated[
        bool, typer.Option(help="Layers of one role and shape have one format in each profile.")
    ] = False,
    codes: Annotated[
        Literal["nested", "independent"],
        typer.Option(help="Layers of 8 and of 4 bits: one array for both, or one for each."),
    ] = "nested",
    table: Annotated[
        Path | None,
        typer.Option(
            help="File of the measured damage table: a killed run goes on, a finished one is read."
        ),
    ] = None,
    cost_model: Annotated[
        str,
        typer.Option(help="roofline, or the file of a model that `t3c fit` wrote for this device."),
    ] = "roofline",
    tune_minutes: Annotated[
        float,
        typer.Option(
            min=0, help="Time for finding better schedules of the kernels on this machine."
        ),
    ] = 0.0,
    tune_folder: Annotated[
        Path | None,
        typer.Option(
            help="Where a search keeps its trials and goes on; no minutes: its records are used."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compile a model, with every budget, into an artifact folder."""
    with command(as_json, quiet, debug) as console:
        targets.get(target)  # a wrong name is told before torch is loaded
        goal = parse_objective(objective)
        network, example, calibration = load_model(model)
        args, kwargs = example_inputs(inputs, shape) or arguments(example)
        api: Any = import_module("t3c.api")
        with _progress(console) as progress:
            artifact: Artifact = api.lower(
                network,
                target,
                args,
                out,
                example_kwargs=kwargs,
                calibration=calibration,
                profiles=profiles,
                include=include or ("*",),
                exclude=exclude or (),
                activations=activations,
                objective=goal,
                codes=codes,
                keep=keep or (),
                share_roles=share_roles,
                table=table,
                cost_model=cost_model,
                tune_minutes=tune_minutes,
                tune_folder=tune_folder,
                progress=progress,
                say=console.remark,
            )
        console.show(tables.profiles(artifact.manifest.profiles, str(artifact.manifest)))
        console.show(f"wrote {artifact.path}")
        console.data({"artifact": str(artifact.path), "manifest": artifact.manifest.to_json()})


@app.command(epilog=EXIT_CODES)
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
            np.savez(outputs, **named)
        rows = [
            {"output": name, "shape": list(value.shape), "dtype": str(value.dtype)}
            for name, value in named.items()
        ]
        console.show(tables.plain(rows))
        console.show(f"profile {session.profile.name}: {seconds * 1e3:.3f} ms")
        console.data({"profile": session.profile.name, "seconds": seconds, "outputs": rows})


@app.command(epilog=EXIT_CODES)
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


@app.command(epilog=EXIT_CODES)
def inspect(
    artifact: Folder,
    layers: Annotated[bool, typer.Option("--layers", help="Format of every layer.")] = False,
    gate: Annotated[
        bool, typer.Option("--gate", help="Every format that was considered, with its times.")
    ] = False,
    drift: Annotated[
        bool, typer.Option("--drift", help="Share of every layer in the drift of each profile.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture to write: drift against latency and bytes, with intervals."),
    ] = None,
    certificates: Annotated[
        bool, typer.Option("--certificates", help="Bounds, draws, shifted data, labels.")
    ] = False,
    stored: Annotated[
        bool, typer.Option("--storage", help="Bytes that each profile reads of the weights.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what an artifact says of itself: profiles, drift, layers. Needs no TVM."""
    with command(as_json, quiet, debug) as console:
        found = Artifact.read(artifact)
        found.verify()
        manifest = found.manifest
        console.show(tables.profiles(manifest.profiles, str(manifest)))
        if layers:
            console.show(tables.layers(manifest.chain.profiles))
        if gate:
            console.show(tables.gate(manifest.gate))
        if drift:
            console.show(tables.drift(manifest.profiles))
        if certificates:
            shown = tables.certificates(manifest.profiles)
            console.show(*(shown if shown else ("no certificate yet; see `t3c certify`",)))
        if stored:
            title = f"Bytes of the weight file, codes {manifest.codes}"
            console.show(tables.storage(storage(found), title))
        if plot is not None:
            plots: Any = import_module("t3c.report.plots")
            title = f"{manifest.target.name} ({manifest.target.mcpu})"
            console.show(f"wrote {plots.chain(plots.drifts(manifest.chain.profiles), plot, title)}")
        console.show(tables.conversion(manifest.report))
        if manifest.policy is not None:
            console.show(_policy(found))
        for text in () if quiet else manifest.assumptions:
            console.show(f"assumed {text}")
        console.data(manifest.to_json())


@app.command(epilog=EXIT_CODES)
def export(
    artifact: Folder,
    profile: Annotated[list[str], typer.Option(help="A profile to keep; may be given again.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the small artifact.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write an artifact with some of the profiles and the weights that they read. Needs no TVM."""
    with command(as_json, quiet, debug) as console:
        small = export_profiles(artifact, profile, out)
        console.show(tables.storage(storage(small), f"Weights of {small.path}"))
        console.data({"artifact": str(small.path), "weight_bytes": small.weights.stat().st_size})


@app.command(epilog=EXIT_CODES)
def pack(
    artifact: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="The archive, a zip file.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress an artifact into one file for transfer; see both byte counts."""
    with command(as_json, quiet, debug) as console:
        rows = transfer.pack(artifact, out)
        console.show(tables.packed(rows, f"{out}"))
        console.data({"archive": str(out), "files": [asdict(row) for row in rows]})


@app.command(epilog=EXIT_CODES)
def unpack(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="What `t3c pack` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the artifact.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the artifact that an archive holds, every file checked by its hash."""
    with command(as_json, quiet, debug) as console:
        found = transfer.unpack(archive, out)
        console.show(f"{found.path}: {found.manifest}")
        console.data({"artifact": str(found.path)})


@app.command(epilog=EXIT_CODES)
def certify(
    artifact: Folder,
    model: Annotated[
        str,
        typer.Argument(
            help="The original model with held-out data: module:callable that returns (model, "
            "example inputs, list of calls), or with a fourth part, the right class of each input."
        ),
    ],
    shifted: Annotated[
        str | None,
        typer.Option(
            help="module:callable that returns a list of calls with data of another kind; the "
            "bounds' coverage of them is measured."
        ),
    ] = None,
    teaching: Annotated[
        str | None,
        typer.Option(
            help="module:callable that returns a list of calls that teach what outputs say of "
            "drift; data from training will do. Default: half of the held-out inputs teach."
        ),
    ] = None,
    level: Annotated[
        list[float] | None,
        typer.Option(help="Share of inputs to cover; repeatable. Default: 0.9 0.95 0.99."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Bound the drift of every profile from held-out inputs; the artifact keeps the bounds."""
    with command(as_json, quiet, debug) as console:
        original, _, data, labels = load_labelled(model)
        if data is None:
            raise ValueError(
                f"{model!r} returns no data; return (model, example inputs, list of calls), with "
                "inputs that were used neither for calibration nor for training"
            )
        other = None if shifted is None else load_calls(shifted)
        teachers = None if teaching is None else load_calls(teaching)
        api: Any = import_module("t3c.api")
        wanted = {} if not level else {"levels": tuple(sorted(set(level)))}
        with _progress(console) as progress:
            found: Artifact = api.certify(
                artifact,
                original,
                data,
                labels=labels,
                shifted=other,
                teaching=teachers,
                progress=progress,
                say=console.remark,
                **wanted,
            )
        console.show(*tables.certificates(found.manifest.profiles))
        console.data({"artifact": str(found.path), "manifest": found.manifest.to_json()})


@app.command(epilog=EXIT_CODES)
def policy(
    artifact: Folder,
    model: Annotated[
        str,
        typer.Argument(
            help="The original model with data: module:callable that returns (model, example "
            "inputs, list of calls)."
        ),
    ],
    looks: Annotated[
        bool, typer.Option("--looks", help="Inputs may choose less than a budget allows.")
    ] = False,
    time_price: Annotated[
        float,
        typer.Option(
            min=0,
            help="With --looks: worth of the largest profile's time, in units of the smallest "
            "profile's drift.",
        ),
    ] = 0.5,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fit a learned policy from budgets to profiles; the artifact keeps it. See `run --policy`."""
    with command(as_json, quiet, debug) as console:
        original, _, data = load_model(model)
        if data is None:
            raise ValueError(
                f"{model!r} returns no data; return (model, example inputs, list of calls)"
            )
        api: Any = import_module("t3c.api")
        with _progress(console) as progress:
            found: Artifact = api.fit_policy(
                artifact,
                original,
                data,
                looks=looks,
                time_price=time_price,
                progress=progress,
                say=console.remark,
            )
        console.show(_policy(found))
        console.data({"artifact": str(found.path), "policy": found.manifest.policy})


@app.command(epilog=EXIT_CODES)
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


@app.command(epilog=EXIT_CODES)
def measure(
    out: Annotated[Path, typer.Option("--out", "-o", help="File of rows; gone on with.")] = Path(
        "rows.jsonl"
    ),
    device: Annotated[
        str,
        typer.Option(help="local, host:port[,host:port] or tracker://host:port/key (TVM's RPC)."),
    ] = "local",
    minutes: Annotated[float, typer.Option(min=0, help="Time for all; 0: no limit.")] = 10.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a call.")] = 1,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Of the kernels; else this machine's.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What to call a remote device; none: it is this machine.")
    ] = None,
    key: Annotated[str, typer.Option(help="Key of RPC servers.")] = "",
    kernels: Annotated[
        int | None, typer.Option(min=1, help="Layers to measure, about; 480, or 40 to transfer.")
    ] = None,
    transfer_from: Annotated[
        Path | None,
        typer.Option(help="Model of another device: measure the few rows that adapt it."),
    ] = None,
    any_family: AnyFamily = False,
    energy: Annotated[
        bool, typer.Option(help="Measure energy, too, where this machine has a meter.")
    ] = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time layers and small networks, for a cost model; a killed run goes on."""
    with command(as_json, quiet, debug) as console:
        run: Any = import_module("t3c.measurement.run")
        plan, source = _to_measure(run, kernels, transfer_from, target, any_family)
        with _progress(console) as progress:
            found = run.measure_on(
                device,
                out,
                minutes=minutes,
                threads=threads,
                target=target,
                name=name,
                key=key,
                plan=plan,
                source=source,
                meter=import_module("t3c.cost_models.meters").processor_meter() if energy else None,
                progress=progress,
                say=console.remark,
            )
        count = {
            "kernels": len(found.kernels),
            "profiles": len(found.profiles),
            "energies": len(found.kernel_energies) + len(found.profile_energies),
            "meter": None if found.meter is None else found.meter[0],
        }
        console.show(f"{out}: {count['kernels']} kernels, {count['profiles']} profiles")
        if found.meter is not None:
            console.show(f"{count['energies']} energies by {found.meter[0]}")
        console.data({"rows": str(out), "device": found.device.to_json(), **count})


def _to_measure(
    run: Any, kernels: int | None, base: Path | None, target: str | None, any_family: bool
) -> tuple[Any, Any]:
    """What to measure, and the device whose model will be transferred; None: no other's."""
    if base is None:
        return run.Plan(kernels=480 if kernels is None else kernels), None
    learned: Any = import_module("t3c.cost_models.learned")
    targets = import_module("t3c.targets")
    spec = targets.detect_host() if target is None else targets.get(target)
    model = learned.LearnedModel.load(base)
    import_module("t3c.cost_models.transfer").check(model, spec, any_family=any_family)
    plan = run.Plan(40 if kernels is None else kernels, run.FEW_NETWORKS, few=True)
    return plan, model.device


@app.command(epilog=EXIT_CODES)
def fit(
    rows: Annotated[Path, typer.Argument(metavar="ROWS", help="File that `t3c measure` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File of the model.")] = Path(
        "model.json"
    ),
    report: Annotated[
        bool, typer.Option(help="Judge it on shapes and networks that it has not seen.")
    ] = True,
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture of predicted against measured times of what it had not seen."),
    ] = None,
    transfer_from: Annotated[
        Path | None,
        typer.Option(help="Model of another device, which these few rows adapt to this one."),
    ] = None,
    any_family: AnyFamily = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fit a cost model to measured rows, for `t3c lower --cost-model`."""
    with command(as_json, quiet, debug) as console:
        device: Any = import_module("t3c.cost_models.device")
        learned: Any = import_module("t3c.cost_models.learned")
        data = import_module("t3c.cost_models.dataset").Dataset.read(rows, console.remark)
        spec = device.target_of(data.device)
        judge: Any = import_module("t3c.cost_models.scores")
        scores: dict[str, Any] = {}
        if transfer_from is None:
            model = learned.LearnedModel.learn(data, spec)
            model.save(out)
            judge_it = partial(judge.report, data, spec)
        else:
            base = learned.LearnedModel.load(transfer_from)
            move: Any = import_module("t3c.cost_models.transfer")
            model = move.transfer(
                base, data.kernels, data.profiles, spec, data.device, any_family=any_family
            )
            model = replace(model, metered=learned.learn_energy(data, spec))
            model.save(out)
            judge_it = partial(judge.transfer_report, base, data, spec, any_family=any_family)
        if data.meter is not None and model.metered is None:
            console.remark(learned.energy_lacks(data))
        if report or plot is not None:
            judged: Any = judge_it()
            scores = judged.to_json()
        for what, found in scores.items():
            lines = [{"model": name, **score} for name, score in found.items()]
            console.show(tables.plain(lines, f"on {what} that were left out"))
        console.show(f"wrote {out}")
        if plot is not None:
            plots = import_module("t3c.report.plots")
            console.show(f"wrote {plots.predictions(judged.guesses(), plot, str(rows))}")
        console.data({"model": str(out), "scores": scores})


@app.command(epilog=EXIT_CODES)
def doctor(as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Say what works on this machine and what to do."""
    with command(as_json, quiet, debug) as console:
        module = import_module("t3c.report.doctor")
        checks = module.examine()
        healthy = module.healthy(checks)
        console.show(module.table(checks))
        console.show("models can be lowered and run here" if healthy else "see what is missing")
        console.data({"healthy": healthy, "checks": [check.to_json() for check in checks]})
        if not healthy:
            raise typer.Exit(6)


def main() -> None:
    """Entry point of the `t3c` command."""
    app()


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


def _policy(artifact: Artifact) -> str:
    """What an artifact's policy is, in a line; empty: there is none."""
    policy: Any = import_module("t3c.runtime.policy")
    if (found := policy.stored(artifact)) is None:
        return ""
    looks = "budgets alone"
    if found.content is not None:
        own = sum(floor < k for k, floor in enumerate(found.floors))
        looks = (
            f"budgets and inputs ({own} of {found.profiles} profiles; a look takes "
            f"{found.look_s * 1e6:.0f} us)"
        )
    stale = "" if policy.fits(artifact.manifest.chain, found) else "; stale: costs have changed"
    return f"policy: {found.parameters} numbers, {', '.join(found.components)}, from {looks}{stale}"


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


@contextmanager
def _progress(console: Out) -> Generator[Callable[[str, int, int], None]]:
    """A bar with the time left; nothing where stderr is no terminal."""
    target = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    silent = console.quiet or not target.is_terminal
    with Progress(*columns, console=target, disable=silent, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(description: str, done: int, total: int) -> None:
            if description not in tasks:
                tasks[description] = bars.add_task(description, total=total)
            bars.update(tasks[description], completed=done, total=total)

        yield report


def _error_json(error: Exception, text: str, code: int) -> dict[str, object]:
    found: dict[str, object] = {"error": type(error).__name__, "message": text, "exit_code": code}
    if isinstance(error, InfeasibleBudget):
        found |= {"failing": list(error.failing), "minimum": dict(error.minimum)}
    return found
