import json
from dataclasses import replace
from pathlib import Path

import pytest

from t3c.core.errors import CostModelError
from t3c.cost_models.dataset import Dataset, Sample
from tests.cost_models.measured import DEVICE, dataset, kernels, profiles, sample


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    written = dataset(tmp_path / "rows.jsonl", 60, 3)
    read = Dataset.read(tmp_path / "rows.jsonl")
    assert read.rows == written.rows
    assert read.device == DEVICE
    assert len(read.kernels) >= 60
    assert {p.network for p in read.profiles} == {"net0", "net1", "net2"}


def test_a_row_that_is_there_stays_as_it_was(tmp_path: Path) -> None:
    made = dataset(tmp_path / "rows.jsonl", 12, 2)
    before = made.path.read_bytes()
    again = [replace(row, seconds=sample(9.0)) for row in made.kernels]
    Dataset.open(made.path, DEVICE, print).append(again, DEVICE)
    assert made.path.read_bytes() == before


def test_half_a_line_is_dropped_and_told_and_nothing_else_is_lost(tmp_path: Path) -> None:
    made = dataset(tmp_path / "rows.jsonl", 12, 2)
    whole = made.path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in (1, len(last) // 2, len(last) - 1):
        made.path.write_bytes(whole[:-cut])
        told: list[str] = []
        found = Dataset.open(made.path, DEVICE, told.append)
        assert list(found.rows) == list(made.rows)[:-1]
        assert "dropped half a line" in told[0]
        found.append(profiles(2), DEVICE)
        assert Dataset.read(made.path).rows == made.rows


def test_reading_leaves_half_a_line_in_the_file(tmp_path: Path) -> None:
    made = dataset(tmp_path / "rows.jsonl", 12, 2)
    made.path.write_bytes(made.path.read_bytes()[:-5])
    before = made.path.read_bytes()
    assert len(Dataset.read(made.path).rows) == len(made.rows) - 1
    assert made.path.read_bytes() == before


@pytest.mark.parametrize("damage", ["digit", "text", "empty"])
def test_a_corrupted_row_is_refused_by_its_line(tmp_path: Path, damage: str) -> None:
    made = dataset(tmp_path / "rows.jsonl", 12, 2)
    lines = made.path.read_text().splitlines(keepends=True)
    at = lines[4].index('"p50_s": ') + len('"p50_s": ')
    digit = "8" if lines[4][at] != "8" else "9"
    changed = lines[4][:at] + digit + lines[4][at + 1 :]
    lines[4] = {"digit": changed, "text": "not json\n", "empty": "\n"}[damage]
    made.path.write_text("".join(lines))
    before = made.path.read_bytes()
    with pytest.raises(CostModelError, match=r"rows\.jsonl, line 5: corrupted"):
        Dataset.open(made.path, DEVICE, print)
    assert made.path.read_bytes() == before


def test_rows_of_another_device_are_refused(tmp_path: Path) -> None:
    made = dataset(tmp_path / "rows.jsonl", 12, 2)
    other = replace(DEVICE, cpu="Other 9/9/9")
    before = made.path.read_bytes()
    with pytest.raises(CostModelError, match=r"another device: cpu 'Invented 1/2/3', not 'Other"):
        Dataset.open(made.path, other, print)
    with pytest.raises(CostModelError, match="rows are of another device than"):
        made.append(kernels(3, seed=7), other)
    assert made.path.read_bytes() == before


def test_rows_of_other_library_versions_are_refused(tmp_path: Path) -> None:
    made = dataset(tmp_path / "rows.jsonl", 12, 2)
    newer = replace(DEVICE, versions={"t3c": "1", "apache-tvm": "3"})
    with pytest.raises(CostModelError, match="versions"):
        Dataset.open(made.path, newer, print)


def test_newer_and_missing_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(CostModelError, match="no such file; `t3c measure --out"):
        Dataset.read(path)
    path.write_text('{"half a head')
    with pytest.raises(CostModelError, match="no whole line"):
        Dataset.read(path)
    import zlib

    head = {"schema": 99, "device": DEVICE.to_json()}
    check = zlib.crc32(json.dumps(head, sort_keys=True).encode())
    path.write_text(json.dumps({**head, "crc": check}) + "\n")
    with pytest.raises(CostModelError, match="has schema 99; this version reads up to 1"):
        Dataset.read(path)
    line = dataset(tmp_path / "other.jsonl", 6, 2).path.read_text().splitlines(keepends=True)[1]
    for other in (line, "import os\n", "[]\n"):
        path.write_text(other)
        with pytest.raises(CostModelError, match="line 1: no header of measurements"):
            Dataset.read(path)


@pytest.mark.parametrize("p50", [0.0, -1.0, float("nan"), float("inf"), 3.0])
def test_times_that_are_none_are_refused(p50: float) -> None:
    with pytest.raises(ValueError, match="need 0 < p50_s <= p90_s"):
        Sample(p50, 1.0, 2.0, 5)
