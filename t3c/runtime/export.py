"""A smaller artifact out of a large one: some profiles, and of the weights what they read."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from t3c.core.artifact import Artifact
from t3c.core.errors import T3CError
from t3c.core.manifest import CompiledProfile
from t3c.runtime import bundle
from t3c.runtime.weights import Array, Weights


def export(
    artifact: str | os.PathLike[str] | Artifact,
    profiles: Sequence[str],
    out: str | os.PathLike[str],
) -> Artifact:
    """Write an artifact with some profiles of another one; nothing is compiled or rounded again.

    Codes and library are the same, so that a profile computes the same bits in both. Factors are
    cut to the largest rank that the profiles read. Certificates and costs are kept; a certificate
    against the largest profile still means that of the artifact it comes from. A policy is not
    kept: it was fitted to the whole chain.

    Args:
        artifact: Its folder, or what `lower` returned.
        profiles: Names; at least one.
        out: The new folder; an artifact that stands there is replaced.

    Raises:
        ArtifactError: The artifact is damaged, or `out` is something else.
        T3CError: There is no such profile.
        TypeError: One name instead of a list.
        ValueError: `out` is the artifact itself.
    """
    if isinstance(profiles, str):
        raise TypeError(f"profiles is {profiles!r}; give a list of names, [{profiles!r}]")
    found = artifact if isinstance(artifact, Artifact) else Artifact.read(artifact)
    if Path(out).resolve() == found.path.resolve():
        raise ValueError(
            f"{out} is the artifact itself, whose other profiles would be lost; give another folder"
        )
    found.verify()
    known = {c.profile.name: c for c in found.manifest.profiles}
    unknown = [name for name in profiles if name not in known]
    if unknown or not profiles:
        raise T3CError(
            f"no profile {unknown[0]!r}; there are {', '.join(known)}"
            if unknown
            else f"no profile was named; there are {', '.join(known)}"
        )
    kept = tuple(c for name, c in known.items() if name in profiles)
    weights = Weights(found.weights)
    tensors = {name: _cut(weights, kept, name) for c in kept for name in c.weights}
    manifest = replace(found.manifest, profiles=kept, policy=None, files=())
    return bundle.write(out, manifest, found.library, tensors)


def _cut(weights: Weights, profiles: Sequence[CompiledProfile], name: str) -> Array:
    """What the profiles read of a tensor: its front as plain bytes, or all of it as it is."""
    whole = weights[name]
    need = max(c.reads.get(name, whole.nbytes) for c in profiles if name in c.weights)
    if need >= whole.nbytes:
        return whole
    return whole.reshape(-1).view(np.uint8)[:need]
