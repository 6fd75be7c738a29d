"""Records: the schedule that was measured to be the best for an operator, one JSON line each.

A record holds for one family and one class of machine. What a reader cannot use it skips, and says
so: a kernel without its record follows the rule and computes the same.
"""

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from t3c.codegen.kernels.schedule import Op, Schedule, Scheduled
from t3c.codegen.tune.machine import Machine
from t3c.core.artifact import write_atomic
from t3c.core.errors import LoweringError

SCHEMA = 1
SHIPPED = Path(__file__).with_name("records")


@dataclass(frozen=True, slots=True)
class Record:
    """One tuned operator.

    Attributes:
        family: Name of the kernel family.
        op: The operator.
        schedule: Its best schedule.
        ratio: Time over the rule's, both measured in one contest.
        us: Microseconds of one call, weights cold, on one thread.
    """

    family: str
    op: Op
    schedule: Schedule
    ratio: float
    us: float


@dataclass(frozen=True, slots=True)
class Read:
    """What a file held for the families of a target on one machine.

    Attributes:
        records: Key of an operator -> its record; the last one wins.
        skipped: What was left out and why, a line each.
    """

    records: Mapping[str, Record]
    skipped: tuple[str, ...] = ()

    @property
    def schedules(self) -> dict[str, Schedule]:
        """What a family takes."""
        return {key: record.schedule for key, record in self.records.items()}


def shipped(family: str) -> Path:
    """The package's file for a family; it need not exist."""
    return SHIPPED / f"{family}.jsonl"


def read(
    path: Path, families: Sequence[Scheduled], machine: Machine, known: Container[str]
) -> Read:
    """The records of a file that hold for these families and this machine.

    Args:
        path: JSON lines.
        families: Kernel families of one target; two may share a name, not an operator.
        machine: This machine.
        known: Names of all families: lines for the others belong to someone else.

    Raises:
        LoweringError: There is no such file.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise LoweringError(
            f"cannot read tuning records {path}: {error}; name a file that tuning wrote"
        ) from error
    found: dict[str, Record] = {}
    skipped: dict[str, list[int]] = {}
    for number, line in enumerate(lines, 1):
        record = _parse(line, families, machine, known) if line.strip() else None
        if isinstance(record, Record):
            found[record.op.key] = record
        elif record:
            skipped.setdefault(record, []).append(number)
    return Read(found, tuple(_skipped(path, why, where) for why, where in skipped.items()))


def write(path: Path, machine: Machine, records: Iterable[Record]) -> None:
    """Put records into a file, whole or not at all.

    Lines for other families and machines, and lines that nobody can read, stay as they are.
    """
    new = {(r.family, machine.key, r.op.key): _line(r, machine) for r in records}
    old = path.read_text(errors="replace").splitlines() if path.exists() else []
    kept = [line for line in old if _identity(line) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(f"{line}\n" for line in [*kept, *new.values()]).encode())


def _line(record: Record, machine: Machine) -> str:
    data = {
        "schema": SCHEMA,
        "family": record.family,
        "machine": machine.key,
        "op": record.op.key,
        "schedule": record.schedule.record(),
        "ratio": round(record.ratio, 4),
        "us": round(record.us, 1),
    }
    return json.dumps(data)


def _object(line: str) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except ValueError:
        return None
    return cast(dict[str, Any], data) if isinstance(data, dict) else None


def _identity(line: str) -> tuple[Any, ...] | None:
    """Family, machine and operator of a line of this schema."""
    data = _object(line)
    if data is None or data.get("schema") != SCHEMA:
        return None
    return data.get("family"), data.get("machine"), data.get("op")


def _parse(
    line: str, families: Sequence[Scheduled], machine: Machine, known: Container[str]
) -> Record | str | None:
    """The record of a line; or why it cannot be used; or None where it is someone else's."""
    data = _object(line)
    if data is None:
        return "no JSON object"
    if data.get("schema") != SCHEMA:
        return f"schema {data.get('schema')!r}, this version of t3c reads {SCHEMA}"
    name, measured = data.get("family"), data.get("machine")
    mine = [family for family in families if family.name == name]
    if not mine:
        return None if str(name) in known else f"unknown kernel family {name!r}"
    if measured != machine.key:
        return f"measured on {measured!r}, this machine is {machine.key!r}"
    for family in mine:
        try:
            op = Op.parse(data["op"])
            schedule = choices(family, op)[canonical(data["schedule"])]
            return Record(family.name, op, schedule, float(data["ratio"]), float(data["us"]))
        except (KeyError, TypeError, ValueError, AttributeError, LoweringError):
            continue
    return f"no operator of {name!r} with this schedule; tune it again"


def choices(family: Scheduled, op: Op) -> dict[str, Schedule]:
    """The schedules of an operator by their canonical text."""
    return {canonical(schedule.record()): schedule for schedule in family.schedules(op)}


def canonical(record: Mapping[str, int | str]) -> str:
    """One text for equal records."""
    return json.dumps(record, sort_keys=True)


def _skipped(path: Path, why: str, lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
    count = f"{len(lines)} record{'s' if len(lines) > 1 else ''}"
    return f"{path.name}: {count} skipped (line {shown}): {why}"
