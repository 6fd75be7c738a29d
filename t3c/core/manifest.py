"""The manifest of an artifact: what was built, from what, for which machine, and what it costs.

An artifact is a folder: manifest.json, weights.safetensors, lib/<device>.so and run.py. The
manifest names every other file with its hash. It is plain JSON with a schema number; unknown keys
are ignored, so that a reader survives additions, and a newer schema is refused.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, Literal, Self, get_args

from t3c.core.certificate_json import certificate_from_json, certificate_to_json
from t3c.core.code_storage import CodeStorage, parse_code_storage
from t3c.core.errors import ArtifactError
from t3c.core.fields import Fields
from t3c.core.formats import parse_format
from t3c.core.gate import GateRow, Measured
from t3c.core.objective import Goal, Objective, parse_objective
from t3c.core.profile import Energy, Label, Profile, ProfileChain, Timing
from t3c.core.report import ConversionReport, Outcome, Row
from t3c.core.structure import Tree, leaves, problem

SCHEMA = 3
FORMAT = "t3c-artifact"
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"

Where = Literal["device", "emulated"]


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """The machine that the library was built for.

    Attributes:
        name: Registry name, for example ``x86-vnni``.
        kind: ``llvm`` or ``cuda``.
        triple: LLVM triple of the host code; None: that of the machine that built it.
        mcpu: LLVM processor name.
        features: CPU features that the library uses, spelled as in /proc/cpuinfo.
        arch: CUDA architecture; None for a CPU.
    """

    name: str
    kind: str
    triple: str | None
    mcpu: str
    features: tuple[str, ...] = ()
    arch: str | None = None


@dataclass(frozen=True, slots=True)
class Stages:
    """How far the library got; none is set by assumption.

    Attributes:
        built: The library file was linked.
        loaded: A TVM runtime loaded it.
        ran: It computed something.
        verified: Every profile agreed with the torch reference.
        where: On the device itself or under emulation; None until loaded.
    """

    built: bool = False
    loaded: bool = False
    ran: bool = False
    verified: bool = False
    where: Where | None = None

    def __post_init__(self) -> None:
        """Refuse a later stage without the earlier ones."""
        steps = (self.built, self.loaded, self.ran, self.verified)
        if any(late and not early for early, late in pairwise(steps)):
            raise ValueError("a later stage needs the earlier: built, loaded, ran, verified")
        if self.loaded and self.where is None:
            raise ValueError("a library that was loaded needs `where`: 'device' or 'emulated'")

    def __str__(self) -> str:
        """The furthest stage and where, for example ``verified (device)``."""
        done = [s for s in ("built", "loaded", "ran", "verified") if getattr(self, s)]
        return (done[-1] if done else "not built") + (f" ({self.where})" if self.where else "")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: static shape, numpy name of the dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the artifact, relative to its folder."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Parity:
    """Agreement of the library with the fake-quantized torch reference of the same profile.

    Attributes:
        relative: Largest ||y - y_ref|| / ||y_ref|| of any stretch between two roundings, the
            reference going on with the library's own activations at every elastic layer.
        free: The same of the outputs alone, each going its own way: two correct programs differ
            here by as much as rounding does, since one unit in the last place turns roundings.
        tolerance: What was allowed of `relative`.
        inputs: How many inputs were compared.
        where: On the device or under emulation.
    """

    relative: float
    free: float
    tolerance: float
    inputs: int
    where: Where


@dataclass(frozen=True, slots=True)
class CompiledProfile:
    """A profile and its function in the library.

    Attributes:
        profile: Formats, costs and certificate.
        function: Name of (inputs..., addresses of the weights, arena, outputs...) -> 0.
        weights: Names in the weight file, in the order of the addresses.
        parity: Result of the check against torch; None where nothing could run it.
        arena_bytes: Scratch memory that a call takes, aligned to 64 bytes; None (CUDA, and every
            artifact of schema 1): a function of TVM's virtual machine, which allocates, (inputs...,
            tuple of weights) -> outputs.
        reads: Tensor name -> bytes at its front that the function reads, where it reads no more.
    """

    profile: Profile
    function: str
    weights: tuple[str, ...]
    parity: Parity | None = None
    arena_bytes: int | None = None
    reads: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything an artifact says of itself.

    Attributes:
        target: The machine.
        stages: How far the library got.
        library: Path of the library, for example ``lib/x86.so``.
        inputs: Flat inputs, in the order of the VM functions.
        outputs: Flat outputs, in order.
        input_tree: The tuple (positional arguments, keyword arguments) of the model.
        output_tree: Nesting of the outputs.
        profiles: Smallest first.
        versions: Tool name -> version: t3c, torch, tvm and others.
        report: What happened to every layer.
        gate: Every format of every layer that was considered, with its times.
        objective: What the chain is ordered by.
        codes: How dense codes of 8 and of 4 bits are stored, where a layer has both.
        assumptions: What `lower` assumed because the user did not say.
        calibration_sha256: Hash of the calibration inputs; None if nothing was calibrated.
        policy: Path of the learned policy (`t3c.fit_policy`); None: there is none.
        created: UTC, ISO 8601; SOURCE_DATE_EPOCH is honoured.
        files: Every other file; filled in by the writer.
        schema: Number of this layout.
    """

    target: TargetInfo
    stages: Stages
    library: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    input_tree: Tree
    output_tree: Tree
    profiles: tuple[CompiledProfile, ...]
    versions: Mapping[str, str]
    report: ConversionReport = field(default_factory=ConversionReport)
    gate: tuple[GateRow, ...] = ()
    objective: Goal = Objective.LATENCY
    codes: CodeStorage = CodeStorage.NESTED
    assumptions: tuple[str, ...] = ()
    calibration_sha256: str | None = None
    policy: str | None = None
    created: str = field(default_factory=lambda: _now())
    files: tuple[FileEntry, ...] = ()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Refuse what no reader could use.

        Raises:
            ArtifactError: Names the field.
        """
        for field_name, tree, specs in (
            ("input_tree", self.input_tree, self.inputs),
            ("output_tree", self.output_tree, self.outputs),
        ):
            if (bad := problem(tree, field_name)) is not None:
                raise ArtifactError(f"{MANIFEST}: {bad}")
            if leaves(tree) != len(specs):
                raise ArtifactError(
                    f"{MANIFEST}: {field_name} has {leaves(tree)} leaves for {len(specs)} tensors"
                )
        for group in ([s.name for s in self.inputs], [p.profile.name for p in self.profiles]):
            if len(set(group)) != len(group):
                raise ArtifactError(f"{MANIFEST}: a name occurs twice in {group}")
        for entry in (*(f.path for f in self.files), self.library, self.policy):
            if entry is not None:
                _check_relative(entry)
        try:
            ProfileChain(tuple(p.profile for p in self.profiles))
        except ValueError as error:
            raise ArtifactError(f"{MANIFEST}: profiles: {error}") from error

    @property
    def chain(self) -> ProfileChain:
        """The profiles alone, smallest first."""
        return ProfileChain(tuple(p.profile for p in self.profiles))

    def __str__(self) -> str:
        """One line: target, stage, names of the profiles."""
        profiles = ", ".join(p.profile.name for p in self.profiles)
        return f"{self.target.name}, {self.stages}, profiles {profiles}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`; the inverse of `from_json`."""
        return {
            "format": FORMAT,
            "schema": self.schema,
            "created": self.created,
            "versions": dict(self.versions),
            "target": asdict(self.target),
            "stages": asdict(self.stages),
            "library": self.library,
            "inputs": [asdict(s) for s in self.inputs],
            "outputs": [asdict(s) for s in self.outputs],
            "input_tree": self.input_tree,
            "output_tree": self.output_tree,
            "profiles": [_profile_to_json(p) for p in self.profiles],
            "report": self.report.to_json(),
            "gate": [_gate_to_json(row) for row in self.gate],
            "objective": str(self.objective),
            "codes": str(self.codes),
            "assumptions": list(self.assumptions),
            "calibration_sha256": self.calibration_sha256,
            "policy": self.policy,
            "files": [asdict(f) for f in self.files],
        }

    @classmethod
    def from_json(cls, data: object, file: str = MANIFEST) -> Self:
        """Read plain data back.

        Args:
            data: What `to_json` gave.
            file: Named in messages.

        Raises:
            ArtifactError: A field is missing or wrong, or the schema is newer.
        """
        f = Fields(data, file)
        if f.text("format") != FORMAT:
            raise ArtifactError(f"{file}: format is {f.text('format')!r}, not {FORMAT!r}")
        if (schema := f.whole("schema")) > SCHEMA:
            raise ArtifactError(
                f"{file}: schema {schema} was written by t3c {_writer(data)}; this t3c reads up to "
                f"schema {SCHEMA}: install t3c {_writer(data)} or newer, or lower the model again"
            )
        return f.build(
            lambda f: cls(
                schema=schema,
                created=f.text("created"),
                versions={k: str(v) for k, v in f.mapping("versions").items()},
                target=f.within("target", _target_from_json),
                stages=f.within("stages", _stages_from_json),
                library=f.text("library"),
                inputs=f.each("inputs", _tensor_from_json),
                outputs=f.each("outputs", _tensor_from_json),
                input_tree=f.mapping("input_tree"),
                output_tree=f.mapping("output_tree"),
                profiles=f.each("profiles", _profile_from_json),
                report=ConversionReport(f.each("report", _row_from_json)),
                gate=f.optional("gate", lambda k: f.each(k, _gate_from_json)) or (),
                objective=_objective(f),
                codes=_codes(f),
                assumptions=f.texts("assumptions"),
                calibration_sha256=f.optional("calibration_sha256", f.text),
                policy=f.optional("policy", f.text),
                files=f.each("files", _file_from_json),
            )
        )


