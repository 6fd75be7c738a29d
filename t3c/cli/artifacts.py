"""Commands that read artifacts or write new ones from them: inspect, export, pack, unpack."""

from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from t3c.cli.console import command
from t3c.cli.options import Debug, Folder, Json, Quiet
from t3c.core.artifact import Artifact
from t3c.report import tables
from t3c.runtime import transfer
from t3c.runtime.export import export as export_profiles
from t3c.runtime.storage import storage


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
            console.show(policy_line(found))
        for text in () if quiet else manifest.assumptions:
            console.show(f"assumed {text}")
        console.data(manifest.to_json())


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


def policy_line(artifact: Artifact) -> str:
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
