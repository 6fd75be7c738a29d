"""The drift of a compiled library, input by input."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from t3c.certificate.labels import Classes
from t3c.certificate.outputs import F64, float_outputs, is_scores, norms, samples_in
from t3c.core.errors import CertificateError
from t3c.core.per_input import features

Progress = Callable[[str, int, int], None]


class Library(Protocol):
    """What a session offers: each profile, callable like the model, smallest first."""

    @property
    def variants(self) -> Mapping[str, Callable[..., Any]]:
        """Profile name -> its function."""
        ...


@dataclass(frozen=True, slots=True)
class Scores:
    """What every profile of a library does to each of n inputs.

    Attributes:
        original: Profile name -> [n] distances ||dz||_2 from the original; smallest profile first.
        teacher: The same from the largest profile.
        features: Profile name -> [n, f], what its outputs say of each input.
        digests: SHA-256 of each input.
        classes: What becomes of labels; None where outputs are not class scores.
    """

    original: dict[str, F64]
    teacher: dict[str, F64]
    features: dict[str, F64]
    digests: tuple[str, ...]
    classes: Classes | None


def library_scores(
    library: Library,
    model: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    progress: Progress | None = None,
    what: str = "calibrating bounds",
) -> Scores:
    """Compare every profile's outputs with the original's, input by input.

    Args:
        library: A session.
        model: The original.
        inputs: Arguments of calls.
        progress: Called with (what, done, total).
        what: Told to `progress`.

    Raises:
        CertificateError: No inputs, or outputs that are not finite or do not match.
    """
    if not inputs:
        raise CertificateError("a certificate needs held-out inputs; got none")
    names = list(library.variants)
    original: dict[str, list[F64]] = {name: [] for name in names}
    teacher: dict[str, list[F64]] = {name: [] for name in names}
    seen: dict[str, list[F64]] = {name: [] for name in names}
    digests: list[str] = []
    parts: list[Classes] = []
    with torch.inference_mode():
        for done, args in enumerate(inputs):
            if progress is not None:
                progress(what, done, len(inputs))
            want = float_outputs(list(_leaves(model(*args))))
            given = tuple(x for x in pytree.tree_leaves(args) if isinstance(x, Tensor))
            split = samples_in(given, want)
            got = {name: _matching(run(*args), want) for name, run in library.variants.items()}
            for name in names:
                original[name].append(_distance(got[name], want, split))
                teacher[name].append(_distance(got[name], got[names[-1]], split))
                seen[name].append(features(got[name], split))
            digests += _digests(given, split)
            if is_scores(want, split):
                parts.append(Classes.of(want[0], {name: y[0] for name, y in got.items()}))
    if progress is not None:
        progress(what, len(inputs), len(inputs))
    return Scores(
        {name: np.concatenate(rows) for name, rows in original.items()},
        {name: np.concatenate(rows) for name, rows in teacher.items()},
        {name: np.concatenate(rows) for name, rows in seen.items()},
        tuple(digests),
        Classes.joined(parts) if len(parts) == len(inputs) else None,
    )


def _digests(tensors: tuple[Tensor, ...], samples: int) -> list[str]:
    """SHA-256 of each input of a call; what has no axis of inputs belongs to each."""
    arrays = [np.ascontiguousarray(x.detach().numpy()) for x in tensors]
    split = [a.ndim > 0 and a.shape[0] == samples for a in arrays]
    found = []
    for i in range(samples):
        total = hashlib.sha256()
        for array, own in zip(arrays, split, strict=True):
            total.update((array[i] if own else array).tobytes())
        found.append(total.hexdigest())
    return found


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