def _check_relative(path: str) -> None:
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or ":" in path:
        raise ArtifactError(
            f"{MANIFEST}: path {path!r} leads outside the artifact; "
            "only relative paths without '..' are allowed"
        )


def _now() -> str:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    return moment.isoformat(timespec="seconds")


def _writer(data: object) -> str:
    match data:
        case {"versions": {"t3c": str(version)}}:
            return version
        case _:
            return "(unknown version)"


def _profile_to_json(compiled: CompiledProfile) -> dict[str, Any]:
    p = compiled.profile
    return {
        "name": p.name,
        "function": compiled.function,
        "arena_bytes": compiled.arena_bytes,
        "macs": p.macs,
        "storage_bytes": p.storage_bytes,
        "ram_bytes": p.ram_bytes,
        "latency": None if p.latency is None else asdict(p.latency),
        "energy": None if p.energy is None else asdict(p.energy),
        "certificate": certificate_to_json(p.certificate),
        "parity": None if compiled.parity is None else asdict(compiled.parity),
        "formats": {site: str(fmt) for site, fmt in p.formats.items()},
        "weights": list(compiled.weights),
        "reads": dict(compiled.reads),
    }


def _profile_from_json(f: Fields) -> CompiledProfile:
    formats: dict[str, Any] = f.mapping("formats")
    return CompiledProfile(
        Profile(
            name=f.text("name"),
            formats={site: parse_format(str(text)) for site, text in formats.items()},
            macs=f.whole("macs"),
            storage_bytes=f.whole("storage_bytes"),
            ram_bytes=f.whole("ram_bytes"),
            latency=f.optional("latency", lambda k: f.within(k, _timing_from_json)),
            energy=f.optional("energy", lambda k: f.within(k, _energy_from_json)),
            certificate=f.within("certificate", certificate_from_json),
        ),
        f.text("function"),
        f.texts("weights"),
        f.optional("parity", lambda k: f.within(k, _parity_from_json)),
        f.optional("arena_bytes", f.whole),
        f.optional("reads", lambda k: f.within(k, _reads_from_json)) or {},
    )


