"""Measured kernels and profiles of one device: a file of JSON lines that only grows.

The first line says what device the rows hold for. Every line carries a checksum; a process that is
killed while it writes leaves at most half a line, which the next run drops and tells.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeGuard

from t3c.core.errors import CostModelError, T3CError
from t3c.core.formats import parse_format
from t3c.core.profile import Label
from t3c.core.sites import ConvSite, LinearSite, Site
from t3c.cost_models.base import Row, Work
from t3c.cost_models.device import Device

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Sample:
    """Measured seconds of a call, and under what conditions.

    Attributes:
        p50_s: Median, seconds.
        p90_s: 90th percentile, seconds.
        p95_s: 95th percentile, seconds.
        samples: Calls behind them.
        dropped: Calls left out, because something else held the processor meanwhile.
        load: Load average of the machine, processes; negative: unknown.
        mhz: Frequency of the processor; 0: unknown.
        when: ISO time.
    """

    p50_s: float
    p90_s: float
    p95_s: float
    samples: int
    dropped: int = 0
    load: float = -1.0
    mhz: float = 0.0
    when: str = ""

    def __post_init__(self) -> None:
        """Refuse disorder, infinity and NaN."""
        if not 0 < self.p50_s <= self.p90_s <= self.p95_s < math.inf or self.samples < 1:
            raise ValueError(
                f"need 0 < p50_s <= p90_s <= p95_s < inf and a sample, got {self.p50_s}, "
                f"{self.p90_s}, {self.p95_s} and {self.samples}"
            )


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One layer in one format, measured.

    Attributes:
        row: What was measured.
        seconds: How long it took.
        bytes: Of its packed weights.
        group: Rows of one group were drawn together; models are judged on groups that they have
            not seen.
    """

    row: Row
    seconds: Sample
    bytes: int
    group: str = ""

    @property
    def key(self) -> str:
        """Stable text; a dataset has each once."""
        return kernel_key(self.row)

    def to_json(self) -> dict[str, Any]:
        """Plain data; what can be counted is written out for other readers."""
        site, fmt = self.row.site, self.row.format
        return {
            "kind": "kernel",
            "key": self.key,
            "op": "linear" if isinstance(site, LinearSite) else "conv",
            "macs": site.macs(fmt),
            "bits": fmt.bits,
            "activation_bits": 8,
            "bytes": self.bytes,
            "group": self.group,
            **row_json(self.row),
            "seconds": asdict(self.seconds),
        }


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """One profile of a network, measured.

    Attributes:
        network: Its name.
        profile: Name of the profile.
        layers: Elastic layers that a call runs.
        rest: Everything else.
        seconds: How long a call took.
        inside_s: Of it, seconds inside the elastic layers' kernels (median).
    """

    network: str
    profile: str
    layers: tuple[Row, ...]
    rest: Work
    seconds: Sample
    inside_s: float = 0.0

    @property
    def key(self) -> str:
        """Stable text; a dataset has each once."""
        return profile_key(self.network, self.profile, self.layers[0].threads)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "kind": "profile",
            "key": self.key,
            "network": self.network,
            "profile": self.profile,
            "layers": [row_json(row) for row in self.layers],
            "rest": asdict(self.rest),
            "inside_s": self.inside_s,
            "seconds": asdict(self.seconds),
        }


@dataclass(frozen=True, slots=True)
class Joules:
    """Energy of a call, by a meter; everything that it sees counts.

    Attributes:
        joules: Of one call, on average.
        meter: Name of the meter.
        label: ``measured``, or ``estimated`` where nothing was metered.
        when: ISO time.
    """

    joules: float
    meter: str
    label: Label = Label.MEASURED
    when: str = ""

    def __post_init__(self) -> None:
        """Refuse zero, infinity and NaN."""
        if not 0 < self.joules < math.inf:
            raise ValueError(f"joules is {self.joules}; a call takes more than 0, and not infinity")

    @property
    def source(self) -> tuple[str, Label]:
        """What must agree for two rows to mean the same."""
        return self.meter, self.label

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "label": str(self.label)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        given: dict[str, Any] = {**data, "label": Label(data["label"])}
        return cls(**given)


@dataclass(frozen=True, slots=True)
class KernelEnergy:
    """One layer in one format, metered.

    Attributes:
        row: What was metered.
        energy: What it used.
        group: See `KernelRow`.
    """

    row: Row
    energy: Joules
    group: str = ""

    @property
    def key(self) -> str:
        """Stable text; a dataset has each once."""
        return energy_key(kernel_key(self.row))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "kind": "kernel energy",
            "key": self.key,
            "group": self.group,
            **row_json(self.row),
            "energy": self.energy.to_json(),
        }


@dataclass(frozen=True, slots=True)
class ProfileEnergy:
    """One profile of a network, metered.

    Attributes:
        network: Its name.
        profile: Name of the profile.
        layers: Elastic layers that a call runs.
        rest: Everything else.
        energy: What a call used.
    """

    network: str
    profile: str
    layers: tuple[Row, ...]
    rest: Work
    energy: Joules

    @property
    def key(self) -> str:
        """Stable text; a dataset has each once."""
        return energy_key(profile_key(self.network, self.profile, self.layers[0].threads))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "kind": "profile energy",
            "key": self.key,
            "network": self.network,
            "profile": self.profile,
            "layers": [row_json(row) for row in self.layers],
            "rest": asdict(self.rest),
            "energy": self.energy.to_json(),
        }


