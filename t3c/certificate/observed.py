"""How far the outputs of each profile drift from the original model on given inputs: measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from t3c.certificate.outputs import Batch, float_outputs, is_scores, norms, samples_in
from t3c.core.certificate import Drifts, Observed
from t3c.core.errors import CertificateError
from t3c.core.formats import Format
from t3c.core.profile import ProfileChain
from t3c.elastic.model import ElasticModel


def observed(
    elastic: ElasticModel, formats: Mapping[str, Format] | None, batches: Sequence[Batch]
) -> Observed:
    """Drift of one choice of formats, with fake-quantized weights and activations.

    An input is one entry along the first axis where all float outputs have the same first axis as
    the first graph input; else it is one batch.

    Args:
        elastic: The model.
        formats: Site name -> format; None: the original, whose drift is 0.
        batches: Flat inputs, as the graph takes them; held out, or the label must say so.

    Raises:
        CertificateError: No batches, or outputs that are not finite or have no floats.
    """
    found = _outputs(elastic, formats, batches)
    return _observed(_drifts(_original(elastic, batches), found, batches), batches, found, None)


def certify(
    elastic: ElasticModel,
    chain: ProfileChain,
    batches: Sequence[Batch],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> ProfileChain:
    """The chain with `certificate.observed` of every profile filled in.

    Against the original, and against the largest profile.

    Args:
        elastic: The model.
        chain: Its profiles.
        batches: Flat inputs, as the graph takes them.
        progress: Told (what, done, total) after each profile; None: nobody.

    Raises:
        CertificateError: As `observed`.
    """
    return measured(elastic, chain, batches, progress=progress)[0]


def measured(
    elastic: ElasticModel,
    chain: ProfileChain,
    batches: Sequence[Batch],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[ProfileChain, dict[str, NDArray[np.float64]]]:
    """As `certify`, and the drift from the original on every input, by profile.

    Args:
        elastic: The model.
        chain: Its profiles.
        batches: Flat inputs, as the graph takes them.
        progress: Told (what, done, total) after each profile; None: nobody.

    Raises:
        CertificateError: As `observed`.
    """
    original = _original(elastic, batches)
    largest = _outputs(elastic, chain.profiles[-1].formats, batches)
    made = []
    each: dict[str, NDArray[np.float64]] = {}
    for done, profile in enumerate(chain):
        if progress is not None:
            progress("observing drift", done, len(chain))
        drifted = _outputs(elastic, profile.formats, batches)
        teacher = _drifts(largest, drifted, batches)
        seen = _observed(_drifts(original, drifted, batches), batches, drifted, teacher)
        made.append(replace(profile, certificate=replace(profile.certificate, observed=seen)))
        each[profile.name] = _distances(original, drifted, batches)
    if progress is not None:
        progress("observing drift", len(chain), len(chain))
    return ProfileChain(tuple(made)), each


def _original(elastic: ElasticModel, batches: Sequence[Batch]) -> list[list[Tensor]]:
    if not batches:
        raise CertificateError("observed drift needs at least one batch of inputs; got none")
    found = _outputs(elastic, None, batches)
    if not all(found):
        raise CertificateError("the model has no floating-point output to compare")
    if not all(bool(y.isfinite().all()) for outputs in found for y in outputs):
        raise CertificateError("the original outputs are not finite; check model and batches")
    return found


def _outputs(
    elastic: ElasticModel, formats: Mapping[str, Format] | None, batches: Sequence[Batch]
) -> list[list[Tensor]]:
    """Float outputs of every batch."""
    with torch.no_grad(), elastic.using(formats):
        return [float_outputs(elastic.graph(*batch)) for batch in batches]


def _distances(
    reference: list[list[Tensor]], drifted: list[list[Tensor]], batches: Sequence[Batch]
) -> NDArray[np.float64]:
    """L2 distance of the outputs on every input."""
    return np.concatenate(
        [
            norms([b - a for b, a in zip(before, after, strict=True)], samples_in(batch, before))
            for batch, before, after in zip(batches, reference, drifted, strict=True)
        ]
    )


def _drifts(
    reference: list[list[Tensor]], drifted: list[list[Tensor]], batches: Sequence[Batch]
) -> Drifts:
    sizes, flips = [], []
    for batch, before, after in zip(batches, reference, drifted, strict=True):
        split = samples_in(batch, before)
        sizes.append(norms(before, split))
        if is_scores(before, split):
            flips.append((before[0].argmax(1) != after[0].argmax(1)).numpy())
    drift, norm = _distances(reference, drifted, batches), np.concatenate(sizes)
    if not np.isfinite(drift).all():
        raise CertificateError(
            "a profile's outputs are not finite; raise its ranks, or leave the profile out"
        )
    return Drifts(
        mean=float(drift.mean()),
        median=float(np.median(drift)),
        p95=float(np.quantile(drift, 0.95, method="higher")),
        max=float(drift.max()),
        relative=float(drift.mean() / max(float(norm.mean()), 1e-30)),
        flips=float(np.concatenate(flips).mean()) if flips else None,
    )


def _observed(
    found: Drifts, batches: Sequence[Batch], outputs: list[list[Tensor]], teacher: Drifts | None
) -> Observed:
    inputs = sum(samples_in(b, y) for b, y in zip(batches, outputs, strict=True))
    return Observed(**asdict(found), inputs=inputs, teacher=teacher)
