"""Straight-line programs: every value has its place, and no two that live together share it."""

import random
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from t3c.codegen.calls import Buffer, Call, Layout, Place, Program, Value, flatten, lay_out
from t3c.codegen.tvm_api import relax, tvm
from t3c.core.errors import LoweringError


def made(index: int, size: int) -> Buffer:
    return Buffer("made", index, size)


def value(buffer: Buffer) -> Value:
    return Value(buffer, (buffer.bytes,), "uint8")


def overlaps(program: Program, layout: Layout, *, probe: bool) -> list[tuple[int, int]]:
    """Pairs of made buffers that live at the same time and share a byte of the arena."""
    lives: dict[Buffer, tuple[int, int]] = {}
    for i, call in enumerate(program.calls):
        for b in call.args:
            lives[b] = (lives.get(b, (i, i))[0], i)
    if probe:
        lives |= {v.buffer: (lives[v.buffer][0], len(program.calls)) for v in program.taps}
    found = []
    for a, (start, end) in lives.items():
        for b, (since, until) in lives.items():
            at, to = layout.places[a.index], layout.places[b.index]
            if a.index >= b.index or at.output is not None or to.output is not None:
                continue
            meet = start <= until and since <= end
            share = at.offset < to.offset + b.bytes and to.offset < at.offset + a.bytes
            if meet and share:
                found.append((a.index, b.index))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_values_that_live_together_never_share_memory(seed: int) -> None:
    draw = random.Random(seed)
    buffers = [made(i, draw.choice((1, 63, 64, 65, 4096, 100_000))) for i in range(40)]
    calls = tuple(
        Call("k", (*draw.sample(buffers[:i], min(i, draw.randrange(1, 4))), buffers[i]))
        for i in range(1, 40)
    )
    program = Program(
        (Call("k", (buffers[0],)), *calls),
        (),
        (),
        (value(buffers[39]),),
        tuple(value(b) for b in draw.sample(buffers, 6)),
    )
    for probe in (False, True):
        layout = lay_out(program, probe=probe)
        assert not overlaps(program, layout, probe=probe)
        places = [p for p in layout.places.values() if p.output is None]
        assert all(p.offset % 64 == 0 for p in places)
        assert layout.arena_bytes <= sum(-(-b.bytes // 64) * 64 for b in buffers)


def test_a_chain_needs_two_buffers_only() -> None:
    buffers = [made(i, 1000) for i in range(10)]
    calls = tuple(Call("k", (a, b)) for a, b in pairwise(buffers))
    layout = lay_out(Program(calls, (), (), (value(buffers[-1]),)))
    assert layout.arena_bytes == 2 * 1024
    assert layout.places[9] == Place(output=0)


def test_outputs_that_no_kernel_writes_alone_are_copied() -> None:
    given, weight, shared = Buffer("input", 0, 8), Buffer("weight", 0, 8), made(0, 8)
    outputs = tuple(value(b) for b in (given, weight, shared, shared))
    layout = lay_out(Program((Call("k", (given, shared)),), (), ("w",), outputs))
    assert layout.places == {0: Place(output=2)}
    assert layout.copies == (
        (given, Place(output=0)),
        (weight, Place(output=1)),
        (shared, Place(output=3)),
    )
    assert layout.arena_bytes == 0


def test_taps_of_inputs_and_outputs_are_copied_to_the_arena() -> None:
    given, result = Buffer("input", 0, 8), made(0, 8)
    program = Program(
        (Call("k", (given, result)),), (), (), (value(result),), (value(given), value(result))
    )
    layout = lay_out(program, probe=True)
    assert layout.taps == (0, 64)
    assert layout.copies == ((given, Place(offset=0)), (result, Place(offset=64)))
    assert lay_out(program).arena_bytes == 0


def test_what_is_no_kernel_call_is_named() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4,), "float32"))
    weights = relax.Var("weights", relax.TupleType([]))
    with builder.function("main", [x, weights]):
        builder.emit_func_output(builder.emit(relax.op.nn.relu(x)))
    with pytest.raises(LoweringError, match=r"operator relax\.nn\.relu has no kernel"):
        flatten(builder.get()["main"], [], lambda name, _: name)


def test_equal_constants_become_one_weight() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4,), "float32"))
    weights = relax.Var("weights", relax.TupleType([relax.TensorType((2,), "int8")]))
    constants = [relax.const(np.arange(4, dtype=np.float32)) for _ in range(2)]
    with builder.function("main", [x, weights]):
        y = builder.emit(relax.op.add(x, constants[0]))
        builder.emit_func_output(builder.emit(relax.op.multiply(y, constants[1])))
    module = relax.transform.LegalizeOps()(builder.get())
    module = tvm.transform.Sequential([relax.transform.CallTIRRewrite()])(module)
    stored: dict[str, NDArray[np.generic]] = {}

    def keep(name: str, array: NDArray[np.generic]) -> str:
        stored[name] = array
        return name

    program = flatten(module["main"], ["w"], keep)
    assert program.weights == ("w", *stored)
    assert len(stored) == 1
    assert [len(call.args) for call in program.calls] == [3, 3]
