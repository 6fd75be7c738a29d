"""Calibration calls as the graph takes them: checked, split, hashed."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from t3c.elastic.model import ElasticModel
from t3c.proof import Batch, Notes

OBSERVED_INPUTS = 16
"""Calibration inputs on which the drift of every profile is observed, at most."""
HELD_OUT_FROM = 8
"""From so many calibration inputs on, the last quarter is kept for observing drift."""


def calibration_calls(
    elastic: ElasticModel, calibration: Sequence[tuple[Any, ...]] | None, notes: Notes
) -> list[Batch]:
    """Calibration calls as the graph takes them; the example inputs where there are none."""
    if calibration is None:
        notes.add(
            "no calibration data: ranks and factors follow the example inputs alone; pass "
            "calibration=[(x,), ...] with real inputs for a chain that fits your data"
        )
        return [elastic.example_inputs]
    for i, args in enumerate(calibration):
        if not isinstance(args, tuple):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"calibration[{i}] is a {type(args).__name__}; write (x,)")
    batches = [_finite(elastic, args, i) for i, args in enumerate(calibration)]
    if not batches:
        raise ValueError("calibration is empty; leave it out, or give at least one call")
    return batches


def _finite(elastic: ElasticModel, args: tuple[Any, ...], place: int) -> Batch:
    """One calibration call, flat; errors name its place.

    Raises:
        ValueError: It does not fit the captured call, or holds NaN or infinity.
    """
    try:
        batch = elastic.captured.flatten(args, {})
    except ValueError as error:
        raise ValueError(f"calibration[{place}]: {error}") from error
    for name, value in zip(elastic.captured.names, batch, strict=True):
        # -inf is what masks are made of
        if value.is_floating_point() and bool((value.isnan() | value.isposinf()).any()):
            raise ValueError(
                f"calibration[{place}]: input {name!r} holds NaN or infinity; leave that call out"
            )
    return batch


def held_out(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """What the chain is fitted to and what its drift is observed on; disjoint where many."""
    if len(batches) < HELD_OUT_FROM:
        return batches, batches[-OBSERVED_INPUTS:]
    count = min(OBSERVED_INPUTS, len(batches) // 4)
    return batches[:-count], batches[-count:]


def digest(batches: Sequence[Batch]) -> str:
    """SHA-256 over all calibration inputs, in order."""
    total = hashlib.sha256()
    for batch in batches:
        for tensor in batch:
            total.update(np.ascontiguousarray(tensor.detach().numpy()).tobytes())
    return total.hexdigest()
