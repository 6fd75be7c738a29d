import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from t3c.controller.damage import Menu, measure
from t3c.controller.ledger import Ledger, Origin, verify
from t3c.controller.plan import plan
from t3c.controller.suffix import Suffix
from t3c.core.errors import T3CError
from t3c.core.formats import Dense, LowRank
from t3c.core.profile import Label
from t3c.elastic.model import ElasticModel
from tests.controller.models import mlp, more
from tests.controller.test_plan import STEEP

ROOT = Path(__file__).parents[2]


def menu_of(model: ElasticModel) -> Menu:
    return {
        name: [Dense(8), *(LowRank(r) for r in (32, 16) if r < site.full_rank)]
        for name, site in model.sites.items()
    }


def whole(folder: Path, workers: int = 1) -> Path:
    path = folder / f"whole{workers}.jsonl"
    model = mlp()
    measure(model, more(model, 3), menu_of(model), table=path, workers=workers)
    return path


class Stop(Exception):
    """The run is interrupted."""


def stopping(after: int) -> Callable[[str, int, int], None]:
    def tell(what: str, done: int, total: int) -> None:
        if what == "measuring damage" and done >= after:
            raise Stop

    return tell


@pytest.mark.parametrize("after", [1, 7, 11])
def test_an_interrupted_table_resumes_to_the_same_bytes(tmp_path: Path, after: int) -> None:
    path = tmp_path / "table.jsonl"
    model = mlp()
    with pytest.raises(Stop):
        measure(
            model, more(model, 3), menu_of(model), table=path, workers=1, progress=stopping(after)
        )
    part = tmp_path / "table.jsonl.part"
    assert not path.exists()
    measured = part.read_text().count("\n") - 1
    assert after <= measured < 24
    counted: list[int] = []
    fresh = mlp()
    measure(
        fresh,
        more(fresh, 3),
        menu_of(fresh),
        table=path,
        workers=2,
        progress=lambda what, done, total: counted.append(done) if total > 1 else None,
    )
    assert len(counted) == sum(map(len, menu_of(model).values())) * 3 - measured
    assert path.read_bytes() == whole(tmp_path).read_bytes()
    assert not part.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from t3c.controller.damage import measure
from tests.controller.models import mlp, more
from tests.controller.test_ledger import menu_of
def tell(what, done, total):
    if what == "measuring damage" and done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
