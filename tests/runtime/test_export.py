"""Small artifacts out of large ones compute the same bits; archives give the same files back."""

import json
import shutil
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import t3c
from t3c import targets
from t3c.api import elasticize
from t3c.codegen.families import families_of
from t3c.controller.calibrate import collect
from t3c.controller.costs import storage_bytes
from t3c.core.artifact import Artifact
from t3c.core.code_storage import CodeStorage
from t3c.core.errors import ArtifactError, T3CError
from t3c.core.formats import Dense, LowRank
from t3c.elastic.model import ElasticModel
from t3c.elastic.rounding import round_groups, round_rows
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
    return lowered(Net(), tmp_path_factory.mktemp("large") / "net")


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, ElasticModel]:
    torch.manual_seed(0)
    elastic = elasticize(Net(), calls()[0])
    out = tmp_path_factory.mktemp("apart") / "net"
    return lowered(elastic, out, codes="independent", profiles=4), elastic


def calls() -> list[tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 192, generator=draw),) for _ in range(6)]


def lowered(model: nn.Module | ElasticModel, out: Path, **options: Any) -> Artifact:
    given: dict[str, Any] = {"profiles": 12, "objective": "bytes", "calls": 0}
    given |= {"calibration": calls(), "say": lambda line: None, **options}
    return t3c.lower(model, "x86", calls()[0], out, **given)


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


def test_each_width_stored_apart_is_dense_quantization_bit_for_bit(
    apart: tuple[Artifact, ElasticModel],
) -> None:
    artifact, elastic = apart
    assert artifact.manifest.codes is CodeStorage.INDEPENDENT
    assert artifact.manifest.stages.verified
    chain = artifact.manifest.chain.profiles
    wanted = [dict.fromkeys(elastic.sites, Dense(bits)) for bits in (4, 8)]
    assert all(formats in [p.formats for p in chain] for formats in wanted)
    batches, families = calls(), families_of(targets.get("x86"))
    fit, held = (collect(elastic, part) for part in (batches[::2], batches[1::2]))
    stored = Weights(artifact.weights)
    for name, layer in elastic.layers.items():
        moment, bias = (fit[name] + held[name]).mean(), elastic.codes(name).bias
        eight = families.linear.pack_dense(round_rows(layer.weight, moment), bias)
        groups = round_groups(layer.weight, moment, search=True)
        four = families.grouped().pack_dense(groups, bias)
        for part, packed in (("dense", eight), ("dense4", four)):
            for array, value in packed.items():
                np.testing.assert_array_equal(stored[f"{name}:{part}.{array}"], value)


def test_widths_stored_apart_read_their_own_bytes_and_make_the_file_larger(
    apart: tuple[Artifact, ElasticModel], large: Artifact
) -> None:
    artifact, elastic = apart
    found, one = storage(artifact), storage(large)
    sizes = {p.name: p for p in artifact.manifest.chain}
    for row in found.profiles:
        formats = sizes[row.name].formats
        assert row.alone == sizes[row.name].storage_bytes <= row.reads
        if all(isinstance(fmt, Dense) for fmt in formats.values()):
            assert row.reads == sum(storage_bytes(s, formats[n]) for n, s in elastic.sites.items())
    assert {n for n in found.duplicates if ":dense" in n} >= {
        "up:dense4.weight",
        "down:dense4.scale",
    }
    four = sum(storage_bytes(site, Dense(4)) for site in elastic.sites.values())
    assert 0 < found.profiles[-1].reads < one.profiles[-1].reads  # no scales of groups
    assert sum(size for n, size in found.duplicates.items() if ":dense4" in n) == four
    assert found.overhead <= 1.02 + 8192 / found.file