def _reads_from_json(f: Fields) -> dict[str, int]:
    return {name: f.whole(name) for name in f.data}


def _timing_from_json(f: Fields) -> Timing:
    calls = f.optional("calls", f.whole)
    label = Label(f.text("label"))
    interval = f.optional("low_s", f.number), f.optional("high_s", f.number)
    return Timing(f.number("p50_s"), f.number("p95_s"), label, calls, f.whole("threads"), *interval)


def _energy_from_json(f: Fields) -> Energy:
    return Energy(f.number("joules"), Label(f.text("label")))


def _parity_from_json(f: Fields) -> Parity:
    where: Where = f.choice("where", get_args(Where))
    return Parity(
        f.number("relative"), f.number("free"), f.number("tolerance"), f.whole("inputs"), where
    )


def _target_from_json(f: Fields) -> TargetInfo:
    return TargetInfo(
        f.text("name"),
        f.text("kind"),
        f.optional("triple", f.text),
        f.text("mcpu"),
        f.texts("features"),
        f.optional("arch", f.text),
    )


def _stages_from_json(f: Fields) -> Stages:
    where: Where | None = f.optional("where", lambda k: f.choice(k, get_args(Where)))
    return Stages(f.flag("built"), f.flag("loaded"), f.flag("ran"), f.flag("verified"), where)


def _tensor_from_json(f: Fields) -> TensorSpec:
    return TensorSpec(f.text("name"), f.wholes("shape"), f.text("dtype"))


def _row_from_json(f: Fields) -> Row:
    outcome: Outcome = f.choice("outcome", get_args(Outcome))
    return Row(f.text("where"), f.text("op"), outcome, f.text("reason"), f.text("rule"))


def _gate_to_json(row: GateRow) -> dict[str, Any]:
    return {
        "site": row.site,
        "format": str(row.format),
        "predicted_s": row.predicted_s,
        "dense_predicted_s": row.dense_predicted_s,
        "objective": str(row.objective),
        "cost": row.cost,
        "dense_cost": row.dense_cost,
        "measured": None if row.measured is None else asdict(row.measured),
        "kept": row.kept,
    }


def _gate_from_json(f: Fields) -> GateRow:
    seconds, dense_seconds = f.number("predicted_s"), f.number("dense_predicted_s")
    cost, dense_cost = (f.optional(key, f.number) for key in ("cost", "dense_cost"))
    return GateRow(
        f.text("site"),
        parse_format(f.text("format")),
        seconds,
        dense_seconds,
        seconds if cost is None else cost,  # rows written before there were other objectives
        dense_seconds if dense_cost is None else dense_cost,
        f.optional("measured", lambda k: f.within(k, _measured_from_json)),
        _objective(f),
    )


def _objective(f: Fields) -> Goal:
    """The objective; latency in files from before there were others."""
    found = f.optional("objective", f.text)
    return Objective.LATENCY if found is None else parse_objective(found)


def _codes(f: Fields) -> CodeStorage:
    """How codes are stored; nested in files from before there was a choice."""
    found = f.optional("codes", f.text)
    return CodeStorage.NESTED if found is None else parse_code_storage(found)


def _measured_from_json(f: Fields) -> Measured:
    return Measured(
        f.number("seconds"), f.number("dense_seconds"), f.number("ratio"), f.number("high")
    )


def _file_from_json(f: Fields) -> FileEntry:
    return FileEntry(f.text("path"), f.text("sha256"), f.whole("bytes"))