model = mlp()
measure(model, more(model, 3), menu_of(model), table=Path(sys.argv[1]), progress=tell)
"""


def test_a_killed_process_loses_nothing_that_it_told(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    found = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, check=False)
    assert found.returncode == -signal.SIGKILL
    assert (tmp_path / "table.jsonl.part").read_text().count("\n") >= 6
    model = mlp()
    measure(model, more(model, 3), menu_of(model), table=path)
    assert path.read_bytes() == whole(tmp_path).read_bytes()


def test_the_number_of_workers_changes_no_bit(tmp_path: Path) -> None:
    assert whole(tmp_path, 1).read_bytes() == whole(tmp_path, 3).read_bytes()


def test_a_finished_table_is_read_and_nothing_is_measured(tmp_path: Path) -> None:
    path = whole(tmp_path)
    model = mlp()
    told: list[str] = []
    again = measure(
        model,
        more(model, 3),
        menu_of(model),
        table=path,
        progress=lambda what, *_: told.append(what),
    )
    assert not told
    assert again.entries == measure(model, more(model, 3), menu_of(model)).entries
    assert again.count(Label.MEASURED) == sum(map(len, menu_of(model).values()))


def test_a_run_whose_time_is_over_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    model = mlp()
    short = measure(model, more(model, 3), menu_of(model), table=path, seconds=0)
    assert short.count(Label.ESTIMATED) > 0
    assert not path.exists()
    measure(model, more(model, 3), menu_of(model), table=path)
    assert path.read_bytes() == whole(tmp_path).read_bytes()


def test_a_killed_plan_resumes_to_the_same_chain_and_bytes(tmp_path: Path) -> None:
    def planned(path: Path, progress: Callable[[str, int, int], None] | None = None) -> object:
        model = mlp()
        return plan(model, more(model, 5), STEEP, profiles=3, table=path, progress=progress).chain

    path = tmp_path / "table.jsonl"
    with pytest.raises(Stop):
        planned(path, stopping(20))
    assert planned(path) == planned(tmp_path / "other.jsonl")
    assert path.read_bytes() == (tmp_path / "other.jsonl").read_bytes()


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = mlp()
    measure(model, more(model, 3), menu_of(model))
    assert not list(tmp_path.iterdir())


# -- damaged files ----------------------------------------------------------------------------


@pytest.fixture
def part(tmp_path: Path) -> Path:
    model = mlp()
    with pytest.raises(Stop):
        measure(
            model,
            more(model, 3),
            menu_of(model),
            table=tmp_path / "table.jsonl",
            workers=1,
            progress=stopping(6),
        )
    return tmp_path / "table.jsonl.part"


def resume(part: Path, model: ElasticModel | None = None, batches: int = 3) -> Path:
    path = part.with_suffix("")
    model = mlp() if model is None else model
    measure(model, more(model, batches), menu_of(model), table=path)
    return path


@pytest.mark.parametrize("cut", [1, 30, 10_000])
def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path, part: Path, cut: int) -> None:
    text = part.read_bytes()
    part.write_bytes(text[: max(10, len(text) - cut)])
    assert resume(part).read_bytes() == whole(tmp_path).read_bytes()


def test_a_changed_digit_is_refused_by_line(part: Path) -> None:
    lines = part.read_text().splitlines(keepends=True)
    place = lines[3].index('"drift":') + 10
    lines[3] = lines[3][:place] + str((int(lines[3][place]) + 1) % 10) + lines[3][place + 1 :]
    part.write_text("".join(lines))
    with pytest.raises(T3CError, match=r"jsonl\.part, line 4 is damaged; delete that line.*checks"):
        resume(part)
    with pytest.raises(T3CError, match="line 4"):  # also before any other work
        verify(part.with_suffix(""))
    del lines[3]
    part.write_text("".join(lines))
    resume(part)


@pytest.mark.parametrize(
    ("line", "why"),
    [("{}\n", "checksum"), ("[1]\n", "no JSON object"), ("\0\0\n", "no JSON")],
)
def test_rubbish_is_refused_by_line(part: Path, line: str, why: str) -> None:
    count = part.read_text().count("\n")
    with part.open("a") as file:
        file.write(line)
    with pytest.raises(T3CError, match=f"line {count + 1} is damaged.*{why}"):
        resume(part)


def test_a_repeated_row_is_refused(part: Path) -> None:
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join([*lines, lines[2]]))
    with pytest.raises(T3CError, match=f"line {len(lines) + 1} .*repeats"):
        resume(part)


def test_rows_of_another_table_are_refused(part: Path, tmp_path: Path) -> None:
    model = mlp()
    other = tmp_path / "other.jsonl"
    measure(model, more(model, 2), menu_of(model), table=other, seconds=0.0)
    foreign = Ledger(other, Origin.of(model, more(model, 2), menu_of(model)), menu_of(model))
    foreign.add("head", Dense(8), 1, 0.5, 2.0)
    foreign.__exit__()
    row = (tmp_path / "other.jsonl.part").read_text().splitlines(keepends=True)[-1]
    with part.open("a") as file:
        file.write(row)
    with pytest.raises(T3CError, match="checksum"):
        resume(part)


def test_entries_that_are_not_on_the_menu_are_refused(part: Path) -> None:
    model = mlp()
    origin = Origin.of(model, more(model, 3), menu_of(model))
    count = part.read_text().count("\n")
    with Ledger(part.with_suffix(""), origin, menu_of(model)) as ledger:
        ledger.add("head", LowRank(5), 0, 0.5, 2.0)
    with pytest.raises(T3CError, match=f"line {count + 1} .*not wanted"):
        resume(part)


def test_rows_without_numbers_are_refused(part: Path) -> None:
    model = mlp()
    origin = Origin.of(model, more(model, 3), menu_of(model))
    count = part.read_text().count("\n")
    with Ledger(part.with_suffix(""), origin, menu_of(model)) as ledger:
        ledger.add("head", Dense(8), 2, "0.5", 2.0)  # type: ignore[arg-type]
    with pytest.raises(T3CError, match=f"line {count + 1} .*no numbers"):
        resume(part)


def test_other_weights_inputs_or_menus_are_refused_and_named(part: Path) -> None:
    changed = mlp()
    with torch.no_grad():
        changed.layers["head"].weight[0, 0] += 1
    with pytest.raises(T3CError, match=r"line 1: .*other weights, codes; delete the file"):
        resume(part, changed)
    with pytest.raises(T3CError, match=r"other inputs, batches \(3, now 2\)"):
        resume(part, batches=2)
    model = mlp()
    with pytest.raises(T3CError, match="other codes, menu"):
        measure(model, more(model, 3), {"head": [Dense(8)]}, table=part.with_suffix(""))


def test_a_newer_schema_is_refused(part: Path) -> None:
    header, *rest = part.read_text().splitlines(keepends=True)
    part.write_text(header.replace('"damage-table":1', '"damage-table":2') + "".join(rest))
    with pytest.raises(T3CError, match="schema 2 is newer than 1"):
        resume(part)


def test_a_changed_header_is_refused(part: Path) -> None:
    text = part.read_text()
    part.write_text(text.replace('"method":"1"', '"method":"0"', 1))
    with pytest.raises(T3CError, match=r"line 1 is damaged .*no header"):
        resume(part)


def test_a_file_of_something_else_is_left_alone(part: Path) -> None:
    part.write_bytes(b"something of the user's own")
    with pytest.raises(T3CError, match=r"line 1 is damaged .*no header"):
        resume(part)
    assert part.read_bytes() == b"something of the user's own"


def test_a_folder_is_refused(tmp_path: Path) -> None:
    model = mlp()
    with pytest.raises(T3CError, match="is a folder; name a file"):
        plan(model, more(model, 2), STEEP, table=tmp_path)


def test_a_table_in_use_is_refused(part: Path) -> None:
    model = mlp()
    origin = Origin.of(model, more(model, 3), menu_of(model))
    with (
        Ledger(part.with_suffix(""), origin, menu_of(model)),
        pytest.raises(T3CError, match="another run is measuring"),
    ):
        resume(part)


def test_a_finished_table_must_be_whole(tmp_path: Path) -> None:
    path = whole(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    model = mlp()

    def read() -> None:
        measure(model, more(model, 3), menu_of(model), table=path)

    path.write_text("".join(lines[:-1]))
    with pytest.raises(T3CError, match=f"line {len(lines)} is damaged .*missing"):
        read()
    path.write_text("".join([*lines[:2], lines[3], lines[2], *lines[4:]]))
    with pytest.raises(T3CError, match=r"line 3 is damaged .*out of order"):
        read()
    path.write_text("".join(lines)[:-5])
    with pytest.raises(T3CError, match=f"line {len(lines)} is damaged .*cut off"):
        read()
    for other in ("", "import os\n"):
        path.write_text(other)
        with pytest.raises(T3CError, match=r"line 1 is damaged .*; name another file, or delete"):
            read()


def test_damages_survive_the_file_to_the_bit(tmp_path: Path) -> None:
    model = mlp()
    table = measure(model, more(model, 3), menu_of(model), table=tmp_path / "t")
    rows = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()[1:]]
    for row in rows:
        fmts = table.entries[row["site"]]
        (entry,) = [e for f, e in fmts.items() if str(f) == row["option"]]
        assert entry.damage >= row["damage"]
        assert math.isfinite(row["damage"])
    smallest = rows[0]
    assert table.entries[smallest["site"]][Dense(8)].damage == smallest["damage"]


def test_less_than_one_worker_is_refused() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="0 workers; the damage table needs at least 1"):
        measure(model, more(model, 1), menu_of(model), workers=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("step", "seconds"), [("drift", math.inf), ("local", 0.0)])
def test_a_damage_that_is_no_number_is_refused_by_site_and_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, step: str, seconds: float
) -> None:
    model, path = mlp(), tmp_path / "t.jsonl"
    honest: Callable[[Suffix, str], float] = getattr(Suffix, step)

    def broken(suffix: Suffix, site: str) -> float:
        found = honest(suffix, site)
        return value if suffix.elastic.layers["fc0"].format == LowRank(16) else found

    monkeypatch.setattr(Suffix, step, broken)
    with pytest.raises(T3CError, match="'fc0' as lowrank-r16-int8: the damage is not finite"):
        measure(model, more(model, 1), menu_of(model), seconds=seconds, table=path)
    assert all(word not in (tmp_path / "t.jsonl.part").read_text() for word in ("NaN", "Infinity"))


def test_an_output_that_is_not_finite_is_refused_by_batch() -> None:
    model = mlp()
    (good,) = more(model, 1)
    with pytest.raises(T3CError, match="not finite on calibration batch 1"):
        measure(model, [good, (torch.full_like(good[0], math.inf),)], menu_of(model))
