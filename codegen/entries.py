"""Text of the functions that a host calls: a program's kernel calls with every address decided.

    profile_p3(input..., weights, arena, output...)          -> 0, or what a kernel returned
    probe_p3(the same)                                       leaves its taps in a larger arena
    trace_p3(input..., weights, arena, output..., stamps)    notes cycles between calls

`weights` holds the addresses of the profile's tensors, `arena` the bytes of intermediate values.
"""

from t3c.codegen.calls import Buffer, Layout, Place, Program
from t3c.codegen.kernels.emit import Emitter, buffer

PREFIX = "t3c_kernel_"
"""Before a kernel's name in the symbol table, so that no kernel is called like a C function."""


def entry(name: str, program: Program, layout: Layout, *, trace: bool = False) -> str:
    """One function.

    Args:
        name: Its symbol.
        program: What it does.
        layout: Where its values lie.
        trace: Note the cycle counter before the first call and after each.
    """
    emit = Emitter()
    emit('failed = T.alloc_buffer((1,), "int32")')
    emit("failed[0] = 0")
    if trace:
        _stamp(emit, 0)
    for i, call in enumerate(program.calls):
        args = [f'"{PREFIX}{call.kernel}"', *(_address(layout, b) for b in call.args)]
        emit(f'failed[0] = failed[0] | T.call_extern("int32", {", ".join(args)})')
        if trace:
            _stamp(emit, i + 1)
    for source, to in layout.copies:
        args = [_at(to), _address(layout, source), f"T.int64({source.bytes})"]
        emit(f'T.evaluate(T.call_extern("handle", "memcpy", {", ".join(args)}))')
    emit("T.Return(failed[0])")
    listed = [buffer(f"input{i}", *given) for i, given in enumerate(program.inputs)]
    listed.append(buffer("weights", (max(1, len(program.weights)),), "int64"))
    listed.append(buffer("arena", (max(1, layout.arena_bytes),), "uint8"))
    listed += [buffer(f"output{i}", v.shape, v.dtype) for i, v in enumerate(program.outputs)]
    if trace:
        listed.append(buffer("stamps", (len(program.calls) + 1,), "int64"))
    return emit.function(name, listed)


def _stamp(emit: Emitter, i: int) -> None:
    emit(f'stamps[{i}] = T.call_llvm_intrin("int64", "llvm.readcyclecounter")')


def _address(layout: Layout, of: Buffer) -> str:
    match of.kind:
        case "input":
            return f"input{of.index}.data"
        case "weight":
            return f'T.reinterpret(weights[{of.index}], dtype="handle")'
        case "made":
            return _at(layout.places[of.index])


def _at(place: Place) -> str:
    if place.output is not None:
        return f"output{place.output}.data"
    return f"T.address_of(arena[{place.offset}])"
