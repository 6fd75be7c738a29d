"""Records survive what stands beside them; what cannot be used is skipped and told."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from t3c.codegen.kernels.schedule import Op
from t3c.codegen.tune.records import Read, Record, read, write
from t3c.core.errors import LoweringError
from tests.codegen.tune.families import MACHINE, OP, CountFamily, Rounds

RECORD = Record("count", OP, Rounds(20, 0), 0.5, 12.5)
KNOWN = {"count", "other"}


def load(path: Path) -> Read:
    return read(path, [CountFamily()], MACHINE, KNOWN)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    write(path, MACHINE, [RECORD])
    assert load(path) == Read({OP.key: RECORD})
    assert load(path).schedules == {OP.key: Rounds(20, 0)}


def test_a_later_record_replaces_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write(path, MACHINE, [RECORD])
    better = replace(RECORD, schedule=Rounds(100, 0))
    write(path, MACHINE, [better])
    assert load(path).records == {OP.key: better}
    assert len(path.read_text().splitlines()) == 1


def changed(**fields: object) -> str:
    data = {
        "schema": 1,
        "family": "count",
        "machine": MACHINE.key,
        "op": OP.key,
        "schedule": {"rounds": 20, "broken": 0},
        "ratio": 0.5,
        "us": 1.0,
    }
    return json.dumps(data | fields)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{half a li", "no JSON object"),
        ("[1]", "no JSON object"),
        (changed(schema=2), "schema 2, this version of t3c reads 1"),
        (changed(family="new"), "unknown kernel family 'new'"),
        (changed(machine="x"), "measured on 'x', this machine is 'test 1 2, L1 32 KB, L2 1024 KB'"),
        (changed(op="dense m=1"), "no operator of 'count' with this schedule; tune it again"),
        (changed(op=7), "no operator of 'count' with this schedule"),
        (changed(schedule={"rounds": 21, "broken": 0}), "no operator of 'count' with this"),
        (changed(schedule=None), "no operator of 'count' with this schedule"),
        (changed(us="fast"), "no operator of 'count' with this schedule"),
    ],
)
def test_a_line_of_no_use_is_skipped_told_and_kept(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "records.jsonl"
    write(path, MACHINE, [RECORD])
    with path.open("a") as stream:
        stream.write(f"{line}\n")
    other = replace(RECORD, op=Op.of("count", n=1))
    write(path, MACHINE, [other])
    found = load(path)
    assert found.records == {OP.key: RECORD, other.op.key: other}
    (told,) = found.skipped
    assert told.startswith("records.jsonl: 1 record skipped (line 2): ")
    assert why in told
    assert path.read_text().splitlines()[1] == line


def test_lines_of_other_families_are_left_alone_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(changed(family="other") + "\n\n")
    assert load(path) == Read({})


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"cannot read tuning records .*name a file that"):
        load(tmp_path / "none.jsonl")
