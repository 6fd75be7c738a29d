"""Where the bytes of a weight file go: what each profile reads of it, and what is there twice."""

from dataclasses import dataclass

from t3c.core.artifact import Artifact
from t3c.core.manifest import CompiledProfile
from t3c.runtime.weights import Weights


@dataclass(frozen=True, slots=True)
class ProfileBytes:
    """One profile.

    Attributes:
        name: Its name.
        alone: Bytes of a weight file that served it alone, ranks cut.
        reads: Bytes that it reads of this file.
        front: Bytes of the data from its begin to the last one that the profile reads.
    """

    name: str
    alone: int
    reads: int
    front: int


@dataclass(frozen=True, slots=True)
class Storage:
    """The weight file of an artifact.

    Attributes:
        file: Its bytes, header included.
        profiles: Smallest first.
        duplicates: Tensor name -> bytes of what the largest profile does not read: factors beside
            dense weights, scales of statistics of a profile's own.
    """

    file: int
    profiles: tuple[ProfileBytes, ...]
    duplicates: dict[str, int]

    @property
    def overhead(self) -> float:
        """File bytes over those of the largest profile and the duplicates: what nothing reads."""
        return self.file / max(1, self.profiles[-1].reads + sum(self.duplicates.values()))


def storage(artifact: Artifact) -> Storage:
    """Count the bytes of an artifact's weight file.

    Raises:
        ArtifactError: The file is damaged.
    """
    weights = Weights(artifact.weights)
    compiled = artifact.manifest.profiles
    rows = tuple(_row(c, weights) for c in compiled)
    largest = {name: _read(compiled[-1], weights, name) for name in compiled[-1].weights}
    rest = {name: array.nbytes - largest.get(name, 0) for name, array in weights.items()}
    duplicates = {name: size for name, size in rest.items() if size}
    return Storage(artifact.weights.stat().st_size, rows, duplicates)


def _read(compiled: CompiledProfile, weights: Weights, name: str) -> int:
    return min(weights[name].nbytes, compiled.reads.get(name, weights[name].nbytes))


def _row(compiled: CompiledProfile, weights: Weights) -> ProfileBytes:
    sizes = {name: _read(compiled, weights, name) for name in compiled.weights}
    front = max((weights.begins[name] + size for name, size in sizes.items()), default=0)
    profile = compiled.profile
    return ProfileBytes(profile.name, profile.storage_bytes, sum(sizes.values()), front)
