"""The damage table in a file: measurements as they are made, and the whole table at the end.

While it is measured, lines are appended to ``<path>.part``: a header, then a row for each (site,
option, batch) in the order in which they were finished. Once nothing is missing, the table is
written to ``<path>`` in one step: the same header, then a row for each (site, option) in the order
of the menu. Only values that are measured are in it, no times, so a run that was interrupted and
went on writes the same bytes as one that was not.
"""

import fcntl
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from t3c.core.errors import T3CError
from t3c.core.formats import Format
from t3c.elastic.model import ElasticModel

SCHEMA = 1
METHOD = 1
"""Raised whenever the same model, data and menu shall give other damages than before."""
PART = ".part"
"""Ends the name of the file of a table that is not finished."""

Samples = dict[tuple[str, Format], dict[int, tuple[float, float]]]
"""(site, format) -> batch -> (squared drift, energy) of the outputs."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Measured damage of one format at one site.

    Attributes:
        damage: Relative squared drift of the outputs.
        batches: Batches behind it.
    """

    damage: float
    batches: int

    @classmethod
    def of(cls, samples: Mapping[int, tuple[float, float]]) -> "Reading":
        """Over all batches, whatever the order in which they were measured."""
        drift = math.fsum(drift for drift, _ in samples.values())
        return cls(drift / math.fsum(energy for _, energy in samples.values()), len(samples))


@dataclass(frozen=True, slots=True)
class Origin:
    """What a table was measured of.

    Attributes:
        parts: Name of a part -> its SHA-256 or, for settings, their values.
        batches: How many batches every damage is measured on.
    """

    parts: Mapping[str, str]
    batches: int

    @classmethod
    def of(
        cls,
        elastic: ElasticModel,
        batches: Sequence[Sequence[Tensor]],
        menu: Mapping[str, Sequence[Format]],
    ) -> "Origin":
        """Hash everything that decides the damages.

        Args:
            elastic: The calibrated model: its codes and grids are hashed, not what made them.
            batches: Flat inputs that damage is measured on.
            menu: Site name -> formats.
        """
        parts = {
            "weights": _digest(_weights(elastic)),
            "codes": _digest(_codes(elastic, menu)),
            "inputs": _digest(tensor for batch in batches for tensor in batch),
            "menu": _digest(f"{site} {fmt}" for site, row in menu.items() for fmt in row),
            "method": str(METHOD),
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
        }
        return cls(parts, len(batches))

    def line(self) -> str:
        """The header of a file."""
        body = {"damage-table": SCHEMA, **self.parts, "batches": self.batches}
        return _dump(body | {"sha256": hashlib.sha256(_dump(body).encode()).hexdigest()})


