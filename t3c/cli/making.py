"""Commands that need the model itself: lower, certify, policy."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from t3c import targets
from t3c.cli.artifacts import policy_line
from t3c.cli.console import command, progress
from t3c.cli.inputs import arguments, example_inputs, load_calls, load_labelled, load_model
from t3c.cli.options import Debug, Folder, Json, Quiet
from t3c.core.artifact import Artifact
from t3c.core.objective import parse_objective
from t3c.report import tables


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
        with progress(console) as told:
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
                progress=told,
                say=console.remark,
            )
        console.show(tables.profiles(artifact.manifest.profiles, str(artifact.manifest)))
        console.show(f"wrote {artifact.path}")
        console.data({"artifact": str(artifact.path), "manifest": artifact.manifest.to_json()})


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
        with progress(console) as told:
            found: Artifact = api.certify(
                artifact,
                original,
                data,
                labels=labels,
                shifted=other,
                teaching=teachers,
                progress=told,
                say=console.remark,
                **wanted,
            )
        console.show(*tables.certificates(found.manifest.profiles))
        console.data({"artifact": str(found.path), "manifest": found.manifest.to_json()})


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
        with progress(console) as told:
            found: Artifact = api.fit_policy(
                artifact,
                original,
                data,
                looks=looks,
                time_price=time_price,
                progress=told,
                say=console.remark,
            )
        console.show(policy_line(found))
        console.data({"artifact": str(found.path), "policy": found.manifest.policy})
