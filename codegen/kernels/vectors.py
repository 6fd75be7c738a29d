"""Text of portable float32 vector code: what every float kernel generator writes with.

Only TIR vector operations that LLVM lowers on any CPU: ramps, broadcasts, shuffles, ``llvm.fma``.
A scratch buffer of less than 1024 bytes with the default scope becomes a stack slot, which LLVM
keeps in registers; larger ones, and those of scope "local", live in memory.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from t3c.codegen.kernels.emit import Emitter

EXP2_POLYNOMIAL = (
    1.0000001192092896,
    0.6931469440460205,
    0.24022120237350464,
    0.05550713092088699,
    0.009675540961325169,
    0.001327647129073739,
)
"""2**f on [-0.5, 0.5], least largest relative error 7.5e-8. Source: Lawson's iteration on 4001
Chebyshev nodes, rounded to float32; the tests measure the error of exp."""
LOG2_E = 1.4426950408889634
ROUNDER = 12582912.0
"""1.5 * 2**23: adding it rounds a float32 to the nearest integer, held in the low mantissa bits."""
SMALLEST = -87.33654
"""Where exp(x) is the smallest normal float32."""
INFINITY = 'T.float32("inf")'
MINUS_INFINITY = 'T.float32("-inf")'


@contextmanager
def scope(e: Emitter) -> Generator[None]:
    """Scratch allocated inside belongs to one iteration of the parallel loop around."""
    with e.block(f'with T.sblock("{e.fresh("scope")}"):'):
        e("T.reads()")
        e("T.writes()")
        yield


@dataclass(frozen=True, slots=True)
class Vectors:
    """Float32 vector expressions of one width.

    Attributes:
        lanes: Float32 lanes of a vector.
    """

    lanes: int

    def splat(self, value: str) -> str:
        """The scalar in every lane."""
        return f"T.broadcast({value}, {self.lanes})"

    def const(self, value: float) -> str:
        """The constant in every lane."""
        return self.splat(f"T.float32({value!r})")

    def at(self, start: str | int) -> str:
        """Index of `lanes` consecutive elements."""
        return f"T.ramp({start}, 1, {self.lanes})"

    def fma(self, a: str, b: str, c: str) -> str:
        """A * b + c, rounded once."""
        return f'T.call_llvm_pure_intrin("float32x{self.lanes}", "llvm.fma", {a}, {b}, {c})'

    def fold(self, e: Emitter, value: str, combine: Callable[[str, str], str]) -> str:
        """One scalar from all lanes, halving; `value` is a name."""
        width = self.lanes
        while width > 1:
            width //= 2
            low = e.let("low", f"T.Shuffle([{value}], {list(range(width))})")
            high = e.let("high", f"T.Shuffle([{value}], {list(range(width, 2 * width))})")
            value = e.let("fold", combine(low, high))
        return value

    def total(self, e: Emitter, value: str) -> str:
        """The sum of all lanes."""
        return self.fold(e, value, lambda a, b: f"{a} + {b}")

    def largest(self, e: Emitter, value: str) -> str:
        """The maximum of all lanes."""
        return self.fold(e, value, lambda a, b: f"T.max({a}, {b})")

    def exp(self, e: Emitter, x: str) -> str:
        """The exponential for x <= 88, relative error 5e-7 at |x| <= 20 and 1.4e-6 at -87.

        Below the normal range it gives the smallest normal; NaN stays NaN.
        """
        n = self.lanes
        low = self.const(SMALLEST)
        x = e.let("x", f"T.Select({x} < {low}, {low}, {x})")
        shifted = e.let("shifted", self.fma(x, self.const(LOG2_E), self.const(ROUNDER)))
        whole = e.let("minus_whole", f"{self.const(ROUNDER)} - {shifted}")
        part = e.let("part", self.fma(x, self.const(LOG2_E), whole))
        value = self.polynomial(e, part, EXP2_POLYNOMIAL)
        bits = f'T.reinterpret("int32x{n}", {value})'
        step = f'T.shift_left(T.reinterpret("int32x{n}", {shifted}), T.broadcast(23, {n}))'
        return e.let("exp", f'T.reinterpret("float32x{n}", {bits} + {step})')

    def polynomial(self, e: Emitter, x: str, coefficients: Sequence[float]) -> str:
        """Horner's rule; `coefficients` from the constant term up."""
        value = self.const(coefficients[-1])
        for c in coefficients[-2::-1]:
            value = e.let("p", self.fma(value, x, self.const(c)))
        return value

    def transpose(self, e: Emitter, rows: Sequence[str]) -> list[str]:
        """A square of `lanes` vectors, transposed by log2(lanes) rounds of interleaving."""
        n = self.lanes
        low = [i // 2 + n * (i % 2) for i in range(n)]
        high = [i + n // 2 for i in low]
        rows = list(rows)
        for _ in range(n.bit_length() - 1):
            half = n // 2
            rows = [
                e.let("t", f"T.Shuffle([{rows[i]}, {rows[i + half]}], {order})")
                for i in range(half)
                for order in (low, high)
            ]
        return rows


@dataclass(frozen=True, slots=True)
class Panels:
    """A run of equally wide register panels.

    Attributes:
        width: Vectors of one panel.
        count: Panels.
        first: Vectors before the first panel.
    """

    width: int
    count: int
    first: int


def panels(vectors: int, widest: int) -> list[Panels]:
    """Cover `vectors` with as few panels of at most `widest` as possible, widths within one."""
    count = -(-vectors // widest)
    width, wide = divmod(vectors, count)
    runs = []
    if wide:
        runs.append(Panels(width + 1, wide, 0))
    if count > wide:
        runs.append(Panels(width, count - wide, wide * (width + 1)))
    return runs


def tile(lanes: int) -> tuple[int, int]:
    """(rows, vectors) of a register tile that fits the registers of a CPU with this width.

    AVX-512 and NEON have 32 vector registers, AVX2 has 16.
    """
    return (6, 2) if lanes == 8 else (6, 4)


def fma_tile(
    e: Emitter,
    v: Vectors,
    rows: int,
    width: int,
    extent: str | int,
    left: Callable[[int, str], str],
    right: Callable[[int, str], str],
) -> list[list[str]]:
    """Multiply: tile[i][j] = sum over k of splat(left(i, k)) * right(j, k), in registers.

    Args:
        e: Where to write.
        v: Vector width.
        rows: Rows of the tile.
        width: Vectors of a row.
        extent: Number of k.
        left: Scalar expression of (row, k).
        right: Vector expression of (column vector, k).

    Returns:
        Expressions that read the finished tile.
    """
    held = [e.alloc("acc", (width * v.lanes,), "float32") for _ in range(rows)]
    cells = [[f"{held[i]}[{v.at(j * v.lanes)}]" for j in range(width)] for i in range(rows)]
    for row in cells:
        for cell in row:
            e(f"{cell} = {v.const(0.0)}")
    k = e.fresh("k")
    with e.block(f"for {k} in range({extent}):"):
        rights = [e.let("b", right(j, k)) for j in range(width)]
        for i in range(rows):
            a = e.let("a", v.splat(left(i, k)))
            for j in range(width):
                e(f"{cells[i][j]} = {v.fma(a, rights[j], cells[i][j])}")
    return cells
