"""A network is tuned by its own operators, and rebuilt from records without a search."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import t3c
from t3c.api import elasticize
from t3c.codegen import families
from t3c.codegen.families import families_of, scheduled, tuned_schedules
from t3c.codegen.kernels.schedule import Op, Schedule
from t3c.codegen.tune import network
from t3c.codegen.tune.machine import this_machine
from t3c.codegen.tune.records import Record, write
from t3c.codegen.tune.search import RECORDS, Progress, Task, Tuner
from t3c.core.errors import LoweringError, TargetError
from t3c.core.formats import Dense
from t3c.passes.pipeline import lowering_graph
from t3c.targets import detect_host
from t3c.targets.base import TargetSpec

HOST = detect_host()
FAR = replace(HOST, name="far", features=frozenset({"no_such_feature"}))
OPS = (Op.of("dense", "gelu", m=50, n=96, k=64), Op.of("dense", m=50, n=40, k=96))
MODEL = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40)).eval()
INPUTS = (torch.randn(50, 64),)

pytestmark = pytest.mark.skipif(
    HOST.linear not in ("x86-vnni", "x86-avx2"), reason="needs AVX2 or VNNI as the best level"
)


def test_operators_are_those_of_the_profiles_with_their_calls() -> None:
    elastic = elasticize(MODEL, INPUTS)
    formats = dict.fromkeys(elastic.sites, Dense(8))
    found = network.operators(
        torch.export.export(lowering_graph(elastic.graph), INPUTS, strict=False),
        elastic.sites,
        {site: elastic.codes(site, {fmt}) for site, fmt in formats.items()},
        {"max": formats, "same": formats},
        HOST,
    )
    assert found == dict.fromkeys(OPS, 2)


def sources(spec: TargetSpec, tuned: dict[str, Schedule] | None = None) -> list[str]:
    (family, *_) = scheduled(families_of(spec, tuned))
    return [family.kernel(op).source for op in OPS]


def other_schedules() -> list[Record]:
    """For each operator one that is not the rule's."""
    (family, *_) = scheduled(families_of(HOST))
    found = []
    for op in OPS:
        choice = next(s for s in family.schedules(op) if s != family.pick(op))
        found.append(Record(family.name, op, choice, 0.5, 1.0))
    return found


def test_records_rebuild_the_same_kernels(tmp_path: Path) -> None:
    write(tmp_path / RECORDS, this_machine(), records := other_schedules())
    tuned, skipped = tuned_schedules(HOST, tmp_path / RECORDS)
    assert skipped == ()
    assert tuned == {r.op.key: r.schedule for r in records}
    built = sources(HOST, tuned)
    assert built == sources(HOST, tuned_schedules(HOST, tmp_path / RECORDS)[0])
    assert all(a != b for a, b in zip(built, sources(HOST), strict=True))


def test_the_packages_records_go_before_the_rule_and_behind_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "shipped.jsonl", this_machine(), records := other_schedules())
    monkeypatch.setattr(families, "shipped", lambda name: tmp_path / "shipped.jsonl")
    (family, *_) = scheduled(families_of(HOST))
    assert [family.pick(op) for op in OPS] == [r.schedule for r in records]
    mine = {OPS[0].key: family.default(OPS[0])}
    (family, *_) = scheduled(families_of(HOST, mine))
    assert [family.pick(op) for op in OPS] == [family.default(OPS[0]), records[1].schedule]


def lower(out: Path, folder: Path, minutes: float, told: list[str]) -> list[str]:
    artifact = t3c.lower(
        MODEL,
        HOST,
        INPUTS,
        out,
        profiles=1,
        plan_seconds=0.1,
        calls=0,
        tune_minutes=minutes,
        tune_folder=folder,
        say=told.append,
    )
    return [c.profile.name for c in artifact.manifest.profiles]


def test_lower_tunes_and_later_takes_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[float] = []

    def run(self: Tuner, tasks: list[Task], minutes: float, progress: Progress) -> None:
        ran.append(minutes)
        assert {t.op for t in tasks} == set(OPS)
        write(self.folder / RECORDS, self.machine, other_schedules())

    monkeypatch.setattr(Tuner, "run", run)
    lower(tmp_path / "a", tmp_path / "tuned", 0.5, [])
    with (tmp_path / "tuned" / RECORDS).open("a") as stream:
        stream.write("half a li\n")
    told: list[str] = []
    lower(tmp_path / "b", tmp_path / "tuned", 0.0, told)
    assert ran == [0.5]
    assert sum("records.jsonl: 1 record skipped (line 3): no JSON object" in t for t in told) == 1


def test_without_a_search_the_folder_must_hold_records(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="cannot read tuning records"):
        lower(tmp_path / "a", tmp_path / "none", 0.0, [])


def test_only_this_machine_can_be_tuned_for(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"is no 'far'; lower there, or bring"):
        t3c.lower(MODEL, FAR, INPUTS, tmp_path / "a", tune_minutes=1)
