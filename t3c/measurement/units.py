"""What is built once and timed on any device: a library, a block of memory, and what to call.

A unit is a folder: ``unit.json``, ``lib.so``, and ``block.npy`` where weights matter. Its functions
find everything in memory that the host hands them: a device needs no more than TVM's runtime.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from t3c.codegen import machine_code
from t3c.codegen.build import Built, build, is_host, tvm_target
from t3c.codegen.calls import ALIGNMENT
from t3c.codegen.families import families_of
from t3c.codegen.kernels.emit import Emitter, buffer
from t3c.codegen.shards import Layer, compile_shards, shapes_of
from t3c.controller.options import formats as menu
from t3c.controller.suffix import Suffix
from t3c.controller.work import rest_of
from t3c.core.artifact import write_atomic
from t3c.core.codes import Grouped, Matrix, SiteCodes
from t3c.core.formats import Dense, Format, LowRank, Tucker2
from t3c.core.grid import Grid
from t3c.core.sites import ConvSite, LinearSite, Site
from t3c.cost_models.base import Row, Work
from t3c.cost_models.dataset import row_json, row_of
from t3c.elastic.conv import ElasticConv
from t3c.elastic.linear import ElasticLinear
from t3c.elastic.model import ElasticModel
from t3c.elastic.snap import Snap
from t3c.measurement.zoo import Network
from t3c.passes.capture import capture
from t3c.passes.pipeline import lowering_graph, rewrite
from t3c.passes.sites import EVERYTHING, Makers
from t3c.targets.base import TargetSpec

PLACE = "place_weights"
"""Function that turns offsets into addresses on the device."""
SHARES = {"half": 0.5, "quarter": 0.25}
MIXED = 2
"""Profiles with a format drawn for each layer, beside dense and `SHARES`."""
TOGETHER = 8
"""Layers of a function. Their weights are as large as those of a small network, so that they
are met in the cache where a network's repeated calls would meet them."""
Array = tuple[tuple[int, ...], str]
"""(shape, data type)."""


@dataclass(frozen=True, slots=True)
class Function:
    """One function of a unit: a shard of layers, or a profile.

    Attributes:
        trace: The function that notes the cycle counter between kernels.
        call: The same without; empty for a shard.
        profile: Name of the profile; empty for a shard.
        arena_bytes: Memory that it works in.
        inputs: Its inputs.
        outputs: Its outputs.
        weights: Offsets of its weights in the unit's block.
        rows: The layers.
        of_call: For each kernel call the number of its layer, or -1.
        weight_bytes: Of each layer of a shard.
        groups: Of each layer of a shard (`KernelRow.group`).
        rest: Of a profile: everything but the layers.
    """

    trace: str
    call: str
    profile: str
    arena_bytes: int
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    weights: tuple[int, ...]
    rows: tuple[Row, ...]
    of_call: tuple[int, ...]
    weight_bytes: tuple[int, ...] = ()
    groups: tuple[str, ...] = ()
    rest: Work = Work()  # noqa: RUF009  # frozen

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **{name: getattr(self, name) for name in self.__slots__},
            "rows": [row_json(row) for row in self.rows],
            "rest": asdict(self.rest),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        for name in ("inputs", "outputs"):
            given[name] = tuple((tuple(shape), dtype) for shape, dtype in data[name])
        given["rows"] = tuple(row_of(row) for row in data["rows"])
        given["rest"] = Work(**data["rest"])
        return cls(**given)


