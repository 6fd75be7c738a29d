"""Text of TVMScript functions: lines, loops, vector values and the float epilogues.

Kernels are written as text because their shape (how many registers, which tails) is decided in
Python. Values that are used twice are bound by `let` (``v: T.let = ...``) and so stay in registers;
scratch buffers in an epilogue may be kept in memory.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

from t3c.core.errors import LoweringError
from t3c.core.ops import EPILOGUE_STEPS

LANES = 16
"""Float32 or int32 values in one emitted vector; LLVM splits it where registers are narrower."""

ROUND = 12582912.0
"""1.5 * 2**23: added to |v| < 2**22, it leaves rint(v) (ties to even) in the low mantissa bits."""
ROUND_BITS = 0x4B400000
"""The bits of `ROUND`: int32(bits of v + ROUND) - ROUND_BITS is rint(v)."""

# erf(x / sqrt 2) ~ x * P(2 (x/5)**2 - 1) for |x| <= 5, the least largest error (7.9e-7 in float32),
# pinned to 1 at x = 5. Source: linear program on 1200 Chebyshev nodes, tests check the error.
ERF_LIMIT = 5.0
ERF = (
    0.2827276289463043,
    -0.1405913382768631,
    0.10303706675767899,
    -0.08091381937265396,
    0.06294503062963486,
    -0.04634895175695419,
    0.03247793763875961,
    -0.02282935567200184,
    0.013590756803750992,
    -0.004796422086656094,
    0.0026290861424058676,
    -0.003463544650003314,
    0.001535926479846239,
)
# exp(r) ~ 1 + r + r**2 P(r) for |r| <= ln(2)/2, relative error 7.9e-8. Source: as above.
EXP = (0.49999120831489563, 0.16666850447654724, 0.04190133884549141, 0.008336318656802177)
# tanh(x) ~ x P(x**2) / Q(x**2) for |x| <= 7.905. Source: Eigen's ptanh_float.
TANH_LIMIT = 7.90531110763549805
TANH_P = (
    4.89352455891786e-03,
    6.37261928875436e-04,
    1.48572235717979e-05,
    5.12229709037114e-08,
    -8.60467152213735e-11,
    2.00018790482477e-13,
    -2.76076847742355e-16,
)
TANH_Q = (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)


def ceil_div(a: int, b: int) -> int:
    """The least integer >= a / b."""
    return -(-a // b)


def f32(value: float) -> str:
    """A vector of one float32 constant."""
    return f"T.broadcast(T.float32({value!r}), {LANES})"


def i32(value: int) -> str:
    """A vector of one int32 constant."""
    return f"T.broadcast(T.int32({value}), {LANES})"


def splat(scalar: str) -> str:
    """A vector of one scalar expression."""
    return f"T.broadcast({scalar}, {LANES})"


def lanes(start: str | int, count: int = LANES) -> str:
    """The indices start, start + 1, ... of one vector access."""
    return f"T.ramp({start}, 1, {count})" if count > 1 else str(start)


def bits(vector: str) -> str:
    """The bits of a float32 vector as int32."""
    return f'T.reinterpret({vector}, dtype="int32x{LANES}")'


def buffer(name: str, shape: Sequence[int], dtype: str) -> str:
    """One parameter of a function."""
    dims = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
    return f'{name}: T.Buffer(({dims}), "{dtype}")'


def epilogue_steps(epilogue: str) -> tuple[str, ...]:
    """The steps of an epilogue ("" has none).

    Raises:
        LoweringError: If a step is unknown, or "add" is there twice.
    """
    steps = tuple(filter(None, epilogue.split(",")))
    for step in steps:
        if step not in EPILOGUE_STEPS:
            allowed = ", ".join(EPILOGUE_STEPS)
            raise LoweringError(
                f"epilogue {epilogue!r}: unknown step {step!r}; allowed are {allowed}, "
                "joined by commas"
            )
    if steps.count("add") > 1:
        raise LoweringError(
            f"epilogue {epilogue!r} adds {steps.count('add')} residuals; a kernel takes one: "
            "add the others outside"
        )
    return steps


def kernel_name(*parts: str | int) -> str:
    """A function name out of words and numbers."""
    text = "_".join(str(part) for part in parts if part != "")
    return text.replace(",", "_").replace("-", "_")


@final
class Emitter:
    """Collects the body of one function."""

    def __init__(self) -> None:
        """Start empty."""
        self._lines: list[str] = []
        self._depth = 1
        self._names = 0

    def __call__(self, line: str) -> None:
        """Add one line at the current depth."""
        self._lines.append("    " * self._depth + line)

    @contextmanager
    def block(self, header: str) -> Generator[None]:
        """Indent what follows under `header`."""
        self(header)
        self._depth += 1
        yield
        self._depth -= 1

    @contextmanager
    def maybe(self, condition: str) -> Generator[None]:
        """An ``if`` around what follows; nothing where the condition is ""."""
        if not condition:
            yield
            return
        with self.block(f"if {condition}:"):
            yield

    @contextmanager
    def loop(self, hint: str, count: int) -> Generator[str]:
        """A serial loop; gives its variable, or "0" without a loop where count is 1."""
        if count == 1:
            yield "0"
            return
        var = self.fresh(hint)
        with self.block(f"for {var} in range({count}):"):
            yield var

    @contextmanager
    def parallel(self, hint: str, count: int, threads: bool) -> Generator[str]:
        """A loop over independent tasks, spread over threads if asked for and count > 1."""
        if not threads or count == 1:
            with self.loop(hint, count) as var:
                yield var
            return
        var = self.fresh(hint)
        with self.block(f"for {var} in T.parallel({count}):"):
            yield var

    def fresh(self, hint: str) -> str:
        """A name that was not given before."""
        self._names += 1
        return f"{hint}{self._names}"

    def let(self, hint: str, value: str) -> str:
        """Bind a value and give its name."""
        name = self.fresh(hint)
        self(f"{name}: T.let = {value}")
        return name

    def alloc(self, hint: str, shape: Sequence[int], dtype: str, scope: str = "global") -> str:
        """Allocate scratch in the current block and give its name."""
        name = self.fresh(hint)
        dims = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        self(f'{name} = T.alloc_buffer(({dims}), "{dtype}", scope="{scope}")')
        return name

    def pin(self, name: str, shape: Sequence[int], dtype: str) -> None:
        """Touch both ends of a scratch buffer that instructions reach by address.

        TVM shrinks a buffer to the elements that it sees accessed, and sees one for an address.
        """
        for ends in ([0] * len(shape), [size - 1 for size in shape]):
            self(f"{name}[{', '.join(map(str, ends))}] = T.{dtype}(0)")

    def intrinsic(self, name: str, *args: str) -> None:
        """Call an LLVM intrinsic that returns nothing."""
        self(f'T.evaluate(T.call_llvm_intrin("void", "{name}", {", ".join(args)}))')

    def prefetch(self, element: str, write: bool, locality: int) -> None:
        """Fetch the cache line of a buffer element; locality 3 keeps it nearest."""
        address = f"T.address_of({element})"
        self.intrinsic(
            "llvm.prefetch",
            address,
            f"T.int32({int(write)})",
            f"T.int32({locality})",
            "T.int32(1)",
        )

    def function(self, name: str, params: Sequence[str]) -> str:
        """The source of the whole function."""
        head = (
            f"@T.prim_func(s_tir=True)\ndef {name}(\n    "
            + ",\n    ".join(params)
            + ",\n):\n"
            + f'    T.func_attr({{"global_symbol": "{name}", "tirx.noalias": True, '
            + '"tirx.is_scheduled": True})\n'
        )
        return head + "\n".join(self._lines) + "\n"


def polynomial(e: Emitter, x: str, coefficients: Sequence[float]) -> str:
    """Horner's scheme, constant first; gives the name of the value."""
    value = f32(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = e.let("h", f"{value} * {x} + {f32(c)}")
    return value


def exp(e: Emitter, x: str) -> str:
    """The exponential with relative error below 1e-6 for -87 <= x <= 88, clamped outside."""
    c = e.let("x", f"T.min(T.max({x}, {f32(-87.0)}), {f32(88.0)})")
    z = e.let("z", f"{c} * {f32(1.4426950408889634)} + {f32(ROUND)}")
    n = e.let("n", f"{bits(z)} - {i32(ROUND_BITS)}")
    nf = e.let("n", f'T.cast({n}, "float32x{LANES}")')
    hi = e.let("r", f"{c} - {nf} * {f32(0.693359375)}")
    r = e.let("r", f"{hi} - {nf} * {f32(-2.12194440e-4)}")
    p = polynomial(e, r, (1.0, 1.0, *EXP))
    power = f'T.reinterpret(({n} + {i32(127)}) << {i32(23)}, dtype="float32x{LANES}")'
    return e.let("e", f"{p} * {power}")


def logistic(e: Emitter, x: str, top: str) -> str:
    """Top / (1 + exp(-x))."""
    down = exp(e, e.let("x", f"{f32(0.0)} - {x}"))
    return e.let("s", f"{top} / ({f32(1.0)} + {down})")


def tanh(e: Emitter, x: str) -> str:
    """The hyperbolic tangent, absolute error below 1e-6."""
    c = e.let("x", f"T.min(T.max({x}, {f32(-TANH_LIMIT)}), {f32(TANH_LIMIT)})")
    d = e.let("d", f"{c} * {c}")
    p = polynomial(e, d, TANH_P)
    q = polynomial(e, d, TANH_Q)
    return e.let("t", f"{c} * {p} / {q}")


def gelu(e: Emitter, x: str) -> str:
    """X * (1 + erf(x / sqrt 2)) / 2, the erf with absolute error below 2e-6."""
    c = e.let("x", f"T.min(T.max({x}, {f32(-ERF_LIMIT)}), {f32(ERF_LIMIT)})")
    t = e.let("d", f"{c} * {c} * {f32(2 / ERF_LIMIT**2)} - {f32(1.0)}")
    p = polynomial(e, t, ERF)
    erf = e.let("p", f"{c} * {p}")
    half = e.let("h", f"{x} * {f32(0.5)}")
    return e.let("g", f"{half} + {half} * {erf}")


def activate(
    e: Emitter,
    steps: Sequence[str],
    value: str,
    residual: str | None = None,
    look_up: Mapping[str, Callable[[Emitter, str], str]] | None = None,
) -> str:
    """Apply epilogue steps to the named vector `value`.

    Args:
        e: Emitter.
        steps: Of `EPILOGUE_STEPS`.
        value: Name of a vector.
        residual: Vector expression; None: no step adds one.
        look_up: Step -> what emits it instead of the portable code; None: nothing does.
    """
    for step in steps:
        if look_up and step in look_up:
            value = look_up[step](e, value)
            continue
        match step:
            case "relu":
                value = e.let("v", f"T.max({value}, {f32(0.0)})")
            case "gelu":
                value = gelu(e, value)
            case "gelu-tanh":
                cube = e.let("c", f"{value} * {value} * {f32(0.044715)} + {f32(1.0)}")
                twice = e.let("c", f"{value} * {cube} * {f32(1.5957691216057308)}")
                value = logistic(e, twice, value)
            case "silu":
                value = logistic(e, value, value)
            case "tanh":
                value = tanh(e, value)
            case "sigmoid":
                value = logistic(e, value, f32(1.0))
            case "add":
                value = e.let("v", f"{value} + {residual}")
            case _:
                raise LoweringError(
                    f"no vector code for epilogue step {step!r}; allowed are "
                    + ", ".join(EPILOGUE_STEPS)
                )
    return value


def pieces(count: int) -> Iterator[tuple[int, int]]:
    """(start, width) of the powers of two that make up count < LANES, widest first."""
    start = 0
    width = LANES
    while start < count:
        if start + width <= count:
            yield start, width
            start += width
        else:
            width //= 2


def load(e: Emitter, rest: str, array: str, row: str, col: str, valid: int) -> str:
    """A vector of array[row, col:col + valid]; a short one goes through scratch `rest`."""
    if valid == LANES:
        return e.let("l", f"{array}[{row}, {lanes(col)}]")
    for at, width in pieces(valid):
        start = col if at == 0 else f"{col} + {at}"
        e(f"{rest}[{lanes(at, width)}] = {array}[{row}, {lanes(start, width)}]")
    return e.let("l", f"{rest}[{lanes(0)}]")


def store(e: Emitter, rest: str, array: str, row: str, col: str, value: str, valid: int) -> None:
    """array[row, col:col + valid] = value; a short one goes through scratch `rest`."""
    if valid == LANES:
        e(f"{array}[{row}, {lanes(col)}] = {value}")
        return
    e(f"{rest}[{lanes(0)}] = {value}")
    for at, width in pieces(valid):
        start = col if at == 0 else f"{col} + {at}"
        e(f"{array}[{row}, {lanes(start, width)}] = {rest}[{lanes(at, width)}]")
