"""What the command line is told, made into models, calls and inputs."""

import io
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np

from t3c.core.artifact import write_atomic
from t3c.core.errors import T3CError
from t3c.core.manifest import Manifest

Calls = Sequence[tuple[object, ...]]


def load_model(spec: str) -> tuple[object, object, Calls | None]:
    """A model, its example inputs and its calibration calls, as they were given.

    Args:
        spec: ``module:callable`` that returns them, or the path of a ``.pt2`` exported program.

    Returns:
        The third is None where there is none.

    Raises:
        ValueError: The text names neither.
    """
    return load_labelled(spec)[:3]


def load_labelled(spec: str) -> tuple[object, object, Calls | None, object]:
    """As `load_model`, and the right class of each input, None where there is none.

    Raises:
        ValueError: As `load_model`.
    """
    if spec.endswith(".pt2"):
        if not Path(spec).is_file():
            raise ValueError(f"{spec}: no such file")
        torch: Any = import_module("torch")
        try:
            program: Any = torch.export.load(spec)
        except Exception as error:  # torch raises what it likes
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{spec}: no readable exported program: {first}") from error
        return program, program.example_inputs, None, None
    match _made(spec, "neither module:callable nor a .pt2 file"):
        case (model, example):
            return model, example, None, None
        case (model, example, calls):
            return model, example, _as_calls(spec, calls), None
        case (model, example, calls, labels):
            return model, example, _as_calls(spec, calls), labels
        case made:
            raise ValueError(
                f"{spec!r} must return (model, example inputs), got {type(made).__name__}"
            )


def load_calls(spec: str) -> Calls:
    """Calls alone: what ``module:callable`` returns is a list of them.

    Raises:
        ValueError: The text names no callable, or it returns something else.
    """
    made = _made(spec, "not module:callable")
    if not isinstance(made, list):
        raise ValueError(f"{spec!r} must return a list of calls, got {type(made).__name__}")
    return _as_calls(spec, made)


def _as_calls(spec: str, calls: Any) -> Calls:
    if not isinstance(calls, list | tuple):
        raise ValueError(f"{spec!r}: calls must be a list, got {type(calls).__name__}")
    return [call if isinstance(call, tuple) else (call,) for call in calls]


def _made(spec: str, wrong: str) -> Any:
    """What ``module:callable`` returns."""
    module_name, colon, attribute = spec.partition(":")
    if not colon:
        raise ValueError(f"{spec!r} is {wrong}")
    sys.path.insert(0, "")  # as with python -m: modules of the current folder
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ValueError(f"{spec!r}: no module {module_name!r} here") from error
    make: Callable[[], object] | None = getattr(module, attribute, None)
    if not callable(make):
        raise ValueError(f"{spec!r}: {module_name} has no callable {attribute!r}")
    try:
        return make()
    except (ImportError, T3CError):
        raise
    except Exception as error:
        raise ValueError(f"{spec!r} failed: {type(error).__name__}: {error}") from error


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from one tensor, a tuple, a dict, or (tuple, dict)."""
    match example:
        case (tuple() | list() as args, Mapping() as kwargs):
            return tuple(args), dict(kwargs)
        case tuple() | list():
            return tuple(cast(Sequence[Any], example)), {}
        case Mapping():
            return (), dict(cast(Mapping[str, Any], example))
        case None:
            raise ValueError("the model comes without example inputs; add --inputs or --shape")
        case _:
            return (example,), {}


def invent_inputs(manifest: Manifest) -> dict[str, Any]:
    """Inputs of the right shapes: normal numbers for floats, ones for everything else."""
    rng = np.random.default_rng(0)
    return {
        spec.name: rng.standard_normal(spec.shape).astype(spec.dtype)
        if spec.dtype.startswith("float")
        else np.ones(spec.shape, spec.dtype)
        for spec in manifest.inputs
    }


def read_npz(path: Path) -> dict[str, Any]:
    """Arrays of an npz file, by name.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        with zipfile.ZipFile(path):  # numpy would take other files for pickles
            pass
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: no readable npz file: {error}; numpy.savez(path, name=array) writes one"
        ) from error


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays by name, whole or not at all, at the path as it was given."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # numpy.savez has names that arrays cannot have
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def example_inputs(
    path: Path | None, shapes: list[str] | None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments of one call, from a file or invented for shapes; None where neither is given.

    Raises:
        ValueError: The file cannot be read, or a shape is none.
    """
    if path is None and not shapes:
        return None
    torch: Any = import_module("torch")
    if path is not None:
        return (), {name: torch.from_numpy(array) for name, array in read_npz(path).items()}
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(_shape(text), generator=generator) for text in shapes or ()), {}


def _shape(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--shape {text!r}: write positive numbers, for example 1,3,224,224")
    return [int(part) for part in parts]
