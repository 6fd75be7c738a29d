"""Int8 codes of images, channels last: where they lie, and the kernels that need no product.

The codes of a pixel are neighbours, so that vectors run over channels and a convolution reads any
pixel at any stride without another layout:

    codes[image * plane + ((row + halo) * pitch + column + halo) * depth + channel]

with pitch = width + halo: the zeros right of one row are those left of the next. Codes are unsigned
bytes; those of a signed image are stored plus 128, of 7 bits plus 64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from t3c.codegen.kernels.emit import (
    LANES,
    ROUND,
    ROUND_BITS,
    Emitter,
    bits,
    buffer,
    ceil_div,
    f32,
    i32,
    kernel_name,
    lanes,
    load,
    pieces,
    splat,
)
from t3c.codegen.kernels.family import Image, Kernel

SLACK = 16
"""Pixels after the last image that may be read and are never used."""
PARALLEL_ELEMENTS = 1 << 17
"""Elements of a pass over an image worth several threads: about 50 us of one."""
RANGE = 16
"""Float32 values of a range."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Geometry of the codes of one image tensor."""

    image: Image

    @property
    def depth(self) -> int:
        """Bytes from one pixel to the next: whole vectors, or as they are where few."""
        channels = self.image.channels
        return channels if channels < LANES else ceil_div(channels, LANES) * LANES

    @property
    def pitch(self) -> int:
        """Pixels from one row to the next."""
        return self.image.size[1] + self.image.halo

    @property
    def origin(self) -> int:
        """Bytes from the beginning of an image to its first pixel."""
        return (self.image.halo * self.pitch + self.image.halo) * self.depth

    @property
    def row(self) -> int:
        """Bytes from one row to the next."""
        return self.pitch * self.depth

    @property
    def plane(self) -> int:
        """Bytes from one image to the next."""
        halo = self.image.halo
        pixels = (self.image.size[0] + 2 * halo) * self.pitch + halo
        return ceil_div(pixels * self.depth, 64) * 64

    @property
    def bytes(self) -> int:
        """Bytes of all images."""
        return self.image.batch * self.plane + max(64, SLACK * self.depth)

    @property
    def zero(self) -> int:
        """The stored byte of a zero."""
        return 1 << (self.image.bits - 1) if self.image.signed else 0

    def parameter(self, name: str) -> str:
        """The codes as a parameter of a function."""
        return buffer(name, (self.bytes,), "uint8")

    def out(self) -> tuple[tuple[int, ...], str]:
        """(shape, dtype) of the codes."""
        return (self.bytes,), "uint8"

    def tag(self) -> str:
        """The sizes as part of a function name."""
        i = self.image
        return f"{i.batch}x{i.channels}x{i.size[0]}x{i.size[1]}h{i.halo}{i.letters}"

    def fill_halo(self, e: Emitter, codes: str) -> None:
        """Write the zeros around every image."""
        halo, (height, width) = self.image.halo, self.image.size
        if not halo:
            return
        value = f"T.uint8({self.zero})"
        with e.loop("b", self.image.batch) as b:
            base = e.let("base", f"{b} * {self.plane}")
            with e.loop("i", self.origin) as i:
                e(f"{codes}[{base} + {i}] = {value}")
            with e.loop("r", height) as r:
                right = e.let("right", f"{base} + {self.origin + width * self.depth}")
                with e.loop("i", halo * self.depth) as i:
                    e(f"{codes}[{right} + {r} * {self.row} + {i}] = {value}")
            end = self.origin + height * self.row
            with e.loop("i", self.plane - end) as i:
                e(f"{codes}[{base} + {end} + {i}] = {value}")


def store_bytes(
    e: Emitter, target: str, at: str, value: str, count: int, *, first: int = 0
) -> None:
    """target[at : at + count] = bytes first, first + 1, ... of the vector `value`."""
    done = 0
    while done < count:
        width = 1 << ((count - done).bit_length() - 1)
        part = list(range(first + done, first + done + width))
        where = f"{at} + {done}" if done else at
        e(f"{target}[{lanes(where, width)}] = T.Shuffle([{value}], {part})")
        done += width


