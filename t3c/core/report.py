"""The conversion report: every node that could have become elastic, and why some did not."""

from dataclasses import asdict, dataclass
from typing import Literal

Outcome = Literal["rewritten", "kept", "skipped"]


@dataclass(frozen=True, slots=True)
class Row:
    """What happened to one node.

    Attributes:
        where: The user's module path (or the parameter's path for functional calls).
        op: For example ``linear`` or ``conv2d``.
        outcome: ``rewritten`` (elastic), ``kept`` (cannot be, stays as it was) or ``skipped``
            (the user's include and exclude left it out).
        reason: Why; for a rewritten node what it can become.
        rule: Name of the pass that decided.
    """

    where: str
    op: str
    outcome: Outcome
    reason: str
    rule: str


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """All rows, in graph order."""

    rows: tuple[Row, ...] = ()

    def of(self, outcome: Outcome) -> tuple[Row, ...]:
        """Rows with that outcome."""
        return tuple(row for row in self.rows if row.outcome == outcome)

    def to_json(self) -> list[dict[str, str]]:
        """Plain rows for manifests and ``--json``."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        """Counts, then every row that was not rewritten, with its reason."""
        counts = {o: len(self.of(o)) for o in ("rewritten", "kept", "skipped")}
        lines = [", ".join(f"{n} {o}" for o, n in counts.items())]
        others = [r for r in self.rows if r.outcome != "rewritten"]
        lines += [f"  {r.outcome} {r.op} {r.where}: {r.reason}" for r in others]
        return "\n".join(lines)
