"""Many layers, each in a format, as one function whose kernels are timed one by one.

    trace_shard0(weights, arena, stamps) -> 0        stamps: the cycle counter between kernels

Layers run one after the other, as in a network: each with weights of its own, its input where the
layer before wrote. Everything lies in one arena, so that a host needs no more than the library and
a block of memory, on this machine or another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t3c.codegen import machine_code
from t3c.codegen.build import is_host, tvm_target
from t3c.codegen.calls import ALIGNMENT, Buffer, Call, Layout, Place, Program
from t3c.codegen.entries import entry
from t3c.codegen.families import families_of
from t3c.codegen.kernels.depthwise import grouped_conv
from t3c.codegen.kernels.family import Flow, Image, Kernel
from t3c.codegen.script import read_function
from t3c.codegen.tvm_api import tvm
from t3c.codegen.weights import DepthwiseStep, Families, conv_steps
from t3c.core.codes import Matrix, SiteCodes
from t3c.core.errors import LoweringError
from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2
from t3c.core.sites import ConvSite, LinearSite, Site


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer to time.

    Attributes:
        site: Its shape.
        format: How it is stored and computed.
        codes: Whether a convolution reads and writes codes on fixed grids.
    """

    site: Site
    format: Format
    codes: bool = False


@dataclass(frozen=True, slots=True)
class Shard:
    """A compiled function of layers.

    Attributes:
        function: Its name.
        layers: Number of the layer of each kernel call, in order.
        arena_bytes: Memory that it works in; `fill` says what must lie there.
        weight_bytes: Packed weights of each layer, bytes.
    """

    function: str
    layers: tuple[int, ...]
    arena_bytes: int
    weight_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel of a layer, with names of the activations that it reads and writes."""

    kernel: Kernel
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def steps(layer: Layer, families: Families) -> list[Step]:
    """The kernels that a profile's function would call for a layer, without an epilogue.

    Raises:
        LoweringError: The families cannot compute the format.
    """
    if isinstance(layer.site, LinearSite):
        return _linear(layer.site, layer.format, families)
    if layer.codes and families.conv.static:
        return _flows(layer.site, layer.format, families)
    return _convs(layer.site, layer.format, families)


def _linear(site: LinearSite, fmt: Format, families: Families) -> list[Step]:
    m, n, k = site.rows, site.n, site.k
    product = families.grouped() if fmt.bits == 4 else families.linear
    match fmt:
        case Dense():
            kernel = product.dense(m, n, k)
        case LowRank(rank):
            kernel = product.low_rank(m, n, k, rank, rank)
        case _:
            raise LoweringError(f"site {site.name!r} is linear; {fmt} is a convolution format")
    first = families.linear.quantize(m, k)
    return [Step(first, ("x",), ("q", "s")), Step(kernel, ("q", "s"), ("y",))]


def _convs(site: ConvSite, fmt: Format, families: Families) -> list[Step]:
    """Every step quantizes the range of its input."""
    found: list[Step] = []
    family, at = families.conv, "x"
    for i, step in enumerate(conv_steps(site, shapes_of(site, fmt), fmt)):
        to = "y" if not isinstance(step, DepthwiseStep) and step.last else f"v{i}"
        if isinstance(step, DepthwiseStep):
            kernel = grouped_conv(step.shape, step.shape.in_channels, stored=step.stored)
            found.append(Step(kernel, (at,), (to,)))
        else:
            codes = (f"q{i}", f"s{i}")
            found.append(Step(family.quantize(step.shape), (at,), codes))
            found.append(Step(family.conv(step.shape, step.channels_max), codes, (to,)))
        at = to
    return found


def _flows(site: ConvSite, fmt: Format, families: Families) -> list[Step]:
    """Codes in, codes between integer steps, codes out."""
    found: list[Step] = []
    family, bits = families.conv, families.conv.activation_bits
    listed = conv_steps(site, shapes_of(site, fmt), fmt)
    image: Image | None = Image(
        site.batch, site.in_channels, site.in_size, max(site.padding), False, bits
    )
    at = "x"
    for i, (step, following) in enumerate(zip(listed, [*listed[1:], None], strict=True)):
        to = "y" if following is None else f"v{i}"
        s = step.shape
        if isinstance(step, DepthwiseStep):
            kernel = grouped_conv(s, s.in_channels, stored=step.stored)
            found.append(Step(kernel, (at,), (to,)))
        elif image is None:  # behind float steps: the last one of CP
            codes = (f"q{i}", f"s{i}")
            found.append(Step(family.quantize(s), (at,), codes))
            found.append(Step(family.conv(s, step.channels_max), codes, (to,)))
        else:
            floats = isinstance(following, DepthwiseStep)
            halo = 1 if following is None else max(following.shape.padding)
            made = Image(s.batch, s.out_channels, s.out_size, halo, following is not None, bits)
            target = None if floats else made
            flow = Flow(s, image, target, floats=floats)
            found.append(Step(family.flow(flow, step.channels_max), (at,), (to,)))
            image = target
        at = to
    return found


def shapes_of(site: ConvSite, fmt: Format) -> SiteCodes:
    """Codes of the right shapes, packed for exactly these ranks, with nothing in them."""

    def zeros(*shape: int) -> Matrix:
        return Matrix(np.broadcast_to(np.int8(0), shape), np.broadcast_to(np.float32(1), shape[:1]))

    def floats(*shape: int) -> NDArray[np.float32]:
        return np.zeros(shape, np.float32)

    outs, ins, window = site.out_channels, site.in_channels, site.kernel
    bias = np.broadcast_to(np.float32(0), (outs,))
    match fmt:
        case Dense():
            return SiteCodes(bias, dense=zeros(outs, ins, *window))
        case LowRank(rank):
            return SiteCodes(bias, low=zeros(rank, ins), high=zeros(outs, rank))
        case Tucker2(a, b):
            core = zeros(b, a, *window)
            return SiteCodes(bias, reduce=zeros(a, ins), core=core, expand=zeros(outs, b))
        case CP(rank):
            tall, wide = floats(rank, window[0]), floats(rank, window[1])
            inner, outer = zeros(rank, ins), zeros(outs, rank)
            return SiteCodes(bias, cp_tall=tall, cp_wide=wide, cp_in=inner, cp_out=outer)


def compile_shards(layers: Sequence[Layer], size: int, spec: Any, path: Path) -> list[Shard]:
    """Compile layers into one shared library.

    Args:
        layers: What to time, in this order.
        size: Layers of a function, at most.
        spec: The target; a CPU.
        path: The library to write.

    Returns:
        Its functions.

    Raises:
        LoweringError: A kernel does not fit the target.
    """
    families = families_of(spec)
    kernels: dict[str, Any] = {}
    shards: list[Shard] = []
    texts: list[str] = []
    for start in range(0, len(layers), size):
        made = _Arena(kernels)
        for number, layer in enumerate(layers[start : start + size]):
            made.add(number, steps(layer, families))
        program = Program(tuple(made.calls), (), (), ())
        places = {i: Place(offset) for i, offset in enumerate(made.offsets())}
        layout = Layout(places, made.bytes, ())
        name = f"trace_shard{len(shards)}"
        texts.append(entry(name, program, layout, trace=True))
        shards.append(Shard(name, tuple(made.of_call), made.bytes, tuple(made.weights)))
    target = tvm_target(spec)
    try:
        with tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
            objects = [machine_code.kernels(kernels, target), machine_code.entries(texts, target)]
    except (RuntimeError, ValueError) as error:
        raise LoweringError(f"TVM cannot build layers for {spec.name!r}: {error}") from error
    machine_code.link(objects, path, None if is_host(spec) else spec.cross_compiler)
    return shards


@dataclass(slots=True)
class _Arena:
    """Gives every buffer its place: activations of all layers share the start, weights follow."""

    kernels: dict[str, Any]
    calls: list[Call] = field(default_factory=list)
    of_call: list[int] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    bytes: int = 0
    _buffers: list[tuple[int | None, int]] = field(default_factory=list)

    def add(self, number: int, listed: Sequence[Step]) -> None:
        """The calls of one layer."""
        sizes: dict[str, int] = {}
        arguments = []
        for step in listed:
            found = self._parameters(step.kernel)
            arguments.append(found)
            ins, outs = len(step.reads), len(found) - len(step.writes)
            for name, size in zip(step.reads, found[:ins], strict=True):
                sizes[name] = max(size, sizes.get(name, 0))
            for name, size in zip(step.writes, found[outs:], strict=True):
                sizes[name] = max(size, sizes.get(name, 0))
        at = self._activations(sizes, listed)
        self.weights.append(0)
        for step, found in zip(listed, arguments, strict=True):
            ins, outs = len(step.reads), len(found) - len(step.writes)
            self.calls.append(
                Call(
                    step.kernel.name,
                    (
                        *(at[name] for name in step.reads),
                        *(self._weight(size) for size in found[ins:outs]),
                        *(at[name] for name in step.writes),
                    ),
                )
            )
            self.of_call.append(number)

    def _parameters(self, kernel: Kernel) -> list[int]:
        """Bytes of each parameter of a kernel."""
        if kernel.name not in self.kernels:
            function = read_function(kernel.source)
            self.kernels[kernel.name] = function.with_attr("tirx.is_scheduled", True)
        return [
            prod(int(n) for n in buffer.shape) * np.dtype(str(buffer.dtype)).itemsize
            for buffer in self.kernels[kernel.name].params
        ]

    def _activations(self, sizes: dict[str, int], listed: Sequence[Step]) -> dict[str, Buffer]:
        """Input and output of a layer share one place where the last kernel allows it."""
        apart = "x" in listed[-1].reads
        first = sizes["x"] if apart else max(sizes["x"], sizes["y"])
        at = {"x": self._buffer(0, sizes["x"])}
        end = _padded(first)
        for name, size in sizes.items():
            if name == "x":
                continue
            if name == "y" and not apart:
                at[name] = self._buffer(0, size)
                continue
            at[name] = self._buffer(end, size)
            end += _padded(size)
        self.bytes = max(self.bytes, end)
        return at

    def _buffer(self, offset: int | None, size: int) -> Buffer:
        self._buffers.append((offset, size))
        return Buffer("made", len(self._buffers) - 1, size)

    def _weight(self, size: int) -> Buffer:
        self.weights[-1] += size
        return self._buffer(None, size)

    def offsets(self) -> list[int]:
        """Offset of every buffer; weights lie behind the activations, layer by layer."""
        found = []
        for offset, size in self._buffers:
            if offset is None:
                offset = self.bytes
                self.bytes += _padded(size)
            found.append(offset)
        return found


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def fill(size: int, seed: int = 0) -> NDArray[np.uint8]:
    """Bytes that make sense as whatever a kernel reads: codes that differ, small floats.

    Every second byte is random, the others are 0x3C: float32 and bfloat16 numbers near .0117.

    Args:
        size: How many.
        seed: Of the random bytes.
    """
    words = np.random.default_rng(seed).integers(0, 256, -(-size // 2), np.uint16)
    return (words | np.uint16(0x3C00)).view(np.uint8)[:size]