class Ledger:
    """The file of one table; use it as a context.

    Attributes:
        samples: What was measured so far.
        done: The finished table, or None.
    """

    def __init__(self, path: Path, origin: Origin, menu: Mapping[str, Sequence[Format]]) -> None:
        """Open the file, or begin it.

        Args:
            path: Of the finished table.
            origin: What is about to be measured.
            menu: Site name -> formats.

        Raises:
            T3CError: A file there is damaged, was measured of something else, or is in use.
        """
        self.path = path
        self.samples: Samples = {}
        self.done: dict[tuple[str, Format], Reading] | None = None
        self._order = [(site, fmt) for site, row in menu.items() for fmt in row]
        self._header = origin.line()
        self._origin = origin
        self._file: int | None = None
        if path.exists():
            self._take_finished()
        else:
            self._open()

    def __enter__(self) -> "Ledger":
        """Nothing more to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file; what is in it stays."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def add(self, site: str, fmt: Format, batch: int, drift: float, energy: float) -> None:
        """Keep one measurement, in memory and on disk."""
        self.samples.setdefault((site, fmt), {})[batch] = (drift, energy)
        row = {"site": site, "option": str(fmt), "batch": batch, "drift": drift, "energy": energy}
        self._append(_sealed(row, self._header))

    def finish(self) -> None:
        """Write the whole table at its place and remove what it was made of."""
        self.done = {key: Reading.of(self.samples[key]) for key in self._order}
        lines = [self._header]
        for (site, fmt), seen in self.done.items():
            row = {"site": site, "option": str(fmt), "damage": seen.damage, "batches": seen.batches}
            lines.append(_sealed(row, self._header))
        fresh = self.path.with_name(self.path.name + ".new")
        with fresh.open("w", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)
        _part(self.path).unlink()

    def _open(self) -> None:
        part = _part(self.path)
        part.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.__exit__()
            raise T3CError(
                f"{part}: another run is measuring this table; wait for it, or name another file"
            ) from None
        try:
            self._take_part(part)
        except BaseException:
            self.__exit__()
            raise

    def _take_part(self, part: Path) -> None:
        rows, whole = _rows(part)
        if not whole and not self._header.encode().startswith(part.read_bytes()):
            raise _damaged(part, 1, "it is no header of a damage table")
        assert self._file is not None
        os.ftruncate(self._file, whole)  # a line that was cut off is measured again
        if not whole:
            self._append(self._header)
            return
        _same(part, rows[0], self._header)
        known = {(site, str(fmt)): (site, fmt) for site, fmt in self._order}
        for number, row in enumerate(rows[1:], 2):
            key = known.get((str(row.get("site")), str(row.get("option"))))
            batch, drift, energy = row.get("batch"), row.get("drift"), row.get("energy")
            if key is None or not isinstance(batch, int) or batch >= self._origin.batches:
                raise _damaged(part, number, "it names a site, option or batch that is not wanted")
            if not isinstance(drift, float) or not isinstance(energy, float):
                raise _damaged(part, number, "it has no numbers")
            seen = self.samples.setdefault(key, {})
            if batch in seen:
                raise _damaged(part, number, "it repeats an earlier row")
            seen[batch] = (drift, energy)

    def _take_finished(self) -> None:
        rows, whole = _rows(self.path)
        if whole != self.path.stat().st_size:
            raise _damaged(self.path, len(rows) + 1, "it is cut off")
        if not rows:
            raise _damaged(self.path, 1, "there is no header")
        _same(self.path, rows[0], self._header)
        names = [(str(row.get("site")), str(row.get("option"))) for row in rows[1:]]
        wanted = [(site, str(fmt)) for site, fmt in self._order]
        if names != wanted:
            pairs = enumerate(zip(names, wanted, strict=False), 2)
            number = next((n for n, (a, b) in pairs if a != b), min(len(rows), len(wanted) + 1) + 1)
            raise _damaged(self.path, number, "rows are missing, doubled or out of order")
        self.done = {
            key: Reading(row["damage"], row["batches"])
            for key, row in zip(self._order, rows[1:], strict=True)
        }
        _part(self.path).unlink(missing_ok=True)

    def _append(self, line: str) -> None:
        assert self._file is not None
        os.write(self._file, (line + "\n").encode())


def verify(path: Path) -> None:
    """Refuse a file that cannot be gone on with, before anything is measured.

    Args:
        path: Of a finished table, present or not.

    Raises:
        T3CError: A line is damaged, the schema is another one, or the path is a folder.
    """
    if path.is_dir():
        raise T3CError(f"{path} is a folder; name a file for the damage table")
    for file in (path, _part(path)):
        if file.exists():
            _rows(file)


def _part(path: Path) -> Path:
    return path.with_name(path.name + PART)


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Header and rows, every checksum checked, and the bytes that they take.

    Raises:
        T3CError: A line is damaged, or the schema is another one.
    """
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    rows: list[dict[str, Any]] = []
    header = ""
    for number, line in enumerate(text[:whole].split(b"\n")[:-1], 1):
        try:
            row: Any = json.loads(line)
        except ValueError:
            raise _damaged(path, number, "it is no JSON") from None
        if not isinstance(row, dict):
            raise _damaged(path, number, "it is no JSON object")
        if number == 1:
            header = line.decode()
            _check_header(path, cast(dict[str, Any], row), header)
        elif _sealed({k: v for k, v in row.items() if k != "crc"}, header).encode() != line:
            raise _damaged(path, number, "its checksum does not match")
        rows.append(cast(dict[str, Any], row))
    return rows, whole


