"""An artifact on disk: reading and checking it, and writing it whole or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from t3c.core.errors import ArtifactError
from t3c.core.manifest import FORMAT, MANIFEST, WEIGHTS, FileEntry, Manifest


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact on disk.

    Attributes:
        path: Its folder.
        manifest: What it says of itself.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read the manifest of the folder; hashes are not checked here (see `verify`)."""
        folder = Path(path)
        file = folder / MANIFEST
        try:
            data = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise ArtifactError(
                f"{folder}: no {MANIFEST}; give the folder that lower() wrote"
            ) from None
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{file}: cannot be read: {error}") from error
        return cls(folder, Manifest.from_json(data, str(file)))

    @property
    def library(self) -> Path:
        """The shared library."""
        return self.path / self.manifest.library

    @property
    def weights(self) -> Path:
        """The weight file."""
        return self.path / WEIGHTS

    def verify(self, *, hashes: bool = True) -> None:
        """Check that every file lies inside the folder and is the one that was written.

        Args:
            hashes: Also read all bytes and compare their SHA-256.

        Raises:
            ArtifactError: Names the file.
        """
        listed = {entry.path for entry in self.manifest.files}
        named = () if self.manifest.policy is None else (self.manifest.policy,)
        for needed in (self.manifest.library, WEIGHTS, *named):
            if needed not in listed:
                raise ArtifactError(f"{self.path / MANIFEST}: files does not list {needed!r}")
        root = self.path.resolve()
        for entry in self.manifest.files:
            file = self.path / entry.path
            if not file.resolve().is_relative_to(root):
                raise ArtifactError(f"{file}: leads outside the artifact; it is not loaded")
            if not file.is_file():
                raise ArtifactError(f"{file}: missing; copy the whole folder")
            if (size := file.stat().st_size) != entry.bytes:
                raise ArtifactError(f"{file}: {size} bytes, the manifest says {entry.bytes}")
            if hashes and sha256(file) != entry.sha256:
                raise ArtifactError(f"{file}: damaged; its SHA-256 is not the one in the manifest")


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomic(file: Path, data: bytes) -> None:
    """Write a file whole or not at all, through a temporary file beside it."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into an existing folder, atomically; it lists the files as given."""
    text = json.dumps(manifest.to_json(), indent=1, allow_nan=False)
    write_atomic(folder / MANIFEST, text.encode() + b"\n")


def with_policy(artifact: Artifact, data: bytes) -> Artifact:
    """The artifact with a policy, in place of the one that it named before.

    The file is named by its content, so that the manifest, which is replaced last and at once,
    never names one that is not there whole.
    """
    name = f"policy.{hashlib.sha256(data).hexdigest()[:16]}.json"
    write_atomic(artifact.path / name, data)
    before = artifact.manifest
    kept = tuple(f for f in before.files if f.path not in (name, before.policy))
    entry = FileEntry(name, sha256(artifact.path / name), len(data))
    manifest = replace(before, files=(*kept, entry), policy=name)
    write_manifest(artifact.path, manifest)
    if before.policy is not None and before.policy != name:
        (artifact.path / before.policy).unlink(missing_ok=True)
    return Artifact(artifact.path, manifest)


@contextmanager
def writing(out: str | os.PathLike[str]) -> Generator[Path]:
    """A fresh folder to fill; it takes the place of `out` on success and vanishes on failure.

    An existing `out` is replaced only if it is an artifact or an empty folder.

    Raises:
        ArtifactError: `out` is something else, which is left alone.
    """
    path = Path(out)
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    fresh.chmod(0o755)
    try:
        yield fresh
        check_replaceable(path)
        _replace(path, fresh)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _replace(path: Path, fresh: Path) -> None:
    """Put a folder in the place of another one, which comes back if that fails."""
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    old = aside / "artifact"
    try:
        with suppress(FileNotFoundError):
            os.rename(path, old)
        try:
            os.rename(fresh, path)
        except OSError:
            if old.exists() and not path.exists():
                os.rename(old, path)
            raise
    finally:
        if not old.exists() or path.exists():
            shutil.rmtree(aside, ignore_errors=True)


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file of the folder, list them in the manifest and write it there."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    entries = tuple(
        FileEntry(p.relative_to(folder).as_posix(), sha256(p), p.stat().st_size) for p in found
    )
    sealed = replace(manifest, files=entries)
    write_manifest(folder, sealed)
    return sealed


def check_replaceable(path: Path) -> None:
    """Refuse a folder that `writing` would not replace: neither absent, empty nor an artifact.

    Raises:
        ArtifactError: It is something else.
    """
    if not path.exists() and not path.is_symlink():
        return
    if path.is_dir() and not path.is_symlink():
        if not any(path.iterdir()):
            return
        with suppress(OSError, ValueError, AttributeError):
            if json.loads((path / MANIFEST).read_bytes()).get("format") == FORMAT:
                return
    raise ArtifactError(
        f"{path}: exists and is no T3C artifact; choose another folder or remove it"
    )