def test_profiles_of_widths_stored_apart_stay_bit_exact_alone_and_packed(
    apart: tuple[Artifact, ElasticModel], tmp_path: Path
) -> None:
    artifact, _ = apart
    t3c.pack(artifact, tmp_path / "net.zip")
    back = t3c.unpack(tmp_path / "net.zip", tmp_path / "back")
    for profile in artifact.manifest.chain:
        alone = t3c.export(artifact, [profile.name], tmp_path / profile.name)
        for other in (alone, back):
            np.testing.assert_array_equal(
                outputs(other, profile.name), outputs(artifact, profile.name)
            )
        assert alone.manifest.codes is CodeStorage.INDEPENDENT
        assert alone.weights.stat().st_size < artifact.weights.stat().st_size


def test_a_small_profile_reads_the_front_of_the_file(large: Artifact) -> None:
    rows = storage(large).profiles
    fronts = [row.front for row in rows]
    assert fronts == sorted(fronts)
    assert fronts[0] < 0.6 * fronts[-1]
    assert all(row.reads <= row.front for row in rows)
    assert rows[0].alone <= rows[0].reads


def test_what_lies_behind_the_ranks_of_a_profile_is_never_read(
    large: Artifact, tmp_path: Path
) -> None:
    tiny = large.manifest.profiles[0]
    assert tiny.reads
    copy = shutil.copytree(large.path, tmp_path / "copy")
    data = bytearray(large.weights.read_bytes())
    tensors = Weights(large.weights)
    start = len(data) - max(tensors.begins[name] + tensors[name].nbytes for name in tensors)
    for name, size in tiny.reads.items():
        begin, end = start + tensors.begins[name] + size, start + tensors.begins[name]
        data[begin : end + tensors[name].nbytes] = b"\x7f" * (tensors[name].nbytes - size)
    (copy / large.weights.name).write_bytes(data)
    x = np.random.default_rng(1).standard_normal((2, 192)).astype(np.float32)
    session = t3c.load(copy, hashes=False)
    session.set_profile("tiny")
    np.testing.assert_array_equal(session(x), outputs(large, "tiny"))
    others = [name for name in session.variants if name != "tiny"]
    assert any(not np.array_equal(session.variants[n](x), outputs(large, n)) for n in others)


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
    with pytest.raises(ValueError, match="is the artifact itself, whose other profiles"):
        t3c.export(large, ["tiny"], large.path / ".." / large.path.name)
    with pytest.raises(T3CError, match="no profile was named"):
        t3c.export(large, [], tmp_path / "out")
    with pytest.raises(TypeError, match=r"give a list of names, \['tiny'\]"):
        t3c.export(large, "tiny", tmp_path / "out")
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
    whole = source.read_bytes()
    locked = bytearray(whole)
    locked[6] |= 1  # the flag of encryption, in front of the member and in the directory
    locked[whole.index(b"PK\x01\x02") + 8] |= 1
    with zipfile.ZipFile(tmp_path / "plain.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", manifest)
    deflated = bytearray((tmp_path / "plain.zip").read_bytes())
    deflated[60:120] = b"\xff" * 60
    for damaged in (whole[:5000], bytes(locked), bytes(deflated)):
        (tmp_path / "bad.zip").write_bytes(damaged)
        with pytest.raises(ArtifactError, match="cannot be unpacked"):
            t3c.unpack(tmp_path / "bad.zip", out)
    assert not out.exists()


def test_an_archive_that_grows_beyond_measure_fills_no_memory(
    large: Artifact, tmp_path: Path
) -> None:
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("manifest.json", (large.path / "manifest.json").read_bytes())
        for entry in large.manifest.files:
            archive.writestr(entry.path, bytes(1 << 26 if entry.path.endswith("s") else 1))
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match="longer than its manifest says"):
            t3c.unpack(bomb, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


def test_an_archive_is_a_file_in_any_folder(large: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a folder; name the file"):
        t3c.pack(large, tmp_path)
    t3c.pack(large, tmp_path / "new" / "n\u00e9t.zip")
    assert t3c.unpack(tmp_path / "new" / "n\u00e9t.zip", tmp_path / "back").manifest.files
