"""What data that was held out adds to an artifact: certificates, and a policy."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from t3c.calls import digest
from t3c.certificate.calibrated import LEVELS, calibrate, draws, with_shifted
from t3c.certificate.labels import label_effects
from t3c.certificate.library import library_scores
from t3c.certificate.remarks import on_bounds, on_labels
from t3c.certificate.scaled import each_input
from t3c.controller.fit_policy import fit
from t3c.core.artifact import Artifact, write_manifest
from t3c.core.certificate import Labels
from t3c.core.errors import CertificateError
from t3c.core.profile import Percentile
from t3c.describing import with_certificates
from t3c.proof import Notes, Progress
from t3c.runtime.policy import keep, summarize, with_look
from t3c.runtime.session import Binder, load, plain


def certify(
    artifact: str | os.PathLike[str] | Artifact,
    model: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    *,
    labels: Any = None,
    shifted: Sequence[tuple[Any, ...]] | None = None,
    teaching: Sequence[tuple[Any, ...]] | None = None,
    levels: Sequence[float] = LEVELS,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Artifact:
    """Bound the drift of every profile by split-conformal calibration of the library itself.

    The bounds hold for new inputs that are exchangeable with these: drawn alike, and used neither
    for calibration nor for training. Disjoint thirds of the inputs show how much the bounds spread.
    Where the model has one output [inputs, classes], changed labels, confidence and its calibration
    are counted too. From 200 inputs on, outputs are learned to tell how far each of them may be off
    (`Session.drift_bound`); with `teaching`, 100 are enough. All of it goes into the manifest,
    which is replaced whole.

    Args:
        artifact: Folder of an artifact that runs on this machine, or what `lower` returned.
        model: The original model.
        inputs: Arguments of calls, each a tuple, with the artifact's shapes.
        labels: The right class of each input, in order; None: no accuracy, no calibration error.
        shifted: Calls with data of another kind; the bounds' coverage of them is measured.
        teaching: Calls that teach what outputs say of drift, and nothing else, so that data from
            training or calibration will do; None: half of `inputs` teaches.
        levels: Shares of new inputs to cover, rising.
        progress: Called with (what, done, total).
        say: Told every remark, a line each; None: standard error.

    Returns:
        The artifact with `calibrated`, `labels` and `per_input` in every profile's certificate.

    Raises:
        CertificateError: No inputs, outputs that are not finite or do not match the library's,
            labels for outputs that are not class scores, or inputs that teach and are held out too.
        ArtifactError: The artifact is damaged.
        TargetError: It was built for another machine.
        ValueError: A level is no share, or labels are not one class for each input.
    """
    session = load(artifact)
    scores = library_scores(session, model, inputs, progress)
    classes = scores.classes
    if labels is not None:
        if classes is None:
            raise CertificateError(
                "labels need a model with one output [inputs, classes]; leave them out"
            )
        classes = classes.told(labels)
    found = calibrate(scores.original, scores.teacher, _input_hash(inputs), levels)
    for name, one in found.items():
        kept = None if classes is None else classes.labels[name] == classes.label
        truth = None if classes is None else classes.truth
        right = None if classes is None or truth is None else classes.labels[name] == truth
        apart = draws(scores.original[name], scores.digests, levels, kept, right)
        found[name] = replace(one, draws=apart)
    if shifted is not None:
        other = library_scores(session, model, shifted, progress, "checking shifted data")
        found = with_shifted(found, other.original, _input_hash(shifted))
    taught = None
    if teaching is not None:
        taught = library_scores(session, model, teaching, progress, "learning from outputs")
    single = each_input(scores, levels, taught)
    before = {c.profile.name: c.profile.certificate for c in session.manifest.profiles}
    effects: Mapping[str, Labels] = {}
    lines = on_bounds(found, levels)
    if classes is not None:
        sound = {name: certificate.sound for name, certificate in before.items()}
        effects = label_effects(classes, scores.original, levels, sound)
        lines += on_labels(effects, classes.count)
    Notes(say).add(*lines)
    certificates = {
        name: replace(
            certificate,
            calibrated=found[name],
            labels=effects.get(name),
            per_input=single[name],
        )
        for name, certificate in before.items()
    }
    manifest = with_certificates(session.manifest, certificates)
    write_manifest(session.path, manifest)
    return Artifact(session.path, manifest)


def fit_policy(
    artifact: str | os.PathLike[str] | Artifact,
    model: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    *,
    looks: bool = False,
    time_price: float = 0.5,
    percentile: Percentile = "p95",
    steps: int = 1500,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Artifact:
    """Fit a policy from budgets to profiles to the artifact's recorded costs and measured drift.

    The artifact keeps it as a file that the manifest names, and ``t3c.load(artifact, policy=True)``
    uses it. On budgets alone it picks what the chain picks. One that looks at inputs may pick less
    where that paid on half of the inputs, which it was not fitted to; elsewhere the chain decides.
    When costs are recorded anew, it has to be fitted again.

    Args:
        artifact: Folder of an artifact that runs on this machine, or what `lower` returned.
        model: The original model.
        inputs: Arguments of calls, each a tuple; 16 or more where `looks` is set.
        looks: Whether inputs may choose among the profiles that keep a budget.
        time_price: With `looks`: what all of the largest profile's time is worth, in units of the
            mean drift of the smallest profile.
        percentile: Of the latency that budgets will limit.
        steps: Of each training; a chain of eight profiles needs about as many as the default.
        progress: Called with (what, done, total).
        say: Told what the fit found, a line each; None: standard error.

    Returns:
        The artifact with `manifest.policy`.

    Raises:
        CertificateError: No inputs, or outputs that are not finite or do not match the library's.
        ArtifactError: The artifact is damaged.
        TargetError: It was built for another machine.
        ValueError: Too few inputs, or the chain has one profile.
    """
    session = load(artifact)
    scores = library_scores(session, model, inputs, progress, "measuring drift")
    drifts = np.stack([d.reshape(len(inputs), -1).mean(1) for d in scores.original.values()], 1)
    bind = Binder(session.manifest.input_tree, session.manifest.inputs)
    calls = [[plain(x) for x in bind(args, {})] for args in inputs]
    chain = session.manifest.chain
    policy, report = fit(
        chain,
        drifts,
        summaries=np.stack([summarize(call) for call in calls]) if looks else None,
        time_price=time_price,
        percentile=percentile,
        steps=steps,
    )
    if looks:
        policy = with_look(chain, policy, calls)
    Notes(say).add(*report.remarks(chain))
    return keep(Artifact(session.path, session.manifest), policy, asdict(report))


def _input_hash(inputs: Sequence[tuple[Any, ...]]) -> str:
    """SHA-256 over the tensors of calls, in order."""
    return digest([tuple(x for x in tree_leaves(args) if isinstance(x, Tensor)) for args in inputs])