Metered = KernelEnergy | ProfileEnergy
Measured = KernelRow | ProfileRow | Metered


def energy_key(key: str) -> str:
    """Key of the energy of what has this key."""
    return f"joules {key}"


def kernel_key(row: Row) -> str:
    """Text that names a layer's shape, its format and the threads, and nothing else."""
    site = row.site
    if isinstance(site, LinearSite):
        shape = f"linear {site.rows}x{site.n}x{site.k}"
    else:
        pairs = (site.in_size, site.kernel, site.stride, site.padding, site.dilation)
        sizes = " ".join(f"{mark}{a}x{b}" for mark, (a, b) in zip("@kspd", pairs, strict=True))
        shape = f"conv {site.batch}x{site.in_channels}-{site.out_channels} {sizes}"
        shape += " codes" if row.codes else ""
    return f"{shape} {row.format} t{row.threads}"


def profile_key(network: str, profile: str, threads: int) -> str:
    """Text that names a profile of a network and the threads."""
    return f"{network}/{profile} t{threads}"


class Dataset:
    """The rows of one file.

    Attributes:
        path: The file.
        device: What the rows hold for.
        rows: Key -> row, in the order in which they were measured.
        source: The device whose model these few rows were chosen to transfer; None: they stand
            alone.
    """

    def __init__(
        self,
        path: Path,
        device: Device,
        rows: Mapping[str, Measured],
        source: Device | None = None,
    ) -> None:
        """Wrap what was read; see `open` and `read`."""
        self.path = path
        self.device = device
        self.source = source
        self.rows = dict(rows)

    @classmethod
    def open(
        cls,
        path: Path,
        device: Device,
        say: Callable[[str], None],
        source: Device | None = None,
    ) -> Self:
        """The dataset to go on with; a new one if there is none.

        Args:
            path: The file.
            device: What will be measured on.
            say: Told if half a line was dropped.
            source: Written to a new file; see the attribute.

        Raises:
            CostModelError: Rows are corrupted, or of another device.
        """
        if not path.exists() or not path.stat().st_size:
            path.parent.mkdir(parents=True, exist_ok=True)
            head: dict[str, Any] = {"schema": SCHEMA, "device": device.to_json()}
            if source is not None:
                head["transfer_from"] = source.to_json()
            _append(path, _line(head))
            return cls(path, device, {}, source)
        found, whole = _read(path, say)
        if differ := found.device.differences(device):
            raise CostModelError(
                f"{path} holds rows of another device: {'; '.join(differ)}. Measure into another "
                "file"
            )
        if whole < path.stat().st_size:
            with path.open("r+b") as file:
                file.truncate(whole)
        return cls(path, device, found.rows, found.source)

    @classmethod
    def read(cls, path: Path, say: Callable[[str], None] = lambda _: None) -> Self:
        """A dataset that nothing will be added to; the file stays as it is.

        Raises:
            CostModelError: There is no such file, or rows are corrupted.
        """
        if not path.exists():
            raise CostModelError(f"{path}: no such file; `t3c measure --out {path}` makes one")
        found, _ = _read(path, say)
        return cls(path, found.device, found.rows, found.source)

    @property
    def kernels(self) -> list[KernelRow]:
        """The measured kernels."""
        return [row for row in self.rows.values() if isinstance(row, KernelRow)]

    @property
    def profiles(self) -> list[ProfileRow]:
        """The measured profiles."""
        return [row for row in self.rows.values() if isinstance(row, ProfileRow)]

    @property
    def kernel_energies(self) -> list[KernelEnergy]:
        """The metered kernels."""
        return [row for row in self.rows.values() if isinstance(row, KernelEnergy)]

    @property
    def profile_energies(self) -> list[ProfileEnergy]:
        """The metered profiles."""
        return [row for row in self.rows.values() if isinstance(row, ProfileEnergy)]

    @property
    def meter(self) -> tuple[str, Label] | None:
        """Name and label of the meter of all energies; None: there are none."""
        return next((row.energy.source for row in self.rows.values() if _metered(row)), None)

    def append(self, rows: Sequence[Measured], device: Device) -> None:
        """Write rows behind the others, at once; those that are there already stay as they are.

        Args:
            rows: What was measured.
            device: Where.

        Raises:
            CostModelError: On another device than all other rows, or by another meter.
        """
        if differ := self.device.differences(device):
            raise CostModelError(
                f"{len(rows)} rows are of another device than {self.path}: {'; '.join(differ)}. "
                "Measure into another file"
            )
        _one_meter(self.path, [*self.rows.values(), *rows])
        new = {row.key: row for row in rows if row.key not in self.rows}
        if new:
            _append(self.path, b"".join(_line(row.to_json()) for row in new.values()))
            self.rows |= new


