"""Write the profile table of README.md from the demo's recorded run.

Usage: python benchmarks/readme_table.py [benchmarks/demo_minilm.json]
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUN = Path("benchmarks/demo_minilm.json")
PLACE = re.compile(r"(<!-- table: [^>]* -->\n).*?(<!-- end of table -->)", re.DOTALL)
HEAD = """\
| | storage MB | RAM MB | p50 ms | p95 ms | x torch fp32 | x torch int8 | drift | top-1 % |
|---|---|---|---|---|---|---|---|---|
"""


def table(run: Mapping[str, Any]) -> str:
    """The recorded rows in Markdown, and one line on where they come from."""
    return HEAD + "".join(map(_line, run["rows"])) + "\n" + _source(run)


def _line(row: Mapping[str, Any]) -> str:
    ram = "-" if row["ram_mb"] is None else f"{row['ram_mb']:.1f}"
    cells = (
        row["name"],
        f"{row['storage_mb']:.1f}",
        ram,
        f"{row['p50_ms']:.2f}",
        f"{row['p95_ms']:.2f}",
        f"{row['speed_vs_fp32']:.2f}",
        f"{row['speed_vs_int8']:.2f}",
        f"{row['drift']:.3f}",
        f"{row['top1'] * 100:.1f}",
    )
    return f"| {' | '.join(cells)} |\n"


def _source(run: Mapping[str, Any]) -> str:
    threads = run["threads"]
    return (
        f"`{run['machine']['target']}`, {threads} thread{'s' * (threads != 1)}, torch "
        f"{run['versions']['torch']}, {run['date'][:10]}; the whole demo took "
        f"{run['seconds']:.0f} s; a budget switch {run['switch_median_us']:.1f} us (median) and "
        f"{run['bytes_copied_by_switches']} bytes copied. Source: "
        f"[{RUN}]({RUN}).\n"
    )


def main() -> None:
    """Replace the marked part of README.md."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / RUN
    readme = ROOT / "README.md"
    made = table(json.loads(path.read_text()))
    readme.write_text(PLACE.sub(lambda m: m[1] + made + m[2], readme.read_text()))


if __name__ == "__main__":
    main()
