"""The command line: what each command takes, and its exit codes; the work is done elsewhere."""

import typer

from t3c.cli.artifacts import export, inspect, pack, unpack
from t3c.cli.console import EXIT_CODES, exit_code
from t3c.cli.devices import doctor, fit, measure
from t3c.cli.making import certify, lower, policy
from t3c.cli.using import bench, plan, run

__all__ = ["app", "exit_code", "main"]

app = typer.Typer(
    name="t3c",
    help="Budget-elastic neural networks: one library per device, every budget already in it.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for one in (
    lower,
    run,
    plan,
    inspect,
    export,
    pack,
    unpack,
    certify,
    policy,
    bench,
    measure,
    fit,
    doctor,
):
    app.command(epilog=EXIT_CODES)(one)


def main() -> None:
    """Entry point of the `t3c` command."""
    app()