def _metered(row: Measured) -> TypeGuard[Metered]:
    return isinstance(row, KernelEnergy | ProfileEnergy)


def _one_meter(path: Path, rows: Sequence[Measured]) -> None:
    """Refuse joules that do not mean the same.

    Raises:
        CostModelError: They are of several meters, or measured and estimated.
    """
    found = sorted({row.energy.source for row in rows if _metered(row)})
    if len(found) > 1:
        (one, label), (other, others) = found[:2]
        raise CostModelError(
            f"{path} would hold joules of {one!r} ({label}) and of {other!r} ({others}); what one "
            "meter sees another does not. Measure into another file"
        )


def _read(path: Path, say: Callable[[str], None]) -> tuple[Dataset, int]:
    """The dataset, and how many bytes of the file are whole lines."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        say(f"{path}: dropped half a line of {len(content) - whole} bytes at the end")
    lines = list(_lines(path, content[:whole]))
    if not lines:
        raise CostModelError(f"{path}: no whole line; remove the file and measure again")
    head = lines[0][1]
    if not isinstance(head.get("schema"), int) or "device" not in head:
        raise _no_header(path)
    if head["schema"] > SCHEMA:
        raise CostModelError(
            f"{path} has schema {head['schema']}; this version reads up to {SCHEMA}: read it with "
            "the version of t3c that wrote it, or a newer one"
        )
    rows: dict[str, Measured] = {}
    for number, data in lines[1:]:
        try:
            row = _measured(data)
        except (KeyError, TypeError, ValueError, T3CError) as error:
            raise _corrupted(path, number, repr(error)) from error
        rows.setdefault(row.key, row)
    _one_meter(path, list(rows.values()))
    source = head.get("transfer_from")
    device = Device.from_json(head["device"])
    return Dataset(path, device, rows, None if source is None else Device.from_json(source)), whole


def _lines(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of every line.

    Raises:
        CostModelError: A line is no JSON object, or its checksum is wrong.
    """
    for number, line in enumerate(content.splitlines(), 1):
        try:
            data = json.loads(line)
            check = data.pop("crc")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if number == 1:
                raise _no_header(path) from error
            raise _corrupted(path, number, repr(error)) from error
        if check != _crc(data):
            raise _corrupted(path, number, "its checksum does not fit")
        yield number, data


def _no_header(path: Path) -> CostModelError:
    return CostModelError(f"{path}, line 1: no header of measurements; choose another file")


def _corrupted(path: Path, number: int, why: str) -> CostModelError:
    return CostModelError(
        f"{path}, line {number}: corrupted ({why}); nothing was changed. Restore the line, or "
        "delete it to have it measured again"
    )


def _crc(data: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(data, sort_keys=True, allow_nan=False).encode())


def _line(data: Mapping[str, Any]) -> bytes:
    return (json.dumps({**data, "crc": _crc(data)}, allow_nan=False) + "\n").encode()


def _append(path: Path, lines: bytes) -> None:
    """One write, on disk when this returns."""
    to = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(to, lines) != len(lines):
            raise CostModelError(f"{path}: the disk is full; rows were not written whole")
        os.fsync(to)
    finally:
        os.close(to)


def row_json(row: Row) -> dict[str, Any]:
    """A layer in a format; names of layers do not matter to a cost model, sizes do."""
    site = asdict(row.site)
    del site["name"]
    return {
        "site": site,
        "format": str(row.format),
        "threads": row.threads,
        "codes": row.codes,
    }


def row_of(data: Mapping[str, Any]) -> Row:
    """Read what `row_json` wrote."""
    given: dict[str, Any] = dict(data["site"])
    site: Site
    if "rows" in given:
        site = LinearSite(name="", **given)
    else:
        pairs: dict[str, Any] = {
            k: (int(v[0]), int(v[1])) if isinstance(v, list) else v for k, v in given.items()
        }
        site = ConvSite(name="", **pairs)
    return Row(site, parse_format(data["format"]), int(data["threads"]), bool(data["codes"]))


KINDS = ("kernel", "profile", "kernel energy", "profile energy")


def _measured(data: Mapping[str, Any]) -> Measured:
    if data["kind"] not in KINDS:
        raise ValueError(f"kind is {data['kind']!r}; allowed are {', '.join(KINDS)}")
    made: Measured
    if data["kind"] == "kernel":
        made = KernelRow(
            row_of(data), Sample(**data["seconds"]), int(data["bytes"]), str(data["group"])
        )
    elif data["kind"] == "kernel energy":
        made = KernelEnergy(row_of(data), Joules.from_json(data["energy"]), str(data["group"]))
    else:
        layers = tuple(row_of(row) for row in data["layers"])
        names, rest = (str(data["network"]), str(data["profile"])), Work(**data["rest"])
        if data["kind"] == "profile":
            seconds = Sample(**data["seconds"])
            made = ProfileRow(*names, layers, rest, seconds, float(data["inside_s"]))
        else:
            made = ProfileEnergy(*names, layers, rest, Joules.from_json(data["energy"]))
    if made.key != data["key"]:
        raise ValueError(f"its key is {data['key']!r}, its fields say {made.key!r}")
    return made
