"""Activations looked up in registers: 16 cubics, picked lane by lane with one permutation each.

Both forms of GELU are relu(x) - r(|x|) with a smooth r that vanishes beyond 5. Four permutations
and three multiply-adds replace a polynomial of degree 12: the multiplier is what products need.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

from t3c.codegen.kernels.emit import LANES, Emitter, f32

TOP = 5.0
"""Where the remainder counts as zero: it is 1.5e-6 there."""
PERMUTE = '"float32x16", "llvm.x86.avx512.permvar.sf.512"'


def gelu_remainder(x: float) -> float:
    """X * (1 - erf(x / sqrt 2)) / 2."""
    return 0.5 * x * math.erfc(x / math.sqrt(2))


def gelu_tanh_remainder(x: float) -> float:
    """X / (1 + exp(2 sqrt(2 / pi) (x + 0.044715 x**3)))."""
    return x / (1 + math.exp(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def cubic(f: Callable[[float], float], start: float, width: float) -> list[float]:
    """Coefficients, constant first, of the cubic in (x - start) / width through Chebyshev nodes."""
    nodes = [0.5 - 0.5 * math.cos(math.pi * (i + 0.5) / 4) for i in range(4)]
    difference = [f(start + width * t) for t in nodes]
    for order in range(1, 4):
        for i in range(3, order - 1, -1):
            difference[i] = (difference[i] - difference[i - 1]) / (nodes[i] - nodes[i - order])
    found = [0.0] * 4
    for i in range(3, -1, -1):  # found = found * (t - nodes[i]) + difference[i]
        found = [(found[j - 1] if j else difference[i]) - nodes[i] * found[j] for j in range(4)]
    return found


def cubics(f: Callable[[float], float]) -> list[list[float]]:
    """One list for each power: its coefficients in the 16 equal parts of [0, TOP]."""
    width = TOP / LANES
    parts = [cubic(f, i * width, width) for i in range(LANES)]
    return [[part[power] for part in parts] for power in range(4)]


def constant(values: Sequence[float]) -> str:
    """A vector of different constants."""
    return f"T.Shuffle([{', '.join(f'T.float32({v!r})' for v in values)}], {list(range(LANES))})"


def _looked_up(f: Callable[[float], float], e: Emitter, x: str) -> str:
    """Relu(x) - f(|x|) of the named vector x, error below 1e-5; NaN stays."""
    at = f"T.min(T.abs({x}) * {f32(LANES / TOP)}, {f32(LANES * (1 - 2**-24))})"
    place = e.let("place", at)
    part = e.let("part", f'T.cast({place}, "int32x{LANES}")')
    rest = e.let("rest", f'{place} - T.cast({part}, "float32x{LANES}")')
    *powers, value = [
        e.let("c", f"T.call_llvm_pure_intrin({PERMUTE}, {constant(values)}, {part})")
        for values in cubics(f)
    ]
    for power in reversed(powers):
        value = e.let("p", f"{value} * {rest} + {power}")
    return e.let("g", f"T.max({f32(0.0)}, {x}) - {value}")


LOOK_UP: dict[str, Callable[[Emitter, str], str]] = {
    "gelu": partial(_looked_up, gelu_remainder),
    "gelu-tanh": partial(_looked_up, gelu_tanh_remainder),
}
"""Epilogue step -> what emits it on AVX-512."""
