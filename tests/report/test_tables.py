"""Tables show every number with its label, and a dash where nothing is known."""

import math

import pytest
from rich.console import Console
from rich.table import Table

from t3c.core.certificate import (
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
from t3c.core.formats import Dense, LowRank
from t3c.core.manifest import CompiledProfile, Parity
from t3c.core.per_input import PerInput
from t3c.core.profile import Energy, Label, Profile, Timing
from t3c.core.report import ConversionReport, Row
from t3c.report import tables

BARE = Profile("tiny", {"fc": LowRank(8)}, 2_000_000, 3_000_000, 4_000_000)
PROXY = Proxy(
    {PAPER: Estimate(1.5, 1.5, 1.0, 0.1), "kronecker-rss": Estimate(0.5, 0.5, 0.4, 0.1)},
    {
        "fc": Share(1.0, 1.0, 1.0, 0.1, {PAPER: 1.0, "kronecker-rss": 0.3}),
        "head": Share(1.0, 0.5, 1.0, 0.1, {PAPER: 0.5, "kronecker-rss": 0.4}),
    },
    0.0, 8, 2, 0.1,
)  # fmt: skip
UNBOUNDED = Calibrated(
    (Bound(0.9, math.inf, math.inf, 0.1, (1.0,)),),
    4,
    "ab" * 32,
    (Draw(2, "cd" * 32, (math.inf,), (1.0,), 0.2, 0.75, None),),
    Shifted(7, "ef" * 32, (0.5,), 0.7),
)
OBSERVED = Observed(0.1, 0.1, 0.25, 0.3, 0.01, None, 8, Drifts(0.1, 0.1, 0.2, 0.3, 0.02, None))
PER_INPUT = PerInput((0.5,), 0.1, -2.0, 3.0, (0.9,), (1.5,), (1.25,), 9)
LABELS = Labels(
    8, 0.25, 0.125, -0.02, 0.875, 0.75, 0.03, 0.02,
    (Margin(0.0, 0.5, 4, 0.5, -0.03, 0.01), Margin(0.5, 2.0, 4, 0.0, -0.01, 0.0)),
    (Checked(0.9, 0.5, 0.0), Checked(None, 0.25, 0.0)),
)  # fmt: skip
FULL = Profile(
    "max",
    {"fc": Dense(8)},
    5_000_000,
    6_000_000,
    7_000_000,
    Timing(1e-3, 2e-3, Label.MEASURED, 9),
    Energy(3e-3, Label.ESTIMATED),
    Certificate(PROXY, None, UNBOUNDED, OBSERVED, LABELS, PER_INPUT),
)


def text(table: Table) -> list[list[str]]:
    console = Console(width=400, no_color=True)
    with console.capture() as capture:
        console.print(table)
    lines = capture.get().splitlines()
    return [[cell.strip() for cell in line.split("│")] for line in lines if "│" in line]


def test_a_profile_row_has_costs_labels_and_drift() -> None:
    rows = text(tables.profiles([BARE, FULL]))
    assert rows[0] == ["tiny", "2", "3", "4"] + ["-"] * 13
    assert rows[1][1:8] == ["5", "6", "7", "1", "2", "measured", "3 (estimated)"]
    assert rows[1][8:] == ["1.5", "0.5", "-", "inf", "0.25", "0.01", "0.2", "0.02", "-"]


def test_a_certificate_shows_draws_shifted_data_and_labels() -> None:
    chain = [CompiledProfile(BARE, "f", ()), CompiledProfile(FULL, "f", ())]
    assert text(tables.draws(chain)) == [
        ["max", "cdcdcdcd", "inf", "100.00", "0.2", "75.00", "-", "2"]
    ]
    assert text(tables.shifted(chain)) == [["max", "50.00", "0.7", "7"]]
    (row,) = text(tables.labels(chain))
    assert row[:6] == ["max", "25.00", "50.0/0.0", "12.50", "-2.00", "-3.0/-1.0"]
    assert row[6:] == ["87.50 (75.00)", "3.00 (2.00)", "+1.0/+0.0", "8"]
    assert text(tables.certified(chain)) == [["max", "50.00", "0.00", "25.00", "0.00", "8"]]
    heads = [str(c.header) for c in tables.certified(chain).columns]
    assert heads[1:5] == ["90% certifies %", "and flip %", "sound certifies %", "and flip %"]
    assert text(tables.per_input(chain)) == [["max", "1.25", "9"]]
    assert len(tables.certificates(chain)) == 6
    assert tables.certificates(chain[:1]) == []


def test_layers_are_listed_by_their_share_of_the_drift() -> None:
    rows = text(tables.drift([CompiledProfile(FULL, "f", ())]))
    assert rows == [["head", "64"], ["fc", "36"], ["all layers, ||dz||", "0.5"]]
    assert text(tables.drift([CompiledProfile(BARE, "f", ())])) == []


def test_parity_of_a_compiled_profile_is_shown() -> None:
    parity = Parity(1e-6, 2e-2, 1e-2, 4, "emulated")
    assert text(tables.profiles([CompiledProfile(FULL, "f", (), parity)]))[0][-1] == (
        "1e-06 (emulated)"
    )


def test_layers_are_rows_and_profiles_columns() -> None:
    assert text(tables.layers([BARE, FULL])) == [["fc", "lowrank-r8-int8", "dense-int8"]]


def test_the_report_keeps_every_row() -> None:
    report = ConversionReport((Row("a.b", "conv2d", "kept", "groups=4", "rewrite-conv"),))
    assert text(tables.conversion(report)) == [
        ["a.b", "conv2d", "kept", "groups=4", "rewrite-conv"]
    ]


def test_bench_compares_with_the_last_row() -> None:
    fast = tables.BenchRow("tiny", Timing(1e-3, 2e-3, Label.MEASURED, 5), 1.5e-3, 9e-4)
    slow = tables.BenchRow("max", Timing(2e-3, 4e-3, Label.MEASURED, 5), 3e-3, 1e-3)
    rows = text(tables.bench([fast, slow]))
    assert rows[0] == ["tiny", "1", "1.5", "2", "0.9", "0.50x", "5"]
    assert rows[1][5] == "1.00x"
    assert slow.to_json()["p90_s"] == 3e-3


def test_plain_rows_take_their_headings_from_the_keys() -> None:
    table = tables.plain([{"a": 1.23456, "b": "x"}])
    assert [column.header for column in table.columns] == ["a", "b"]
    assert text(table) == [["1.235", "x"]]
    assert not tables.plain([]).columns


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (math.inf, "inf"), (0.0, "0"), (12345.0, "1.23e+04")]
)
def test_numbers(value: float | None, shown: str) -> None:
    assert tables.number(value) == shown
