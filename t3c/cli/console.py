"""What every command writes, and the exit code of every error."""

import json
import sys
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from t3c.core.errors import (
    ArtifactError,
    CostModelError,
    InfeasibleBudget,
    ParityError,
    T3CError,
    TargetError,
)

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
    (FileNotFoundError, 2),
    (FileExistsError, 2),
    (IsADirectoryError, 2),
    (NotADirectoryError, 2),
    (PermissionError, 2),
)


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
        text = " ".join(_words(error).split()) or type(error).__name__
        print(f"t3c: {text}", file=sys.stderr)
        if as_json:
            print(json.dumps(_error_json(error, text, code), indent=1))
        raise typer.Exit(code) from None


def _words(error: Exception) -> str:
    """What it says; of a file, the path first."""
    if not isinstance(error, OSError) or not error.strerror or error.filename is None:
        return str(error)
    path = error.filename if error.filename2 is None else error.filename2
    return f"{path}: {error.strerror}"


def exit_code(error: BaseException) -> int:
    """The exit code of an error; see EXIT_CODES."""
    if type(error) is T3CError:  # a bad name or spelling, not a failed step
        return 2
    if isinstance(error, T3CError) and not isinstance(
        error, InfeasibleBudget | ParityError | ArtifactError | CostModelError | TargetError
    ):
        return 1
    return next((code for kind, code in _CODES if isinstance(error, kind)), 1)


@contextmanager
def progress(console: Out) -> Generator[Callable[[str, int, int], None]]:
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
