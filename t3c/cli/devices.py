"""Commands about the machine: doctor, measure, fit."""

from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from t3c.cli.console import command, progress
from t3c.cli.options import AnyFamily, Debug, Json, Quiet
from t3c.report import tables


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
        with progress(console) as told:
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
                progress=told,
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
        judged: list[Any] = [judge_it()] if report or plot is not None else []
        scores: dict[str, Any] = judged[0].to_json() if judged else {}
        for what, found in scores.items():
            lines = [{"model": name, **score} for name, score in found.items()]
            console.show(tables.plain(lines, f"on {what} that were left out"))
        console.show(f"wrote {out}")
        if plot is not None:
            plots = import_module("t3c.report.plots")
            console.show(f"wrote {plots.predictions(judged[0].guesses(), plot, str(rows))}")
        console.data({"model": str(out), "scores": scores})


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
