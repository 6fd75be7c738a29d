"""An artifact as one compressed file for transfer: a zip archive that any tool opens.

Files are compressed by LZMA, whose range coder squeezes the skewed codes of weights. Archives of
equal artifacts are equal bytes.
"""

import lzma
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from t3c.core.artifact import Artifact, writing
from t3c.core.errors import ArtifactError
from t3c.core.manifest import MANIFEST

EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time stamp of every member, the earliest that the format knows."""
CHUNK = 1 << 12
"""Compressed bytes that are read at once: zipfile unpacks them whole into memory, and LZMA
makes up to 7,000 bytes of one."""


DAMAGED = (lzma.LZMAError, zlib.error, EOFError, RuntimeError)
"""What zipfile raises of damaged members; RuntimeError is its own, of encrypted ones, and, as
NotImplementedError, of a compression or a version of the format that it does not know."""


@dataclass(frozen=True, slots=True)
class PackedFile:
    """One file: its path in the artifact, its bytes, and those that it takes in the archive."""

    path: str
    bytes: int
    packed: int


def pack(
    artifact: str | os.PathLike[str] | Artifact, out: str | os.PathLike[str]
) -> tuple[PackedFile, ...]:
    """Write an artifact as one archive, whole or not at all.

    Args:
        artifact: Its folder, or what `lower` returned; it is verified first.
        out: The file; an archive that stands there is replaced.

    Returns:
        Both byte counts of every file.

    Raises:
        ArtifactError: The artifact is damaged, or `out` is a folder.
    """
    target = Path(out)
    if not target.name or target.is_dir():
        raise ArtifactError(
            f"{target}: is a folder; name the file of the archive, for example net.zip"
        )
    found = artifact if isinstance(artifact, Artifact) else Artifact.read(artifact)
    found.verify()
    paths = (MANIFEST, *(entry.path for entry in found.manifest.files))
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(scratch, "w") as archive:
            for path in paths:
                content = (found.path / path).read_bytes()
                member = zipfile.ZipInfo(path, EPOCH)
                archive.writestr(member, content, zipfile.ZIP_LZMA)
            rows = [PackedFile(i.filename, i.file_size, i.compress_size) for i in archive.filelist]
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)
    return tuple(rows)


def unpack(archive: str | os.PathLike[str], out: str | os.PathLike[str]) -> Artifact:
    """Write the artifact that an archive holds; every file is checked against the manifest.

    Args:
        archive: What `pack` wrote.
        out: The folder; an artifact that stands there is replaced.

    Raises:
        ArtifactError: The archive is damaged, holds what its manifest does not list, or leads
            outside the folder; or `out` is something else.
    """
    file = Path(archive)
    try:
        with zipfile.ZipFile(file) as members, writing(out) as folder:
            names = [info.filename for info in members.infolist()]
            for name in names:
                pure = PurePosixPath(name)
                if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name:
                    raise ArtifactError(f"{file}: {name!r} leads outside the artifact")
            if names.count(MANIFEST) != 1:
                raise ArtifactError(f"{file}: holds no {MANIFEST}; give what t3c pack wrote")
            _extract(members, MANIFEST, folder)
            found = Artifact.read(folder)
            sizes = {entry.path: entry.bytes for entry in found.manifest.files}
            extra = sorted(set(names) - set(sizes) - {MANIFEST})
            if extra or len(set(names)) != len(names):
                raise ArtifactError(f"{file}: {extra or names} is not what its manifest lists")
            for name in sizes:
                if name in names:
                    _extract(members, name, folder, sizes[name])
            found.verify()
    except (OSError, zipfile.BadZipFile, *DAMAGED) as error:
        raise ArtifactError(f"{file}: cannot be unpacked: {error}") from error
    return Artifact.read(out)


def _extract(members: zipfile.ZipFile, name: str, folder: Path, most: int = 1 << 28) -> None:
    """Write one member; refuse one that is longer than it should be, before it fills the disk."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with members.open(name) as source, target.open("wb") as sink:
        while block := source.read(CHUNK):
            if (most := most - len(block)) < 0:
                raise ArtifactError(f"{members.filename}: {name} is longer than its manifest says")
            sink.write(block)
