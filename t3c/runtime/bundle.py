"""Writing an artifact: library, weights, run.py, run.cc and manifest, whole or not at all."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from t3c.core.artifact import Artifact, seal, writing
from t3c.core.errors import ArtifactError
from t3c.core.manifest import WEIGHTS, Manifest
from t3c.runtime import weights
from t3c.runtime.template_host import RUN_CC
from t3c.runtime.template_run import RUN_PY


def write(
    out: str | os.PathLike[str],
    manifest: Manifest,
    library: str | os.PathLike[str] | bytes,
    tensors: Mapping[str, NDArray[Any]],
    extra: Mapping[str, bytes] | None = None,
) -> Artifact:
    """Write an artifact folder.

    Args:
        out: The folder; an artifact that stands there is replaced.
        manifest: Everything but `files`, which is filled in here.
        library: The linked shared library, its path or content; copied to `manifest.library`.
        tensors: Every tensor that a profile names; all are stored, those of small profiles first,
            so that a small profile touches the front of the file.
        extra: More files, relative path -> content, for example ``report.html``.

    Raises:
        ArtifactError: A profile names a tensor that is not given, or `out` is something else.
    """
    for compiled in manifest.profiles:
        if missing := [name for name in compiled.weights if name not in tensors]:
            raise ArtifactError(f"profile {compiled.profile.name!r} names no tensor {missing[0]!r}")
    with writing(out) as folder:
        target = folder / manifest.library
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(library, bytes):
            target.write_bytes(library)
        else:
            shutil.copyfile(library, target)
        needed = {name: tensors[name] for c in manifest.profiles for name in c.weights}
        weights.write(folder / WEIGHTS, {**needed, **tensors})
        (folder / "run.py").write_text(RUN_PY)
        (folder / "run.cc").write_text(RUN_CC)
        for name, content in (extra or {}).items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        sealed = seal(folder, manifest)
    return Artifact(Path(out), sealed)
