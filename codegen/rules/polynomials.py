"""Polynomials for calls of the mathematics library, which would run one element at a time.

All of them are expressions of float32 scalars: inside a vectorized loop TVM widens every step.
"""

from collections.abc import Sequence
from typing import Any

from t3c.codegen.kernels.emit import ERF, ERF_LIMIT, TANH_LIMIT, TANH_P, TANH_Q
from t3c.codegen.kernels.vectors import EXP2_POLYNOMIAL, LOG2_E, ROUNDER
from t3c.codegen.tvm_api import tvm

tirx = tvm.tirx
COSTLY = frozenset(
    f"tirx.{name}"
    for name in (
        "exp exp2 exp10 log log2 log10 log1p tanh sigmoid erf pow sin cos tan sqrt rsqrt".split()
    )
)
"""Calls that are not to be computed twice."""
LOG2_E_REST = 1.92596299112661746e-08
"""log2(e) minus its float32 value."""
LOWEST, HIGHEST = -103.97, 88.72
"""Below, exp is zero in float32; above, infinity."""


def _f(value: float) -> Any:
    return tirx.const(value, "float32")


def _call(name: str, *args: Any, dtype: str = "float32") -> Any:
    return tvm.ir.Call(tvm.ir.Op.get(name), list(args), ret_ty=dtype)


def fma(a: Any, b: Any, c: Any) -> Any:
    """A * b + c in one rounding."""
    return _call("tirx.fma", a, b, c)


def _bits(x: Any, dtype: str) -> Any:
    return _call("tirx.reinterpret", x, dtype=dtype)


class _Chain:
    """A value built from steps, each bound to a name."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, Any]] = []

    def __call__(self, name: str, value: Any, dtype: str = "float32") -> Any:
        var = tirx.Var(name, dtype)
        self.steps.append((var, value))
        return var

    def close(self, value: Any) -> Any:
        for var, bound in reversed(self.steps):
            value = tirx.Let(var, bound, value)
        return value


def _polynomial(let: _Chain, x: Any, coefficients: Sequence[float]) -> Any:
    value: Any = _f(coefficients[-1])
    for c in coefficients[-2::-1]:
        value = let("p", fma(value, x, _f(c)))
    return value


def exp(let: _Chain, x: Any) -> Any:
    """The exponential, relative error below 1e-6; zero, infinity and NaN where exp has them.

    The power of two is applied in two halves, so that results below the normal range come out.
    """
    x = let("x", x)
    c = let("c", tirx.Select(x < _f(LOWEST), _f(LOWEST), x))
    c = let("c", tirx.Select(c > _f(HIGHEST), _f(HIGHEST), c))
    z = let("z", fma(c, _f(LOG2_E), _f(ROUNDER)))
    minus = let("m", _f(ROUNDER) - z)
    part = let("r", fma(c, _f(LOG2_E_REST), fma(c, _f(LOG2_E), minus)))
    p = _polynomial(let, part, EXP2_POLYNOMIAL)
    n = let("n", _bits(z, "int32") - tirx.const(0x4B400000, "int32"), "int32")
    half = let("h", n >> tirx.const(1, "int32"), "int32")
    rest = let("h", n - half, "int32")
    bias, shift = tirx.const(127, "int32"), tirx.const(23, "int32")
    one = _bits((half + bias) << shift, "float32")
    two = _bits((rest + bias) << shift, "float32")
    value = let("e", p * one * two)
    inf = tirx.const(float("inf"), "float32")
    value = let("e", tirx.Select(x > _f(HIGHEST), inf, value))
    return let("e", tirx.Select(x < _f(LOWEST), _f(0.0), value))


def _clip(let: _Chain, x: Any, limit: float) -> Any:
    c = let("c", tirx.Select(x < _f(-limit), _f(-limit), x))
    return let("c", tirx.Select(c > _f(limit), _f(limit), c))


def tanh(let: _Chain, x: Any) -> Any:
    """The hyperbolic tangent, absolute error below 1e-6."""
    c = _clip(let, let("x", x), TANH_LIMIT)
    d = let("d", c * c)
    return c * _polynomial(let, d, TANH_P) / _polynomial(let, d, TANH_Q)


def erf(let: _Chain, x: Any) -> Any:
    """The error function, absolute error below 1e-6."""
    c = _clip(let, let("x", x * _f(2**0.5)), ERF_LIMIT)
    t = let("t", fma(c, c * _f(2 / ERF_LIMIT**2), _f(-1.0)))
    return c * _polynomial(let, t, ERF)


def sigmoid(let: _Chain, x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return _f(1.0) / (_f(1.0) + exp(let, _f(0.0) - x))


def _power(let: _Chain, x: Any, exponent: Any) -> Any | None:
    """Small constant powers; None otherwise."""
    if not isinstance(exponent, tirx.FloatImm | tirx.IntImm):
        return None
    x = let("x", x)
    match float(exponent.value):
        case 2.0:
            return x * x
        case 3.0:
            return x * x * x
        case 0.5:
            return _call("tirx.sqrt", x)
        case -0.5:
            return _f(1.0) / _call("tirx.sqrt", x)
        case 1.0:
            return x
        case -1.0:
            return _f(1.0) / x
        case _:
            return None


def expand(call: Any, args: Sequence[Any]) -> Any | None:
    """What to compute for a call with these arguments; None: leave the call."""
    if str(call.ty.dtype) != "float32":
        return None
    let = _Chain()
    match call.op.name:
        case "tirx.exp":
            return let.close(exp(let, args[0]))
        case "tirx.tanh":
            return let.close(tanh(let, args[0]))
        case "tirx.erf":
            return let.close(erf(let, args[0]))
        case "tirx.sigmoid":
            return let.close(sigmoid(let, args[0]))
        case "tirx.rsqrt":
            return _f(1.0) / _call("tirx.sqrt", args[0])
        case "tirx.pow":
            value = _power(let, args[0], args[1])
            return None if value is None else let.close(value)
        case _:
            return None
