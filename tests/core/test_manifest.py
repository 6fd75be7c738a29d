"""The manifest round-trips, tolerates additions and names every field that is wrong."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from t3c.core.artifact import Artifact, seal, write_atomic, writing
from t3c.core.certificate import (
    MEASURED,
    PAPER,
    Bound,
    Calibrated,
    Certificate,
    Checked,
    Draw,
    Drifts,
    Estimate,
    Labels,
    Margin,
    Observed,
    Proxy,
    Share,
    Shifted,
)
from t3c.core.code_storage import CodeStorage
from t3c.core.errors import ArtifactError
from t3c.core.formats import Dense, LowRank
from t3c.core.gate import GateRow
from t3c.core.manifest import (
    SCHEMA,
    CompiledProfile,
    Manifest,
    Parity,
    Stages,
    TargetInfo,
    TensorSpec,
)
from t3c.core.objective import Mix, Objective
from t3c.core.per_input import PerInput
from t3c.core.profile import Energy, Label, Profile, Timing
from t3c.core.report import ConversionReport, Row
from t3c.core.structure import LEAF

CALIBRATED = Calibrated(
    (Bound(0.9, 0.5, 0.4, 0.3, (0.8, 1.0, 0.9)), Bound(0.99, math.inf, math.inf, 1.0, ())),
    40,
    "ab" * 32,
    (Draw(20, "cd", (0.4, math.inf), (0.9, 1.0), 0.2, 0.95, None),),
    Shifted(7, "ef", (0.5, 1.0), 0.7),
)
OBSERVED = Observed(0.1, 0.1, 0.2, 0.3, 0.01, None, 8, Drifts(0.05, 0.05, 0.1, 0.2, 0.005, 0.25))
PER_INPUT = PerInput(
    (0.5, -1.0), 0.1, -2.0, 3.0, (0.9, 0.99), (1.5, math.inf), (1.2, math.inf), 9, 7, 400
)
LABELS = Labels(
    40, 0.1, 0.05, -0.02, 0.9, 0.92, 0.03, 0.02,
    (Margin(0.0, 0.5, 20, 0.2, -0.03, 0.01), Margin(0.5, 2.0, 20, 0.0, 0.0, None)),
    (Checked(0.9, 0.6, 0.01), Checked(None, 0.1, 0.0)),
)  # fmt: skip


PROXY = Proxy(
    estimates={PAPER: Estimate(4.0, 3.0, 2.0, 0.5), MEASURED: Estimate(0.2, 0.2, 0.1, 0.0)},
    shares={"fc": Share(1.0, 2.0, 1.25, 0.5, {PAPER: 3.0, MEASURED: 0.2})},
    spread=0.05,
    inputs=4,
    gains_measured=1,
    seconds=0.25,
)


def profile(name: str, rank: int) -> CompiledProfile:
    return CompiledProfile(
        Profile(
            name=name,
            formats={"fc": LowRank(rank), "head": Dense(4)},
            macs=10 * rank,
            storage_bytes=100 * rank,
            ram_bytes=200 * rank,
            latency=Timing(1e-3, 2e-3, Label.MEASURED, 100, 2),
            energy=Energy(1e-3, Label.ESTIMATED),
            certificate=Certificate(
                proxy=PROXY,
                calibrated=CALIBRATED,
                observed=OBSERVED,
                labels=LABELS,
                per_input=PER_INPUT,
            ),
        ),
        f"profile_{name}",
        ("fc.low", "fc.high"),
        Parity(1e-6, 2e-2, 1e-2, 4, "emulated"),
    )


def example(**changes: Any) -> Manifest:
    base = Manifest(
        target=TargetInfo("x86", "llvm", "x86_64-linux-gnu", "icelake", ("avx2",), None),
        stages=Stages(True, True, True, True, "device"),
        library="lib/x86.so",
        inputs=(TensorSpec("x", (1, 4), "float32"),),
        outputs=(TensorSpec("y", (1, 2), "float32"),),
        input_tree={"kind": "tuple", "items": [LEAF]},
        output_tree=LEAF,
        profiles=(profile("tiny", 8), profile("max", 16)),
        versions={"t3c": "0.1.0"},
        report=ConversionReport((Row("fc", "linear", "kept", "too small", "rewrite-linear"),)),
        assumptions=("bits: 8",),
        calibration_sha256="aa",
    )
    return replace(base, **changes)


def through_json(manifest: Manifest) -> Any:
    return json.loads(json.dumps(manifest.to_json(), allow_nan=False))


def test_a_manifest_comes_back_equal() -> None:
    assert Manifest.from_json(through_json(example())) == example(created=example().created)


def test_gates_come_back_with_their_objective_and_older_ones_are_about_time() -> None:
    row = GateRow("fc", LowRank(8), 1.0, 2.0, 30.0, 40.0, objective=Objective.MACS)
    one = example(gate=(row,), objective=Objective.MACS)
    data = through_json(one)
    assert Manifest.from_json(data) == one
    for key in ("objective", "cost", "dense_cost"):
        del data["gate"][0][key]
    del data["objective"]
    older = Manifest.from_json(data)
    assert older.objective is Objective.LATENCY
    assert older.gate == (GateRow("fc", LowRank(8), 1.0, 2.0, 1.0, 2.0),)
    data["objective"] = "latency+bytes"
    assert Manifest.from_json(data).objective == Mix((Objective.LATENCY, Objective.BYTES))
    assert Manifest.from_json(data).to_json()["objective"] == "latency+bytes"
    data["objective"] = "speed"
    with pytest.raises(ArtifactError, match="objective is 'speed'; allowed are"):
        Manifest.from_json(data)


def test_how_codes_are_stored_comes_back_and_was_nested_before_there_was_a_choice() -> None:
    one = example(codes=CodeStorage.INDEPENDENT)
    data = through_json(one)
    assert Manifest.from_json(data) == one
    del data["codes"]
    assert Manifest.from_json(data).codes is CodeStorage.NESTED
    data["codes"] = "shared"
    with pytest.raises(ArtifactError, match="codes is 'shared'; allowed are 'nested', 'indep"):
        Manifest.from_json(data)


def test_what_is_unknown_is_none_and_comes_back() -> None:
    bare = replace(profile("max", 16).profile, latency=None, energy=None, certificate=Certificate())
    one = example(
        profiles=(CompiledProfile(bare, "f", ()),), stages=Stages(), calibration_sha256=None
    )
    assert Manifest.from_json(through_json(one)) == one


def test_bounds_of_single_inputs_had_no_teachers_and_no_directions_at_first() -> None:
    data = through_json(example())
    for profile in data["profiles"]:
        for key in ("taught", "directions"):
            profile["certificate"]["per_input"].pop(key)
    found = Manifest.from_json(data).profiles[0].profile.certificate.per_input
    assert found == replace(PER_INPUT, taught=0, directions=0)


def test_certificates_of_earlier_artifacts_lack_what_came_later() -> None:
    data = through_json(example())
    for profile in data["profiles"]:
        del profile["certificate"]["labels"]
        del profile["certificate"]["per_input"]
        del profile["certificate"]["observed"]["teacher"]
        del profile["certificate"]["calibrated"]["draws"]
        del profile["certificate"]["calibrated"]["shifted"]
    found = Manifest.from_json(data).profiles[0].profile.certificate
    assert found.labels is None
    assert found.per_input is None
    assert found.observed == replace(OBSERVED, teacher=None)
    assert found.calibrated == replace(CALIBRATED, draws=(), shifted=None)


def test_unknown_keys_are_ignored() -> None:
    data = through_json(example())
    data["later"] = data["profiles"][0]["later"] = data["target"]["later"] = 1
    Manifest.from_json(data)


def test_the_date_can_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert example().created == "1970-01-01T00:00:00+00:00"


def test_a_line_of_text_says_target_stage_and_profiles() -> None:
    assert str(example()) == "x86, verified (device), profiles tiny, max"
    assert str(example(stages=Stages())) == "x86, not built, profiles tiny, max"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "zip", r"m\.json: format is 'zip'"),
        (("schema",), SCHEMA + 1, r"schema 4 was written by t3c 0\.1\.0"),
        (("target",), None, r"m\.json: target: expected dict, got None"),
        (("target", "features"), [1], r"target\.features: expected strings only"),
        (("stages", "ran"), 1, r"stages\.ran: expected bool, got 1"),
        (("stages", "loaded"), False, r"stages: a later stage needs the earlier"),
        (("stages", "where"), None, r"stages: a library that was loaded needs `where`"),
        (("stages", "where"), "moon", r"stages\.where: 'moon' is none of device, emulated"),
        (("inputs", 0, "shape"), [-1], r"inputs\[0\]\.shape: expected whole numbers >= 0"),
        (("inputs",), [], r"input_tree has 1 leaves for 0 tensors"),
        (("input_tree",), {"kind": "bag"}, r"input_tree\.kind: 'bag' is none of"),
        (("profiles",), [], r"profiles: a chain needs at least one profile"),
        (("profiles", 0), 3, r"profiles\[0\]: expected an object, got 3"),
        (("profiles", 0, "macs"), -1, r"profiles\[0\]\.macs: -1 is negative"),
        (("profiles", 0, "macs"), True, r"profiles\[0\]\.macs: expected int, got True"),
        (("profiles", 0, "name"), "max", r"a name occurs twice in \['max', 'max'\]"),
        (("profiles", 0, "formats", "fc"), "svd-3", r"profiles\[0\]: 'svd-3' spells no format"),
        (("profiles", 0, "formats", "fc"), "lowrank-r32-int8", "a chain must be nested"),
        (("profiles", 0, "latency", "p50_s"), 1.0, r"latency: need 0 < p50_s <= p95_s"),
        (("profiles", 0, "latency", "p50_s"), "fast", r"expected a number or 'inf', got 'fast'"),
        (("profiles", 0, "latency", "p50_s"), float("nan"), r"expected a number or 'inf', got nan"),
        (("profiles", 0, "latency", "label"), "guess", r"latency: 'guess' is not a valid Label"),
        (("profiles", 0, "parity", "where"), "moon", r"parity\.where: 'moon' is none of"),
        (("report", 0, "outcome"), "lost", r"report\[0\]\.outcome: 'lost' is none of"),
        (("library",), "/lib.so", "path '/lib.so' leads outside"),
        (("library",), "", "path '' leads outside"),
        (("files",), [{"path": "../a", "sha256": "", "bytes": 0}], "path '../a' leads outside"),
    ],
)
def test_a_wrong_field_is_named(path: tuple[Any, ...], value: Any, message: str) -> None:
    data = through_json(example())
    part = data
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_json(data, "m.json")


@pytest.mark.parametrize(
    "key",
    sorted(
        set(through_json(example()))
        - {"calibration_sha256", "codes", "gate", "objective", "policy"}
    ),
)
def test_a_missing_field_is_named(key: str) -> None:
    data = through_json(example())
    del data[key]
    with pytest.raises(ArtifactError, match=rf"m\.json: {key}: missing"):
        Manifest.from_json(data, "m.json")


def test_a_newer_schema_of_an_unknown_writer_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"t3c \(unknown version\)"):
        Manifest.from_json({"format": "t3c-artifact", "schema": 9})


def test_sealing_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "x86.so").write_bytes(b"abc")
    sealed = seal(tmp_path, example())
    assert [(f.path, f.bytes) for f in sealed.files] == [("lib/x86.so", 3)]
    assert sealed.files[0].sha256.startswith("ba7816bf")
    assert Artifact.read(tmp_path).manifest == sealed


@pytest.mark.parametrize("content", [None, b"{", b"\xff", b"[]", b"{}"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        Artifact.read(tmp_path)


def test_a_failed_write_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    out = tmp_path / "a"
    with writing(out) as folder:
        seal(folder, example())

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError

    with pytest.raises(RuntimeError), writing(out) as folder:
        fail(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert Artifact.read(out).manifest.target.name == "x86"


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a"
    with writing(out) as folder:
        seal(folder, example())
    rename = os.rename

    def full(source: Path, target: Path) -> None:
        if target == out and source.name != "artifact":
            raise OSError("no space left")
        rename(source, target)

    monkeypatch.setattr("os.rename", full)
    with pytest.raises(OSError, match="no space left"), writing(out) as folder:
        (folder / "new").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert Artifact.read(out).manifest.target.name == "x86"


def test_an_artifact_and_an_empty_folder_are_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    out = tmp_path / "a"
    out.mkdir()
    for content in ("first", "second"):
        with writing(out) as folder:
            (folder / "note").write_text(content)
            seal(folder, example())
        assert (out / "note").read_text() == content
    other = tmp_path / "holiday"
    other.mkdir()
    (other / "photo").write_text("sea")
    file = tmp_path / "file"
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(out)
    for path in (other, file, link):
        with pytest.raises(ArtifactError, match="is no T3C artifact"), writing(path):
            pass
    assert (other / "photo").read_text() == "sea"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file", "holiday", "link"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_atomic(tmp_path / "f", b"one")
    bad: Any = "text"
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "f", bad)
    assert (tmp_path / "f").read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_manifest_of_schema_1_is_read() -> None:
    data = through_json(example())
    data["schema"] = 1
    del data["gate"]
    for profile in data["profiles"]:
        del profile["arena_bytes"]
    read = Manifest.from_json(data)
    assert read.gate == ()
    assert all(p.arena_bytes is None for p in read.profiles)
