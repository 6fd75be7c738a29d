"""Float32 kernels that slide a window over NCHW planes: grouped convolution and pooling.

Every task copies its planes to scratch, padded with the neutral element and split by the column's
residue modulo the stride; then every load of sixteen neighbouring outputs is contiguous. Plain
vector code for any CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

from t3c.codegen.kernels.emit import (
    LANES,
    Emitter,
    activate,
    buffer,
    ceil_div,
    epilogue_steps,
    f32,
    kernel_name,
    lanes,
    load,
    splat,
    store,
)
from t3c.codegen.kernels.family import ConvShape, Kernel

PARALLEL_ELEMENTS = 1 << 16
"""Output elements times taps worth several threads: about 50 us of one."""
MINUS_INFINITY = 'T.float32("-inf")'


def grouped_conv(
    shape: ConvShape, groups: int, epilogue: str = "", *, stored: int | None = None
) -> Kernel:
    """(x [b, in, h, w], weight [stored, in / groups, kh, kw], bias [stored], [residual]) -> y.

    All float32; `groups` == in == out is a depthwise convolution. The residual has y's shape and
    is an argument only if `epilogue` has the step "add".

    Args:
        shape: Sizes.
        groups: Groups of channels that see only each other.
        epilogue: Steps after the bias.
        stored: Output channels of weight and bias, of which the first are read; None: the shape's.

    Raises:
        ValueError: If the channels do not split into `groups`.
    """
    steps = epilogue_steps(epilogue)
    stored = shape.out_channels if stored is None else stored
    if groups < 1 or shape.in_channels % groups or shape.out_channels % groups:
        raise ValueError(
            f"{groups} groups do not divide {shape.in_channels} input and {shape.out_channels} "
            "output channels; use a common divisor"
        )
    inner, outer = shape.in_channels // groups, shape.out_channels // groups
    e, window = Emitter(), _Window(shape, shape.out_size)
    out = (shape.batch, shape.out_channels, *shape.out_size)
    work = shape.out_size[0] * shape.out_size[1] * shape.out_channels * inner * window.taps
    with e.parallel("t", shape.batch * groups, shape.batch * work >= PARALLEL_ELEMENTS) as t:
        b, group = e.let("b", f"{t} // {groups}"), e.let("g", f"{t} % {groups}")
        scratch = window.copy(e, b, group, inner, "T.float32(0)")
        spare = e.alloc("rest", (LANES,), "float32")
        with e.loop("o", outer) as o:
            channel = e.let("n", f"{group} * {outer} + {o}")

            def start() -> str:
                return splat(f"bias[{channel}]")

            def add(total: str, pixels: str, c: str, i: str, j: str) -> str:
                return f"{total} + {pixels} * {splat(f'weight[{channel}, {c}, {i}, {j}]')}"

            def finish(total: str, row: str, column: str, valid: int) -> str:
                residual = None
                if "add" in steps:
                    line = f"{b}, {channel}, {row}"
                    residual = load(e, spare, "residual", line, column, valid)
                return activate(e, steps, total, residual)

            window.slide(e, f"{b}, {channel}", scratch, inner, spare, start, add, finish)
    params = [
        buffer("x", (shape.batch, shape.in_channels, *shape.in_size), "float32"),
        buffer("weight", (stored, inner, *shape.kernel), "float32"),
        buffer("bias", (stored,), "float32"),
    ]
    if "add" in steps:
        params.append(buffer("residual", out, "float32"))
    params.append(buffer("y", out, "float32"))
    most = "" if stored == shape.out_channels else f"of{stored}"
    name = kernel_name("grouped_conv", groups, most, window.tag(), *steps)
    return Kernel(name, e.function(name, params), ((out, "float32"),))


def max_pool(shape: ConvShape, *, ceil_mode: bool = False) -> Kernel:
    """(x [b, c, h, w]) -> y: the largest value under each window; padding never counts.

    Args:
        shape: In and out channels are equal; dilation is allowed.
        ceil_mode: As in torch: windows may begin inside the image and end outside.
    """

    def add(total: str, pixels: str, c: str, i: str, j: str) -> str:
        return f"T.max({total}, {pixels})"

    return _pool("max_pool", shape, ceil_mode, MINUS_INFINITY, add, None)


def avg_pool(
    shape: ConvShape, *, ceil_mode: bool = False, count_include_pad: bool = True
) -> Kernel:
    """(x [b, c, h, w]) -> y: the mean under each window.

    Args:
        shape: In and out channels are equal; the dilation is 1.
        ceil_mode: As in torch: windows may begin inside the image and end outside.
        count_include_pad: Whether zeros of the padding count in the mean.
    """
    _check_pool(shape)
    if shape.dilation != (1, 1):
        raise ValueError(f"average pooling has no dilation, got {shape.dilation}; use (1, 1)")
    if shape.kernel == shape.in_size and shape.padding == (0, 0):
        return _mean(shape)

    def add(total: str, pixels: str, c: str, i: str, j: str) -> str:
        return f"{total} + {pixels}"

    return _pool("avg_pool", shape, ceil_mode, "T.float32(0)", add, count_include_pad)


def _check_pool(shape: ConvShape) -> None:
    if shape.in_channels != shape.out_channels:
        raise ValueError(
            f"pooling keeps channels, got {shape.in_channels} in and {shape.out_channels} out"
        )


def _mean(shape: ConvShape) -> Kernel:
    """The mean of every plane: sixteen partial sums."""
    e, size = Emitter(), shape.in_size[0] * shape.in_size[1]
    planes = shape.batch * shape.in_channels
    whole, rest = divmod(size, LANES)
    with e.parallel("t", planes, planes * size >= PARALLEL_ELEMENTS) as t:
        b, c = e.let("b", f"{t} // {shape.in_channels}"), e.let("c", f"{t} % {shape.in_channels}")
        total = e.alloc("total", (LANES,), "float32")
        e(f"{total}[{lanes(0)}] = {f32(0.0)}")
        if whole:
            with e.loop("v", whole) as v:
                value = f"x[{b}, {c}, 0, {lanes(f'{v} * {LANES}')}]"
                e(f"{total}[{lanes(0)}] = {total}[{lanes(0)}] + {value}")
        for i in range(rest):
            e(f"{total}[{i}] = {total}[{i}] + x[{b}, {c}, 0, {whole * LANES + i}]")
        width = LANES
        while width > 1:
            width //= 2
            low, high = f"{total}[{lanes(0, width)}]", f"{total}[{lanes(width, width)}]"
            e(f"{total}[{lanes(0, width)}] = {low} + {high}")
        e(f"y[{b}, {c}, 0, 0] = {total}[0] * T.float32({1 / size!r})")
    out = (shape.batch, shape.in_channels, 1, 1)
    params = (
        buffer("x", (shape.batch, shape.in_channels, *shape.in_size), "float32"),
        buffer("y", out, "float32"),
    )
    name = kernel_name("mean_pool", "x".join(map(str, (*out[:2], *shape.in_size))))
    return Kernel(name, e.function(name, params), ((out, "float32"),))


def _pool(
    kind: str,
    shape: ConvShape,
    ceil_mode: bool,
    neutral: str,
    add: Callable[[str, str, str, str, str], str],
    include_pad: bool | None,
) -> Kernel:
    """One pooling; `include_pad` None has no divisor."""
    _check_pool(shape)
    out_size = _pooled(shape, ceil_mode)
    e, window = Emitter(), _Window(shape, out_size)
    out = (shape.batch, shape.out_channels, *out_size)
    planes = shape.batch * shape.in_channels
    work = planes * out_size[0] * out_size[1] * window.taps
    with e.parallel("t", planes, work >= PARALLEL_ELEMENTS) as t:
        b, c = e.let("b", f"{t} // {shape.in_channels}"), e.let("c", f"{t} % {shape.in_channels}")
        scratch = window.copy(e, b, c, 1, neutral)
        spare = e.alloc("rest", (LANES,), "float32")

        def finish(total: str, row: str, column: str, valid: int) -> str:
            if include_pad is None:
                return total
            rows = window.covered(0, row, include_pad)
            columns = window.covered(1, lanes(column), include_pad)
            return e.let("v", f'{total} / T.cast({columns} * {splat(rows)}, "float32x16")')

        window.slide(e, f"{b}, {c}", scratch, 1, spare, lambda: splat(neutral), add, finish)
    params = (
        buffer("x", (shape.batch, shape.in_channels, *shape.in_size), "float32"),
        buffer("y", out, "float32"),
    )
    modes = ("ceil" if ceil_mode else "", "inside" if include_pad is False else "")
    name = kernel_name(kind, window.tag(), *modes)
    return Kernel(name, e.function(name, params), ((out, "float32"),))


def _pooled(shape: ConvShape, ceil_mode: bool) -> tuple[int, int]:
    """(height, width) of a pooling's output, by torch's rule."""
    if not ceil_mode:
        return shape.out_size
    found = []
    for i in (0, 1):
        size, pad, stride = shape.in_size[i], shape.padding[i], shape.stride[i]
        out = ceil_div(size + 2 * pad - shape.dilation[i] * (shape.kernel[i] - 1) - 1, stride) + 1
        found.append(out - 1 if (out - 1) * stride >= size + pad else out)
    return found[0], found[1]


@dataclass(frozen=True, slots=True)
class _Window:
    """A window sliding over padded planes.

    Attributes:
        shape: Sizes; its channels count for the input buffer only.
        out_size: (height, width) of the output.
    """

    shape: ConvShape
    out_size: tuple[int, int]

    @property
    def taps(self) -> int:
        """Elements of the window."""
        return self.shape.kernel[0] * self.shape.kernel[1]

    @property
    def rows(self) -> int:
        """Rows of a padded plane."""
        s = self.shape
        return (self.out_size[0] - 1) * s.stride[0] + (s.kernel[0] - 1) * s.dilation[0] + 1

    @property
    def pitch(self) -> int:
        """Elements of one row of one residue, with room for the last vector."""
        s = self.shape
        reach = (s.kernel[1] - 1) * s.dilation[1] // s.stride[1]
        return ceil_div(self.out_size[1], LANES) * LANES + reach + 1

    @property
    def plane(self) -> int:
        """Elements of one plane in scratch."""
        return self.shape.stride[1] * self.rows * self.pitch

    def tag(self) -> str:
        """Sizes as part of a function name."""
        s = self.shape
        size = f"{s.batch}x{s.in_channels}x{s.in_size[0]}x{s.in_size[1]}"
        pairs = (("k", s.kernel), ("s", s.stride), ("p", s.padding), ("d", s.dilation))
        return "_".join([f"o{s.out_channels}", size, *(f"{n}{a}x{b}" for n, (a, b) in pairs)])

    def copy(self, e: Emitter, b: str, group: str, planes: int, neutral: str) -> str:
        """Padded copies of the planes of one group; gives the name of the scratch."""
        s = self.shape
        scratch = e.alloc("scratch", (planes * self.plane,), "float32")
        with e.loop("i", planes * self.plane) as i:
            e(f"{scratch}[{i}] = {neutral}")
        top, left = s.padding
        bottom = max(0, min(s.in_size[0], self.rows - top))
        with e.loop("c", planes) as c, e.loop("r", bottom) as r:
            source = f"{group} * {planes} + {c}"
            for side in range(s.stride[1]):
                first = ceil_div(left - side, s.stride[1]) if left > side else 0
                end = min((s.in_size[1] - 1 + left - side) // s.stride[1] + 1, self.pitch)
                if end <= first:
                    continue
                with e.loop("v", end - first) as v:
                    at = f"(({c} * {s.stride[1]} + {side}) * {self.rows} + {r} + {top})"
                    column = f"({v} + {first}) * {s.stride[1]} + {side - left}"
                    e(
                        f"{scratch}[{at} * {self.pitch} + {v} + {first}] = "
                        f"x[{b}, {source}, {r}, {column}]"
                    )
        return scratch

    def slide(
        self,
        e: Emitter,
        channel: str,
        scratch: str,
        planes: int,
        spare: str,
        start: Callable[[], str],
        add: Callable[[str, str, str, str, str], str],
        finish: Callable[[str, str, str, int], str],
    ) -> None:
        """Compute one output plane.

        Args:
            e: Where to write.
            channel: Text of the first two indices of `y`.
            scratch: From `copy`.
            planes: Planes of the scratch.
            spare: Buffer of one vector.
            start: The first value, a vector.
            add: (total, pixels, plane, row, column of the tap) -> next total.
            finish: (total, output row, first output column, valid lanes) -> the value to store.
        """
        s = self.shape
        whole, rest = divmod(self.out_size[1], LANES)
        residues = [j * s.dilation[1] % s.stride[1] for j in range(s.kernel[1])]
        with e.loop("r", self.out_size[0]) as r:
            for count, valid in ((whole, LANES), (1, rest)):
                if not (count and valid):
                    continue
                with e.loop("v", count) as v:
                    base = f"{v} * {LANES}" if valid == LANES else str(whole * LANES)
                    column = e.let("w", base)
                    total = e.alloc("total", (LANES,), "float32")
                    e(f"{total}[{lanes(0)}] = {start()}")
                    with e.loop("c", planes) as c, e.loop("i", s.kernel[0]) as i:
                        line = f"{r} * {s.stride[0]} + {i} * {s.dilation[0]}"
                        for j, side in enumerate(residues):
                            at = f"(({c} * {s.stride[1]} + {side}) * {self.rows} + {line})"
                            shift = j * s.dilation[1] // s.stride[1]
                            index = lanes(f"{at} * {self.pitch} + {column} + {shift}")
                            pixels = f"{scratch}[{index}]"
                            value = add(f"{total}[{lanes(0)}]", pixels, c, i, str(j))
                            e(f"{total}[{lanes(0)}] = {value}")
                    value = e.let("v", f"{total}[{lanes(0)}]")
                    value = finish(value, r, column, valid)
                    store(e, spare, "y", f"{channel}, {r}", column, value, valid)

    def covered(self, axis: int, position: str, include_pad: bool) -> str:
        """Pixels under the window at an output position (a scalar, or a vector of columns)."""
        s = self.shape
        size, pad = s.in_size[axis], s.padding[axis]
        stride, kernel = s.stride[axis], s.kernel[axis]

        def value(number: int) -> str:
            return f"T.broadcast({number}, {LANES})" if axis else str(number)

        low = f"({position} * {value(stride)} - {value(pad)})"
        high = f"T.min({low} + {value(kernel)}, {value(size + pad)})"
        if not include_pad:
            low, high = f"T.max({low}, {value(0)})", f"T.min({high}, {value(size)})"
        return f"({high} - {low})"