def _check_header(path: Path, row: dict[str, Any], line: str) -> None:
    schema = row.get("damage-table")
    if isinstance(schema, int) and schema > SCHEMA:
        raise T3CError(
            f"{path}: schema {schema} is newer than {SCHEMA}; use a newer t3c, or another file"
        )
    body = {k: v for k, v in row.items() if k != "sha256"}
    body_hash = hashlib.sha256(_dump(body).encode()).hexdigest()
    if schema != SCHEMA or _dump(body | {"sha256": body_hash}) != line:
        raise _damaged(path, 1, "it is no header of a damage table")


def _same(path: Path, row: Mapping[str, Any], header: str) -> None:
    """Refuse a table of something else, and say of what."""
    want: dict[str, Any] = json.loads(header)
    other = [k for k, v in want.items() if k != "sha256" and row.get(k) != v]
    if other:
        said = ", ".join(
            k if len(str(want[k])) == 64 else f"{k} ({row.get(k)}, now {want[k]})" for k in other
        )
        raise T3CError(
            f"{path}, line 1: this table was measured with other {said}; delete the file to "
            "measure anew, or name another one"
        )


def _damaged(path: Path, number: int, why: str) -> T3CError:
    what = "delete the file to measure anew"
    if number > 1 and path.name.endswith(PART):
        what = f"delete that line to measure its entry again, or the file to measure anew ({why})"
        return T3CError(f"{path}, line {number} is damaged; {what}")
    if number == 1:  # it may be somebody's file
        what = "name another file, or delete this one to measure anew"
    return T3CError(f"{path}, line {number} is damaged ({why}); {what}")


def _sealed(row: Mapping[str, Any], header: str) -> str:
    """A row with its checksum, which also binds it to the header."""
    text = _dump(row)
    return text[:-1] + f',"crc":"{zlib.crc32((header + text).encode()):08x}"}}'


def _dump(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _digest(items: Iterator[Tensor | str]) -> str:
    total = hashlib.sha256()
    for item in items:
        if isinstance(item, str):
            total.update(item.encode() + b"\0")
        else:
            array = np.ascontiguousarray(item.detach().cpu().numpy())
            total.update(f"{array.dtype}{array.shape}".encode())
            total.update(array.data if array.size else b"")
    return total.hexdigest()


def _weights(elastic: ElasticModel) -> Iterator[Tensor | str]:
    """The graph, and every tensor of the original network in it."""
    yield str(elastic.graph.graph)
    for node in elastic.graph.graph.nodes:
        if node.op == "get_attr":
            value: Any = elastic.graph
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if isinstance(value, Tensor):
                yield value
    for name, layer in elastic.layers.items():
        yield name
        yield layer.weight
        if layer.bias is not None:
            yield layer.bias
    for table in elastic.tables.values():
        yield table.weight


def _codes(elastic: ElasticModel, menu: Mapping[str, Sequence[Format]]) -> Iterator[Tensor | str]:
    """Integers, scales and grids that the formats of the menu run on."""
    for site, formats in menu.items():
        yield site
        yield from _parts(elastic.codes(site, formats))
    for name, snap in elastic.snaps.items():
        yield f"{name} {snap.grid}"


def _parts(value: object) -> Iterator[Tensor | str]:
    """Every array and number in a value of dataclasses and mappings, with its name."""
    if isinstance(value, np.ndarray):
        yield torch.from_numpy(np.ascontiguousarray(value))
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield str(key)
            yield from _parts(value[key])
    elif is_dataclass(value):
        for part in fields(value):
            yield part.name
            yield from _parts(getattr(value, part.name))
    else:
        yield repr(value)
