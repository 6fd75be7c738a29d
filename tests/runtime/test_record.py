"""What is recorded is what other processes measured, on the safe side."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from t3c.core.artifact import Artifact
from t3c.core.errors import T3CError
from t3c.core.profile import Label
from t3c.runtime import record
from tests.runtime import toy


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return toy.write_native(tmp_path / "a")


def test_a_process_of_its_own_times_every_profile(artifact: Artifact) -> None:
    found = record.samples(artifact, {"x": toy.inputs()}, 3, warmup=1, threads=1)
    assert {name: len(times) for name, times in found.seconds.items()} == {"tiny": 3, "max": 3}
    assert all(second > 0 for times in found.seconds.values() for second in times)
    assert found.threads == 1


def test_a_process_that_fails_says_why(artifact: Artifact) -> None:
    with pytest.raises(T3CError, match=r"(?s)failed: .*unknown input 'y'"):
        record.samples(artifact, {"y": toy.inputs()}, 3)


def test_inputs_may_have_any_name(artifact: Artifact) -> None:
    with pytest.raises(T3CError, match=r"(?s)failed: .*unknown input 'file'"):  # numpy's own word
        record.samples(artifact, {"file": toy.inputs()}, 3)


def test_recorded_times_cover_every_process_and_never_fall(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = iter([1.0, 1.2, 1.1])

    def measured(*args: Any, **more: Any) -> record.Run:
        scale = next(runs)
        times = {"tiny": [2e-3 * scale] * 20, "max": [1e-3 * scale] * 20}
        return record.Run({"seconds": times, "threads": 2})

    monkeypatch.setattr(record, "samples", measured)
    found = record.record(artifact, {}, processes=3, calls=20)
    again = Artifact.read(artifact.path)
    again.verify()
    assert again.manifest == found.manifest
    tiny, largest = (c.profile.latency for c in found.manifest.profiles)
    assert tiny is not None
    assert largest is not None
    assert (tiny.label, tiny.calls, tiny.threads) == (Label.MEASURED, 60, 2)
    assert tiny.p50_s == 2.2e-3
    assert tiny.p95_s > 2.4e-3
    assert (largest.p50_s, largest.p95_s) == (tiny.p50_s, tiny.p95_s)
    unchanged = [replace(c.profile, latency=None) for c in found.manifest.profiles]
    assert unchanged == [replace(c.profile, latency=None) for c in artifact.manifest.profiles]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"processes": 2}, "processes is 2; allowed are 3 to 11"),
        ({"processes": 12}, "processes is 12"),
        ({"calls": 19}, "calls is 19; a 95th percentile needs at least 20"),
    ],
)
def test_too_little_is_refused(artifact: Artifact, options: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        record.record(artifact, {}, **options)