@dataclass(frozen=True, slots=True)
class Encoder:
    """Writer of the codes of x [batch, channels, h, w] float32, halo included.

    Attributes:
        e: Where to write.
        grid: Geometry.
        target: Name of the codes.
    """

    e: Emitter
    grid: Grid
    target: str

    def write(self, inverse: Callable[[str], str], threads: bool) -> None:
        """All rows; `inverse` gives 1 / scale of an image."""
        e, grid, image = self.e, self.grid, self.grid.image
        height, width = image.size
        grid.fill_halo(e, self.target)
        with e.parallel("t", image.batch * height, threads) as t:
            b, r = e.let("b", f"{t} // {height}"), e.let("r", f"{t} % {height}")
            scale = e.let("inv", splat(inverse(b)))
            to = e.let("to", f"{b} * {grid.plane} + {grid.origin} + {r} * {grid.row}")
            groups, few = divmod(image.channels, LANES)
            for first, count, live in ((0, groups, LANES), (groups, 1, few)):
                if not (count and live):
                    continue
                with e.loop("g", count) as g:
                    channel = e.let("channel", f"({first} + {g}) * {LANES}")
                    whole, rest = divmod(width, LANES)
                    line = _Line(b, r, channel, live, to, scale)
                    if whole:
                        with e.loop("v", whole) as v:
                            self._block(line, f"{v} * {LANES}", LANES)
                    if rest and whole:  # once more the last sixteen
                        self._block(line, str(width - LANES), LANES)
                    elif rest:
                        self._block(line, "0", rest)

    def _block(self, line: "_Line", column: str, count: int) -> None:
        """Up to sixteen channels of `count` neighbouring pixels."""
        e, depth = self.e, self.grid.depth
        words = [self._word(line, q, column, count) for q in range(ceil_div(line.live, 4))]
        to = e.let("at", f"{line.to} + ({column}) * {depth} + {line.channel}")
        if len(words) == 1 and depth == line.live:  # few channels: pixels are dense
            four = e.let("f", f'T.reinterpret({words[0]}, dtype="uint8x{4 * LANES}")')
            dense = [4 * p + c for p in range(count) for c in range(depth)]
            value = e.let("d", f"T.Shuffle([{four}], {dense + dense[:1] * (64 - len(dense))})")
            store_bytes(e, self.target, to, value, len(dense))
            return
        words += words[:1] * (4 - len(words))
        for start in range(0, count, 4):
            order = [LANES * q + start + p for p in range(4) for q in range(4)]
            mixed = f"T.Shuffle([{', '.join(words)}], {order})"
            value = e.let("m", f'T.reinterpret({mixed}, dtype="uint8x64")')
            for p in range(min(4, count - start)):
                at = f"{to} + {(start + p) * depth}"
                store_bytes(e, self.target, at, value, line.live, first=16 * p)

    def _word(self, line: "_Line", quad: int, column: str, count: int) -> str:
        """Four channels of sixteen pixels as words."""
        e, zero = self.e, self.grid.zero
        low, high = (float(end) for end in self.grid.image.ends)
        spare = e.alloc("spare", (LANES,), "float32") if count < LANES else ""
        word = ""
        for u in range(min(4, line.live - 4 * quad)):
            channel = f"{line.channel} + {4 * quad + u}"
            x = load(e, spare, "x", f"{line.b}, {channel}, {line.row}", column, count)
            value = e.let("v", f"T.max(T.min({x} * {line.scale}, {f32(high)}), {f32(low)})")
            rounded = f"{value} + {f32(ROUND)}"
            code = e.let("c", f"{bits(rounded)} - {i32(ROUND_BITS - zero)}")
            part = f"T.shift_left({code}, {i32(8 * u)})" if u else code
            word = f"T.bitwise_or({word}, {part})" if u else part
        return e.let("word", word)


@dataclass(frozen=True, slots=True)
class _Line:
    """Channels of one row: texts of their place, and how many of sixteen exist."""

    b: str
    row: str
    channel: str
    live: int
    to: str
    scale: str


def encode(image: Image) -> Kernel:
    """(x f32 NCHW, range) -> codes."""
    grid, e = Grid(image), Emitter()
    size = image.batch * image.channels * image.size[0] * image.size[1]
    Encoder(e, grid, "codes").write(lambda _: "range[1]", size >= PARALLEL_ELEMENTS)
    params = (
        buffer("x", (image.batch, image.channels, *image.size), "float32"),
        buffer("range", (RANGE,), "float32"),
        grid.parameter("codes"),
    )
    name = f"image_encode_{grid.tag()}"
    return Kernel(name, e.function(name, params), (grid.out(),))


def decode(image: Image) -> Kernel:
    """(codes, range) -> x f32 NCHW."""
    grid, e = Grid(image), Emitter()
    height, width = image.size
    with e.parallel("t", image.batch * height, False) as t:
        b, r = e.let("b", f"{t} // {height}"), e.let("r", f"{t} % {height}")
        at = e.let("at", f"{b} * {grid.plane} + {grid.origin} + {r} * {grid.row}")
        with e.loop("c", image.channels) as c, e.loop("v", width) as v:
            code = f'T.cast(codes[{at} + {v} * {grid.depth} + {c}], "int32") - {grid.zero}'
            e(f'x[{b}, {c}, {r}, {v}] = T.cast({code}, "float32") * range[0]')
    shape = (image.batch, image.channels, *image.size)
    params = (
        grid.parameter("codes"),
        buffer("range", (RANGE,), "float32"),
        buffer("x", shape, "float32"),
    )
    name = f"image_decode_{grid.tag()}"
    return Kernel(name, e.function(name, params), ((shape, "float32"),))


