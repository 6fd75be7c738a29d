"""The drift of a compiled library, input by input."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from t3c.certificate.outputs import F64, float_outputs, norms, samples_in
from t3c.core.errors import CertificateError

Progress = Callable[[str, int, int], None]


class Library(Protocol):
    """What a session offers: each profile, callable like the model, smallest first."""

    @property
    def variants(self) -> Mapping[str, Callable[..., Any]]:
        """Profile name -> its function."""
        ...


def library_scores(
    library: Library,
    model: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    progress: Progress | None = None,
) -> tuple[dict[str, F64], dict[str, F64]]:
    """Distances ||dz||_2 of every profile's outputs for each input.

    Args:
        library: A session.
        model: The original.
        inputs: Arguments of calls.
        progress: Called with (what, done, total).

    Returns:
        Profile name -> scores against the original; the same against the largest profile.

    Raises:
        CertificateError: No inputs, or outputs that are not finite or do not match.
    """
    if not inputs:
        raise CertificateError("a certificate needs held-out inputs; got none")
    names = list(library.variants)
    original: dict[str, list[F64]] = {name: [] for name in names}
    teacher: dict[str, list[F64]] = {name: [] for name in names}
    with torch.inference_mode():
        for done, args in enumerate(inputs):
            if progress is not None:
                progress("calibrating bounds", done, len(inputs))
            want = float_outputs(list(_leaves(model(*args))))
            given = tuple(x for x in pytree.tree_leaves(args) if isinstance(x, Tensor))
            split = samples_in(given, want)
            got = {name: _matching(run(*args), want) for name, run in library.variants.items()}
            for name in names:
                original[name].append(_distance(got[name], want, split))
                teacher[name].append(_distance(got[name], got[names[-1]], split))
    if progress is not None:
        progress("calibrating bounds", len(inputs), len(inputs))
    return (
        {name: np.concatenate(rows) for name, rows in original.items()},
        {name: np.concatenate(rows) for name, rows in teacher.items()},
    )


def _matching(result: Any, want: list[Tensor]) -> list[Tensor]:
    """The library's float outputs, which must look like the model's."""
    found = float_outputs(list(_leaves(result)))
    if [y.shape for y in found] != [y.shape for y in want]:
        shapes = [tuple(y.shape) for y in found], [tuple(y.shape) for y in want]
        raise CertificateError(
            f"the library's outputs are {shapes[0]}, the model's are {shapes[1]}; give the model "
            "that was lowered"
        )
    return found


def _leaves(result: Any) -> Iterator[Any]:
    """The values of nested mappings and sequences, in order."""
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, list | tuple):
        for item in result:
            yield from _leaves(item)
    else:
        yield result


def _distance(a: list[Tensor], b: list[Tensor], samples: int) -> F64:
    return norms([x - y for x, y in zip(a, b, strict=True)], samples)
