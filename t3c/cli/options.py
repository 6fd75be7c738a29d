"""Options and arguments that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no remarks.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Folder = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder that `t3c lower` wrote.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads of each call; else as its times were measured."),
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