@dataclass(frozen=True, slots=True)
class Unit:
    """A folder with a library.

    Attributes:
        path: The folder.
        name: Of the shard, or of the network.
        network: Whether it is a network.
        functions: What to call.
    """

    path: Path
    name: str
    network: bool
    functions: tuple[Function, ...]

    @property
    def library(self) -> Path:
        """The shared library."""
        return self.path / "lib.so"

    def block(self) -> NDArray[np.uint8] | None:
        """Weights of all functions; None: values do not matter."""
        path = self.path / "block.npy"
        return np.load(path, allow_pickle=False) if path.exists() else None

    def write(self) -> None:
        """Write ``unit.json``, last, so that a folder without it is no unit."""
        document = {
            "name": self.name,
            "network": self.network,
            "functions": [f.to_json() for f in self.functions],
        }
        write_atomic(self.path / "unit.json", json.dumps(document).encode())

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The unit in a folder; None if it was not built to the end."""
        file = path / "unit.json"
        if not file.exists():
            return None
        data = json.loads(file.read_text())
        functions = tuple(Function.from_json(f) for f in data["functions"])
        return cls(path, data["name"], data["network"], functions)


def build_shard(
    name: str,
    rows: Sequence[Row],
    groups: Sequence[str],
    spec: TargetSpec,
    path: Path,
    copies: int = 1,
) -> Unit:
    """Compile layers into one unit.

    Args:
        name: Of the unit.
        rows: The layers, in order.
        groups: Of each row (`KernelRow.group`).
        spec: Target of the kernels.
        path: Folder to write.
        copies: Of each layer, one after the other, with weights of its own; as many as a function
            has layers, so that each function is of one layer alone.

    Raises:
        LoweringError: A kernel does not fit the target.
    """
    path.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows for _ in range(copies)]
    groups = [group for group in groups for _ in range(copies)]
    layers = [Layer(row.site, row.format, row.codes) for row in rows]
    functions: list[Function] = []
    for shard in compile_shards(layers, TOGETHER, spec, path / "lib.so"):
        first = TOGETHER * len(functions)
        own = slice(first, first + len(shard.weight_bytes))
        functions.append(
            Function(
                trace=shard.function,
                call="",
                profile="",
                arena_bytes=shard.arena_bytes,
                inputs=(),
                outputs=(),
                weights=(0,),
                rows=tuple(rows[own]),
                of_call=shard.layers,
                weight_bytes=shard.weight_bytes,
                groups=tuple(groups[own]),
            )
        )
    unit = Unit(path, name, False, tuple(functions))
    unit.write()
    return unit


def build_network(network: Network, spec: TargetSpec, threads: int, path: Path) -> Unit:
    """Compile a network of random weights with its profiles into one unit.

    Args:
        network: What to build.
        spec: Target of the kernels.
        threads: Threads of a call, for its rows.
        path: Folder to write.

    Raises:
        PassError: The network cannot be captured.
        LoweringError: It cannot be lowered to the target.
    """
    path.mkdir(parents=True, exist_ok=True)
    elastic = elastic_of(network)
    families = families_of(spec)
    static = families.conv.static and bool(elastic.snaps)
    profiles = choose(elastic.sites, spec, four=families.linear.grouped is not None)
    bits = families.conv.activation_bits
    if static:
        elastic.set_grids(
            {n: Grid.up_to(1.0, signed=s.signed, bits=bits) for n, s in elastic.snaps.items()}
        )
    rng = np.random.default_rng(0)
    inner = Grid.up_to(1.0, signed=True, bits=bits) if static else None
    codes = {
        name: random_codes(site, [p[name] for p in profiles.values()], rng, inner)
        for name, site in elastic.sites.items()
    }
    program = torch.export.export(
        lowering_graph(elastic.graph), elastic.example_inputs, strict=False
    )
    built = build(program, elastic.sites, codes, profiles, spec)
    block, offsets = _block(built)
    _link(built, len(block), path / "lib.so")
    np.save(path / "block.npy", block)
    suffix = Suffix(elastic)
    suffix.load(elastic.example_inputs)
    rest = rest_of(elastic.graph, suffix.values())
    with torch.inference_mode():
        outputs = [_array(y) for y in elastic.graph(*elastic.example_inputs)]
    inputs = tuple(_array(x) for x in elastic.example_inputs)
    numbers = {name: i for i, name in enumerate(elastic.sites)}
    functions = tuple(
        Function(
            trace=built.traces[name].function,
            call=made.function,
            profile=name,
            arena_bytes=max(1, made.arena_bytes or 0),
            inputs=inputs,
            outputs=tuple(outputs),
            weights=tuple(offsets[w] for w in made.weights),
            rows=tuple(
                Row(site, profiles[name][s], threads, static and isinstance(site, ConvSite))
                for s, site in elastic.sites.items()
            ),
            of_call=tuple(-1 if s is None else numbers[s] for s in built.traces[name].sites),
            rest=rest,
        )
        for name, made in built.profiles.items()
    )
    unit = Unit(path, network.name, True, functions)
    unit.write()
    return unit


def elastic_of(network: Network) -> ElasticModel:
    """The network with elastic layers."""
    model, example = network.make()
    captured = capture(model, example, None)
    makers = Makers(linear=ElasticLinear, conv=ElasticConv, snap=Snap)
    graph, report = rewrite(captured.graph, makers, EVERYTHING)
    return ElasticModel(graph, captured, report)


def choose(
    sites: Mapping[str, Site], spec: TargetSpec, *, four: bool
) -> dict[str, dict[str, Format]]:
    """Profiles of a network: dense, shares of full rank, and some with a format drawn per layer.

    Args:
        sites: Site name -> site.
        spec: The target.
        four: Whether 4-bit weights are drawn, too.
    """
    rng = np.random.default_rng(len(sites))
    found: dict[str, dict[str, Format]] = {"dense": dict.fromkeys(sites, Dense(8))}
    for name, share in SHARES.items():
        found[name] = {s: menu(site, spec.rank_step, (share,))[-1] for s, site in sites.items()}
    whole = list(found.values())  # mixed profiles call the same kernels: few are compiled
    for i in range(MIXED):
        drawn: dict[str, Format] = {}
        for name, site in sites.items():
            drawn[name] = whole[int(rng.integers(len(whole)))][name]
            if four and isinstance(site, LinearSite) and rng.random() < 0.25:
                drawn[name] = Dense(4)
        found[f"mixed{i}"] = drawn
    return found


def random_codes(
    site: Site, formats: Sequence[Format], rng: np.random.Generator, inner: Grid | None
) -> SiteCodes:
    """Random integer weights for the largest ranks among formats.

    Args:
        site: The layer.
        formats: What profiles use.
        rng: Of the codes.
        inner: Grid of activations between factors; None: there is none.
    """
    made: dict[str, Any] = {}
    if isinstance(site, ConvSite):
        largest = {
            type(fmt): max((f for f in formats if type(f) is type(fmt)), key=lambda f: f.ranks)
            for fmt in formats
        }
        for fmt in largest.values():
            shapes = shapes_of(site, fmt)
            for name in ("dense", "low", "high", "reduce", "core", "expand"):
                if (matrix := getattr(shapes, name)) is not None:
                    made[name] = _matrix(matrix.q.shape, rng)
        if inner is not None:
            parts: dict[type[Format], tuple[str, ...]]
            parts = {LowRank: ("low",), Tucker2: ("reduce", "core")}
            made["grids"] = {p: inner for kind in largest for p in parts.get(kind, ())}
    else:
        for fmt in formats:
            match fmt:
                case Dense(bits):
                    sizes = {"dense": (site.n, site.k)}
                case LowRank(_, bits):
                    ranks = [f.rank for f in formats if isinstance(f, LowRank) and f.bits == bits]
                    sizes = {"low": (max(ranks), site.k), "high": (site.n, max(ranks))}
                case _:
                    raise ValueError(f"site {site.name!r} is linear; it cannot be {fmt}")
            for name, shape in sizes.items():
                if bits == 4:
                    made[f"{name}4"] = _grouped(shape, rng)
                else:
                    made[name] = _matrix(shape, rng)
    outs = site.n if isinstance(site, LinearSite) else site.out_channels
    return SiteCodes(np.zeros(outs, np.float32), **made)


def _matrix(shape: tuple[int, ...], rng: np.random.Generator) -> Matrix:
    scale = np.full(shape[0], 1 / 64 / float(np.prod(shape[1:])) ** 0.5, np.float32)
    return Matrix(rng.integers(-127, 128, shape, np.int8), scale)


def _grouped(shape: tuple[int, int], rng: np.random.Generator) -> Grouped:
    scale = np.full((shape[0], -(-shape[1] // 64)), 2.0**-7, np.float32)
    return Grouped(rng.integers(-8, 8, shape, np.int8), scale)


def _block(built: Built) -> tuple[NDArray[np.uint8], dict[str, int]]:
    """All weights in one array, and where each lies."""
    offsets: dict[str, int] = {}
    size = 0
    for name, tensor in built.tensors.items():
        offsets[name] = size
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    block = np.zeros(max(1, size), np.uint8)
    for name, tensor in built.tensors.items():
        flat = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        block[offsets[name] : offsets[name] + flat.size] = flat
    return block, offsets


def _link(built: Built, size: int, path: Path) -> None:
    """The library with traces, and with one function that makes addresses of offsets."""
    most = max(len(p.weights) for p in built.profiles.values())
    emit = Emitter()
    # TVM cannot turn a pointer into a number; C's labs takes it in the same register.
    with emit.loop("i", most) as i:
        emit(f'table[{i}] = offsets[{i}] + T.call_extern("int64", "labs", block.data)')
    listed = [
        ("block", (size,), "uint8"),
        ("offsets", (most,), "int64"),
        ("table", (most,), "int64"),
    ]
    text = emit.function(PLACE, [buffer(*one) for one in listed])
    place = machine_code.entries([text], tvm_target(built.spec))
    compiler = None if is_host(built.spec) else built.spec.cross_compiler
    machine_code.link([*built.code, *built.checks, place], path, compiler)


def _array(tensor: torch.Tensor) -> Array:
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
