"""Reading and rewriting TIR expressions: substitution, strides, polynomials for libm calls.

TVM hands Python no functors over TIR expressions, so this module has a small one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from t3c.codegen.rules import polynomials
from t3c.codegen.tvm_api import tvm

tirx = tvm.tirx
_BINARY = (
    tirx.Add,
    tirx.Sub,
    tirx.Mul,
    tirx.Div,
    tirx.Mod,
    tirx.FloorDiv,
    tirx.FloorMod,
    tirx.Min,
    tirx.Max,
    tirx.EQ,
    tirx.NE,
    tirx.LT,
    tirx.LE,
    tirx.GT,
    tirx.GE,
    tirx.And,
    tirx.Or,
)
_EXTRA_BINARY = tuple(
    getattr(tvm.ir.prim, name)
    for name in ("LShift", "RShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor")
)
Load = tvm.ir.TensorLoad


def children(expr: Any) -> tuple[Any, ...]:
    """The direct operands of an expression."""
    if isinstance(expr, _BINARY + _EXTRA_BINARY):
        return (expr.a, expr.b)
    if isinstance(expr, Load):
        return tuple(expr.indices)
    if isinstance(expr, tvm.ir.Call):
        return tuple(expr.args)
    if isinstance(expr, tirx.Cast | tirx.Broadcast):
        return (expr.value,)
    if isinstance(expr, tirx.Not | tvm.ir.prim.BitwiseNot):
        return (expr.a,)
    if isinstance(expr, tirx.Select):
        return (expr.condition, expr.true_value, expr.false_value)
    if isinstance(expr, tirx.Let):
        return (expr.value, expr.body)
    return ()


def walk(expr: Any) -> Iterator[Any]:
    """The expression and everything in it."""
    yield expr
    for child in children(expr):
        yield from walk(child)


def loads(expr: Any) -> list[Any]:
    """All buffer reads in an expression."""
    return [e for e in walk(expr) if isinstance(e, Load)]


def mentions(expr: Any, var: Any) -> bool:
    """Whether a variable occurs in an expression."""
    return any(e.same_as(var) for e in walk(expr))


def is_costly(expr: Any) -> bool:
    """Whether an expression has a call worth keeping the result of."""
    return any(isinstance(e, tvm.ir.Call) and e.op.name in polynomials.COSTLY for e in walk(expr))


def is_guarded(expr: Any) -> bool:
    """Whether an expression reads only where a condition holds."""
    return any(isinstance(e, tvm.ir.Call) and e.op.name == "tirx.if_then_else" for e in walk(expr))


@dataclass(slots=True)
class Rewriter:
    """Rebuilds expressions.

    Attributes:
        values: What to put for each variable.
        places: What to put for each buffer: the new buffer, and how many leading indices to drop.
        reads: What to put for every read of a buffer.
        polynomials: Whether to put polynomials for calls of the mathematics library.
    """

    values: Mapping[Any, Any] = field(default_factory=dict)
    places: Mapping[Any, tuple[Any, int]] = field(default_factory=dict)
    reads: Mapping[Any, Any] = field(default_factory=dict)
    polynomials: bool = True

    def __call__(self, expr: Any) -> Any:
        """The rebuilt expression."""
        if isinstance(expr, tirx.Var):
            return self.values.get(expr, expr)
        if isinstance(expr, Load):
            if expr.source in self.reads:
                return self.reads[expr.source]
            indices = [self(i) for i in expr.indices]
            buffer, dropped = self.places.get(expr.source, (expr.source, 0))
            return tirx.BufferLoad(buffer, (indices[dropped:] or [0]) if dropped else indices)
        parts = [self(c) for c in children(expr)]
        if isinstance(expr, tvm.ir.Call):
            if self.polynomials and (made := polynomials.expand(expr, parts)) is not None:
                return made
            return tvm.ir.Call(expr.op, parts, expr.attrs, list(expr.ty_args), ret_ty=expr.ty)
        if isinstance(expr, tirx.EQ | tirx.NE) and str(expr.a.ty.dtype) == "bool":
            # TVM compares booleans as if they were floats, which LLVM refuses.
            parts = [tirx.Cast("int8", p) for p in parts]
        if isinstance(expr, _BINARY + _EXTRA_BINARY):
            return type(expr)(*parts)
        if isinstance(expr, tirx.Cast):
            return tirx.Cast(expr.ty.dtype, *parts)
        if isinstance(expr, tirx.Not | tvm.ir.prim.BitwiseNot | tirx.Select):
            return type(expr)(*parts)
        if isinstance(expr, tirx.Let):
            return tirx.Let(expr.var, *parts)
        return expr


def offset(load: Any) -> Any:
    """The flat element number that a read or write (buffer, indices) touches."""
    buffer, indices = (load.source, load.indices) if isinstance(load, Load) else load
    flat: Any = 0
    for extent, index in zip(buffer.shape, indices, strict=True):
        flat = flat * extent + index
    return flat


def stride(access: Any, var: Any, analyzer: Any) -> int | None:
    """Elements between accesses at var and var + 1; None if it is not a constant."""
    flat = offset(access)
    if isinstance(flat, int) or not mentions(flat, var):
        return 0
    step = analyzer.simplify(Rewriter({var: var + 1})(flat) - flat)
    return int(step.value) if isinstance(step, tirx.IntImm) else None
