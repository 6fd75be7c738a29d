"""Write the tables of docs/benchmarks.md and README.md from the recorded results.

Run it as ``python -m benchmarks.docs_tables``.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
SHORT = re.compile(r"(<!-- ratios: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
PLACE = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
PEERS = ("OpenVINO int8", "ORT int8 static", "ORT int8 dynamic", "torch int8 dynamic")
OURS = ("t3c max", "t3c half", "t3c quarter", "t3c eighth")


def main() -> None:
    """Replace every marked part."""
    text = DOCS.read_text()
    DOCS.write_text(PLACE.sub(lambda m: m[1] + table(m[2]) + m[3], text))
    text = README.read_text()
    README.write_text(SHORT.sub(lambda m: m[1] + ratios(m[2]) + m[3], text))


def records_of(folder: str) -> list[dict[str, Any]]:
    """All networks of one results folder."""
    files = sorted((ROOT / "benchmarks" / "results" / folder).glob("*.json"))
    return [r for r in map(_read, files) if "rows" in r]


def ratios(folder: str) -> str:
    """A short table: the fastest int8 peer, our ratios to it, both errors."""
    lines = [
        "| | fastest int8 peer | ms | its error | max | its error | half | quarter | eighth |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records_of(folder):
        column = _column(record)
        rows = {row["name"]: row for row in record["rows"]}
        if "t3c max" not in rows:
            continue
        best = min((r for r in rows.values() if r["kind"] == "int8"), key=lambda r: r[column])
        cells = [best["name"], f"{best[column]:.1f}", f"{best['error']:.2g}"]
        mine = {name: rows[name][column] / best[column] for name in OURS}
        cells += [f"**{mine[OURS[0]]:.2f}**", f"{rows[OURS[0]]['error']:.2g}"]
        cells += [f"{mine[name]:.2f}" for name in OURS[1:]]
        lines.append(f"| {record['title']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _column(record: dict[str, Any]) -> str:
    """What counts: wall time where several threads work, else processor time."""
    return "p50_ms" if record["threads"] > 1 else "cpu_ms"


def table(folder: str) -> str:
    """One results folder: milliseconds and ratios, then errors, then what is absent."""
    records = records_of(folder)
    if not records:
        return "Not measured yet.\n"
    column = _column(records[0])
    lines = [
        f"| | {' | '.join((*PEERS, *OURS))} | errors of the same |",
        f"|---{'|---' * (len(PEERS) + len(OURS) + 1)}|",
    ]
    lines += [_line(record, column) for record in records]
    lines.append("")
    lines += [
        f"- {record['title']}: {name} is absent: {why}"
        for record in records
        for name, why in record["absent"].items()
    ]
    machine = records[0]["machine"]
    features = ", ".join(machine["features"])
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    dates = sorted(record["machine"]["date"] for record in records)
    commits = ", ".join(dict.fromkeys(record["machine"]["commit"] for record in records))
    lines.append(
        f"\n{'Wall' if column == 'p50_ms' else 'Processor'} milliseconds, medians; in brackets the "
        f"ratio to the fastest int8 peer. {machine['cpu']} ({features}), {machine['cores']} cores, "
        f"{dates[0][:16]} to {dates[-1][:16]}, commits {commits}; {versions}.\n"
    )
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _line(record: dict[str, Any], column: str) -> str:
    rows = {row["name"]: row for row in record["rows"]}
    best = min(row[column] for row in rows.values() if row["kind"] == "int8")
    cells, errors = [], []
    for name in (*PEERS, *OURS):
        row = rows.get(name)
        cells.append("-" if row is None else f"{row[column]:.1f} ({row[column] / best:.2f})")
        errors.append("-" if row is None or row["error"] is None else f"{row['error']:.2g}")
    return f"| {record['title']} | {' | '.join(cells)} | {' / '.join(errors)} |"


if __name__ == "__main__":
    main()