def max_pool(
    source: Image,
    target: Image,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Kernel:
    """(codes) -> codes of the target: the largest under each window; padding never counts.

    Raises:
        ValueError: The images do not fit each other.
    """
    sizes = tuple((source.size[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1))
    same = ("batch", "channels", "signed", "bits")
    if target.size != sizes or any(getattr(source, n) != getattr(target, n) for n in same):
        raise ValueError(
            f"max_pool of {source} gives size {sizes} and keeps {', '.join(same)}, got {target}"
        )
    if any(2 * padding[i] > kernel[i] for i in (0, 1)):
        raise ValueError(f"padding {padding} is above half of the kernel {kernel}")
    a, z, e = Grid(source), Grid(target), Emitter()
    height, width = target.size
    z.fill_halo(e, "y")
    work = target.batch * z.depth * height * width * kernel[0] * kernel[1]
    with e.parallel("t", target.batch * height, work >= 16 * PARALLEL_ELEMENTS) as t:
        b, r = e.let("b", f"{t} // {height}"), e.let("r", f"{t} % {height}")
        top = e.let("top", f"{r} * {stride[0]} - {padding[0]}")
        first = e.let("first", f"T.max({top}, 0)")
        last = e.let("last", f"T.min({top} + {kernel[0]}, {source.size[0]})")
        with e.loop("v", width) as v:
            left = e.let("left", f"{v} * {stride[1]} - {padding[1]}")
            begin = e.let("begin", f"T.max({left}, 0)")
            end = e.let("end", f"T.min({left} + {kernel[1]}, {source.size[1]})")
            to = e.let("to", f"{b} * {z.plane} + {z.origin} + {r} * {z.row} + {v} * {z.depth}")
            for at, count, lane in _vectors(z.depth):
                with e.loop("g", count) as g:
                    top_of = e.alloc("peak", (lane,), "uint8")
                    channel = f"{at} + {g} * {lane}"
                    here = lanes("0", lane)
                    e(f"{top_of}[{here}] = {_bytes(0, lane)}")
                    with (
                        e.block(f"for i in range({last} - {first}):"),
                        e.block(f"for j in range({end} - {begin}):"),
                    ):
                        pixel = f"({first} + i) * {a.row} + ({begin} + j) * {a.depth}"
                        line = f"{b} * {a.plane} + {a.origin} + {pixel} + {channel}"
                        code = f"codes[{lanes(line, lane)}]"
                        e(f"{top_of}[{here}] = T.max({top_of}[{here}], {code})")
                    e(f"y[{lanes(f'{to} + {channel}', lane)}] = {top_of}[{here}]")
    params = (a.parameter("codes"), z.parameter("y"))
    parts = ("x".join(map(str, pair)) for pair in (kernel, stride, padding))
    name = kernel_name("image_max_pool", a.tag(), f"h{target.halo}", *parts)
    return Kernel(name, e.function(name, params), (z.out(),))


def _bytes(value: int, lane: int) -> str:
    return f"T.broadcast(T.uint8({value}), {lane})" if lane > 1 else f"T.uint8({value})"


def _vectors(depth: int) -> Iterator[tuple[int, int, int]]:
    """(first byte, count, bytes) of the vectors that make up a pixel."""
    if depth % LANES:
        yield from ((at, 1, size) for at, size in pieces(depth))
        return
    whole, rest = divmod(depth, 64)
    if whole:
        yield 0, whole, 64
    if rest:
        yield whole * 64, rest // LANES, LANES


def average(image: Image) -> Kernel:
    """(codes, range) -> means over the pixels, f32 [batch, channels, 1, 1]."""
    grid, e = Grid(image), Emitter()
    height, width = image.size
    pixels = height * width
    whole, rest = divmod(image.channels, LANES)
    with e.loop("b", image.batch) as b:
        scale = e.let("scale", f"range[0] * T.float32({1 / pixels!r})")
        for first, count, lane in ((0, whole, LANES), (whole, rest, 1)):
            if not count:
                continue
            with e.loop("g", count) as g:
                total = e.alloc("total", (LANES,), "int32")
                here = lanes(0, lane)
                channel = e.let("channel", f"{first * LANES} + {g} * {lane}")
                wide = f"x{lane}" if lane > 1 else ""
                start = f"T.int32({-grid.zero * pixels})"
                e(f"{total}[{here}] = {splat(start) if lane > 1 else start}")
                with e.loop("r", height) as r, e.loop("v", width) as v:
                    at = f"{b} * {grid.plane} + {grid.origin} + {r} * {grid.row}"
                    at += f" + {v} * {grid.depth} + {channel}"
                    code = f'T.cast(codes[{lanes(at, lane)}], "int32{wide}")'
                    e(f"{total}[{here}] = {total}[{here}] + {code}")
                factor = splat(scale) if lane > 1 else scale
                value = f'T.cast({total}[{here}], "float32{wide}") * {factor}'
                e(f"y[{b}, 0, 0, {lanes(channel, lane)}] = {value}")
    params = (
        grid.parameter("codes"),
        buffer("range", (RANGE,), "float32"),
        buffer("y", (image.batch, image.channels, 1, 1), "float32"),
    )
    shape = (image.batch, image.channels, 1, 1)
    name = f"image_average_{grid.tag()}"
    return Kernel(name, e.function(name, params), ((shape, "float32"),))
