"""Small artifacts out of large ones compute the same bits; archives give the same files back."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import t3c
from t3c.core.artifact import Artifact
from t3c.core.errors import ArtifactError, T3CError
from t3c.core.formats import Dense, LowRank
from t3c.runtime.storage import storage
from t3c.runtime.weights import Weights


class Net(nn.Module):
    """Two wide linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(192, 320), nn.Linear(320, 192)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.down(self.up(x).relu()))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    calls = [(torch.randn(2, 192),) for _ in range(6)]
    return t3c.lower(
        Net(),
        "x86",
        calls[0],
        tmp_path_factory.mktemp("large") / "net",
        calibration=calls,
        profiles=12,
        objective="bytes",
        calls=0,
        say=lambda line: None,
    )


def outputs(artifact: Artifact, name: str) -> np.ndarray:
    session = t3c.load(artifact)
    session.set_profile(name)
    x = np.random.default_rng(1).standard_normal((2, 192)).astype(np.float32)
    return np.array(session(x))


def test_dense_weights_of_two_widths_are_stored_once(large: Artifact) -> None:
    used = {fmt for p in large.manifest.chain for fmt in p.formats.values()}
    assert {Dense(8), Dense(4)} <= used
    assert any(isinstance(fmt, LowRank) for fmt in used)
    found = storage(large)
    assert found.overhead <= 1.02 + 8192 / found.file  # a header as large as a real net's
    assert not any("fine" in name or "dense" in name for name in found.duplicates)
    names = {name for name in Weights(large.weights) if name.startswith("up:dense")}
    assert names == {"up:dense4.weight", "up:dense4.scale", "up:dense4.bias"}


def test_a_small_profile_reads_the_front_of_the_file(large: Artifact) -> None:
    rows = storage(large).profiles
    fronts = [row.front for row in rows]
    assert fronts == sorted(fronts)
    assert fronts[0] < 0.6 * fronts[-1]
    assert all(row.reads <= row.front for row in rows)
    assert rows[0].alone <= rows[0].reads


def test_what_lies_behind_the_ranks_of_a_profile_is_never_read(large: Artifact) -> None:
    tiny = large.manifest.profiles[0]
    assert tiny.reads
    session = t3c.load(large)
    session.set_profile("tiny")
    x = np.random.default_rng(1).standard_normal((2, 192)).astype(np.float32)
    before = np.array(session(x))
    for name, size in tiny.reads.items():
        session._weights[name].reshape(-1).view(np.uint8)[size:] = 0x7F
    np.testing.assert_array_equal(session(x), before)


def test_every_profile_alone_computes_the_same_bits(large: Artifact, tmp_path: Path) -> None:
    for compiled in large.manifest.profiles:
        name = compiled.profile.name
        alone = t3c.export(large, [name], tmp_path / name)
        np.testing.assert_array_equal(outputs(alone, name), outputs(large, name))
        data = sum(array.nbytes for array in Weights(alone.weights).values())
        assert data == sum(
            min(array.nbytes, compiled.reads.get(tensor, array.nbytes))
            for tensor, array in Weights(large.weights).items()
            if tensor in compiled.weights
        )
        assert [p.name for p in alone.manifest.chain] == [name]


def test_a_pair_keeps_the_larger_rank(large: Artifact, tmp_path: Path) -> None:
    names = [p.name for p in large.manifest.chain][:2]
    pair = t3c.export(large, names[::-1], tmp_path / "pair")
    assert [p.name for p in pair.manifest.chain] == names
    for name in names:
        np.testing.assert_array_equal(outputs(pair, name), outputs(large, name))


def test_unknown_and_missing_names_are_refused(large: Artifact, tmp_path: Path) -> None:
    with pytest.raises(T3CError, match="no profile 'huge'; there are tiny"):
        t3c.export(large, ["huge"], tmp_path / "out")
    with pytest.raises(T3CError, match="no profile was named"):
        t3c.export(large, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_gives_the_same_files_back(large: Artifact, tmp_path: Path) -> None:
    rows = t3c.pack(large, tmp_path / "net.zip")
    t3c.pack(large, tmp_path / "again.zip")
    assert (tmp_path / "net.zip").read_bytes() == (tmp_path / "again.zip").read_bytes()
    assert sum(r.packed for r in rows) < sum(r.bytes for r in rows)
    back = t3c.unpack(tmp_path / "net.zip", tmp_path / "back")
    for row in rows:
        assert (back.path / row.path).read_bytes() == (large.path / row.path).read_bytes()


def rewritten(source: Path, target: Path, **changed: bytes) -> Path:
    """A copy of an archive with some members changed or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        members = {name: old.read(name) for name in old.namelist()}
        for name, content in {**members, **changed}.items():
            new.writestr(name, content)
    return target


def test_hostile_archives_are_refused_and_leave_nothing(large: Artifact, tmp_path: Path) -> None:
    t3c.pack(large, tmp_path / "net.zip")
    source, out = tmp_path / "net.zip", tmp_path / "out"
    manifest = json.dumps(replace(large.manifest, files=()).to_json()).encode()
    cases = {
        "leads outside": {"../evil": b"x"},
        "not what its manifest lists": {"extra.bin": b"x"},
        "is longer than its manifest says": {"run.py": b"x" * 1_000_000},
        "damaged": {"run.py": (large.path / "run.py").read_bytes()[:-1] + b"#"},
        "does not list|not what its manifest": {"manifest.json": manifest},
    }
    for message, changed in cases.items():
        with pytest.raises(ArtifactError, match=message):
            t3c.unpack(rewritten(source, tmp_path / "bad.zip", **changed), out)
    (tmp_path / "cut.zip").write_bytes(source.read_bytes()[:5000])
    with pytest.raises(ArtifactError, match="cannot be unpacked"):
        t3c.unpack(tmp_path / "cut.zip", out)
    assert not out.exists()
