"""A profile as straight-line code: kernel calls over inputs, weights, outputs and one arena.

Before: lv = call_tir(quantize, x); y = call_tir(dense, lv[0], lv[1], weights[3])   in Relax
After:  quantize(input 0, arena + 0, arena + 2048); dense(arena + 0, arena + 2048, weight 3, output)

No value is allocated, checked or released while such a program runs: where everything lies is
decided here.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.tvm_api import relax, tvm
from t3c.core.errors import LoweringError

ALIGNMENT = 64
"""Every buffer starts at a multiple of so many bytes."""

Kind = Literal["input", "weight", "made"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory of one tensor; reshaped tensors share it.

    Attributes:
        kind: ``input`` and ``weight`` are given, ``made`` is written by a kernel.
        index: Number among its kind.
        bytes: Size.
    """

    kind: Kind
    index: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor."""

    buffer: Buffer
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel call; a kernel takes its inputs, then its outputs."""

    kernel: str
    args: tuple[Buffer, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A function without branches.

    Attributes:
        calls: In order.
        inputs: Shape and data type of each input.
        weights: Name of each weight.
        outputs: What it returns, in order.
        taps: Values that a probe looks at.
    """

    calls: tuple[Call, ...]
    inputs: tuple[tuple[tuple[int, ...], str], ...]
    weights: tuple[str, ...]
    outputs: tuple[Value, ...]
    taps: tuple[Value, ...] = ()


Constant = Callable[[str, NDArray[np.generic]], str]


def flatten(
    function: Any,
    weights: Sequence[str],
    constant: Constant,
    *,
    taps: int = 0,
    table: Sequence[str] = (),
) -> Program:
    """Read a Relax function whose every operator is a kernel call.

    Args:
        function: After CallTIRRewrite; its last parameter is the tuple of weights.
        weights: Names of the tuple's tensors.
        constant: Called with a name and an array that the graph holds: stores it as a weight.
        taps: How many of the values returned last are for probes only.
        table: Weights that come first, so that a profile and its probe take the same ones.

    Raises:
        LoweringError: An operation is left that is no kernel call.
    """
    numbers = {name: i for i, name in enumerate(table)}
    return _Reader(weights, constant, weights=numbers).read(function, taps)


@dataclass(slots=True)
class _Reader:
    names: Sequence[str]
    constant: Constant
    calls: list[Call] = field(default_factory=list)
    values: dict[Any, Any] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    made: int = 0

    def read(self, function: Any, taps: int) -> Program:
        *inputs, weights = function.params
        given = [_type_of(p) for p in inputs]
        for i, (param, (shape, dtype)) in enumerate(zip(inputs, given, strict=True)):
            self.values[param] = Value(Buffer("input", i, _bytes(shape, dtype)), shape, dtype)
        fields = [_type(t) for t in weights.ty.fields]
        self.values[weights] = tuple(
            self.weight(name, *t) for name, t in zip(self.names, fields, strict=True)
        )
        for block in function.body.blocks:
            for binding in block.bindings:
                self.values[binding.var] = self.value(binding.value)
        result = self.value(function.body.body)
        values = result if isinstance(result, tuple) else (result,)
        count = len(values) - taps
        return Program(
            tuple(self.calls), tuple(given), tuple(self.weights), values[:count], values[count:]
        )

    def weight(self, name: str, shape: tuple[int, ...], dtype: str) -> Value:
        index = self.weights.setdefault(name, len(self.weights))
        return Value(Buffer("weight", index, _bytes(shape, dtype)), shape, dtype)

    def value(self, expr: Any) -> Any:
        if isinstance(expr, relax.Var):
            return self.values[expr]
        if isinstance(expr, relax.Tuple):
            return tuple(self.value(e) for e in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self.value(expr.tuple_value)[expr.index]
        if isinstance(expr, tvm.ir.GenericConst):
            array = expr.value.numpy()
            content = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes())
            name = self.constant(f"constant.{content.hexdigest()[:16]}", array)
            return self.weight(name, array.shape, str(array.dtype))
        if isinstance(expr, relax.Call):
            return self.call(expr)
        raise LoweringError(f"cannot lower {type(expr).__name__} to kernel calls: {expr}")

    def call(self, call: Any) -> Any:
        if isinstance(call.op, tvm.ir.GlobalVar):
            args = tuple(self.value(a).buffer for a in call.args)
            self.calls.append(Call(str(call.op.name_hint), args))
            return ()
        name = getattr(call.op, "name", str(call.op))
        if name == "relax.builtin.alloc_tensor":
            shape = tuple(int(n) for n in call.args[0].values)
            dtype = str(call.args[1].value)
            self.made += 1
            return Value(Buffer("made", self.made - 1, _bytes(shape, dtype)), shape, dtype)
        if name == "relax.reshape":
            x = self.value(call.args[0])
            shape, _ = _type_of(call)
            return Value(x.buffer, shape, x.dtype)
        raise LoweringError(
            f"operator {name} has no kernel: it is left over after every pass; exclude the part of "
            "the model that holds it"
        )


def _type_of(expr: Any) -> tuple[tuple[int, ...], str]:
    return _type(expr.ty)


def _type(ty: Any) -> tuple[tuple[int, ...], str]:
    return tuple(int(n) for n in ty.shape.values), str(ty.dtype)


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return prod(shape) * np.dtype(dtype).itemsize


@dataclass(frozen=True, slots=True)
class Place:
    """Where a made buffer lies: in the arena at `offset`, or as output number `output`."""

    offset: int = 0
    output: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Memory of one call.

    Attributes:
        places: Number of a made buffer -> its place.
        arena_bytes: Size of the arena.
        copies: (from, place) of outputs and taps that are inputs, weights or other outputs.
        taps: Offset of each tap in the arena; empty unless asked for.
    """

    places: Mapping[int, Place]
    arena_bytes: int
    copies: tuple[tuple[Buffer, Place], ...]
    taps: tuple[int, ...] = ()


def lay_out(program: Program, *, probe: bool = False) -> Layout:
    """Give every made buffer its place; buffers whose lives do not meet share memory.

    Largest first, each at the lowest offset that is free while it lives; within one call nothing
    overlaps, since a kernel may not write where it reads.

    Args:
        program: The calls.
        probe: Keep the taps in the arena to the end.
    """
    lives = _lives(program)
    places: dict[int, Place] = {}
    copies: list[tuple[Buffer, Place]] = []
    for i, value in enumerate(program.outputs):
        buffer, place = value.buffer, Place(output=i)
        if buffer.kind == "made" and buffer.index not in places:
            places[buffer.index] = place
        else:
            copies.append((buffer, place))
    pinned = {v.buffer for v in program.taps} if probe else set[Buffer]()
    free = {b: life for b, life in lives.items() if b.index not in places}
    end = len(program.calls)
    offsets, total = _pack({b: (a, end if b in pinned else z) for b, (a, z) in free.items()})
    places |= {b.index: Place(offset) for b, offset in offsets.items()}
    for buffer in sorted(pinned - free.keys(), key=lambda b: (b.kind, b.index)):
        copies.append((buffer, Place(total)))
        offsets[buffer] = total
        total += _padded(buffer.bytes)
    taps = tuple(offsets[v.buffer] for v in program.taps) if probe else ()
    return Layout(places, total, tuple(copies), taps)


def _pack(lives: Mapping[Buffer, tuple[int, int]]) -> tuple[dict[Buffer, int], int]:
    """Offset of each buffer and the size of all, by first fit, largest first."""
    offsets: dict[Buffer, int] = {}
    taken: list[tuple[int, int, int, int]] = []
    total = 0
    for buffer, (first, last) in sorted(lives.items(), key=lambda item: -item[0].bytes):
        size, offset = _padded(buffer.bytes), 0
        for begin, end in sorted((a, b) for a, b, s, u in taken if s <= last and first <= u):
            if offset + size <= begin:
                break
            offset = max(offset, end)
        offsets[buffer] = offset
        taken.append((offset, offset + size, first, last))
        total = max(total, offset + size)
    return offsets, total


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _lives(program: Program) -> dict[Buffer, tuple[int, int]]:
    """First and last call that touches each made buffer."""
    lives: dict[Buffer, tuple[int, int]] = {}
    for i, call in enumerate(program.calls):
        for buffer in call.args:
            if buffer.kind == "made":
                lives[buffer] = (lives.get(buffer, (i, i))[0], i)
    return lives
