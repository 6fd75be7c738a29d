"""Every network of a results folder in one picture: time as a ratio to the fastest int8 peer."""

import json
from pathlib import Path
from typing import Any

SHOWN = (
    ("torch int8 dynamic", "0.75"),
    ("ORT int8 static", "0.6"),
    ("ORT int8 dynamic", "0.45"),
    ("OpenVINO int8", "0.2"),
    ("t3c max", "C0"),
    ("t3c half", "C2"),
    ("t3c quarter", "C1"),
    ("t3c eighth", "C3"),
)
CUT = 3.0
"""Bars end here; a longer one gets its number."""


def draw(results: Path, file: Path) -> None:
    """Draw a bar for each contestant of each network; the line at 1 is the fastest int8 peer."""
    import matplotlib.figure

    records = [json.loads(p.read_text()) for p in sorted(results.glob("*.json"))]
    records = [r for r in records if "rows" in r and r["rows"] and r["rows"][0]["ratio"]]
    if not records:
        return
    height = 0.9 + 0.2 * sum(_count(r) + 1.5 for r in records)
    figure = matplotlib.figure.Figure(figsize=(8, height), layout="constrained")
    plot = figure.subplots()
    at, ticks = 0.0, []
    for record in records:
        rows: dict[str, Any] = {row["name"]: row for row in record["rows"]}
        start = at
        for name, colour in SHOWN:
            if name not in rows:
                continue
            ratio = rows[name]["ratio" if record["threads"] > 1 else "cpu_ratio"]
            plot.barh(at, min(ratio, CUT), color=colour, height=0.85)
            text = f"{ratio:.2f}  {name}, {rows[name]['p50_ms']:.1f} ms"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            plot.text(min(ratio, CUT) + 0.02, at, text, va="center", size=7, bbox=box)
            at += 1
        ticks.append(((start + at - 1) / 2, record["title"]))
        at += 1.5
    plot.axvline(1.0, color="black", linewidth=0.8)
    plot.set_yticks([t for t, _ in ticks], [name for _, name in ticks], size=8)
    plot.set(xlim=(0, CUT + 1.3), xlabel="time / fastest int8 peer in the same run")
    plot.invert_yaxis()
    one = records[0]
    plot.set_title(f"{one['isa']}, {one['threads']} thread(s), batch 1", size=9)
    figure.savefig(file, dpi=110)


def _count(record: dict[str, Any]) -> int:
    names = {row["name"] for row in record["rows"]}
    return sum(name in names for name, _ in SHOWN)
