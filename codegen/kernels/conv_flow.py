"""What convolutions on channels-last codes share: packed weights, output rows, the epilogue.

Vectors run over sixteen output channels. A row of output pixels is cut into short runs of
neighbours; a run by one or more vectors of channels is what registers hold. Taps outside the image
are left out where that is exact: zeros of an unsigned image add nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.kernels.code_vectors import codes_of, transpose
from t3c.codegen.kernels.emit import (
    LANES,
    Emitter,
    activate,
    buffer,
    ceil_div,
    f32,
    i32,
    lanes,
    pieces,
    splat,
)
from t3c.codegen.kernels.family import ConvShape, Flow, Image, Packed
from t3c.codegen.kernels.image_codes import RANGE, Grid, store_bytes
from t3c.core.codes import F32, I8, Matrix

RANK_STEP = 16
WORD = 4
"""Products that one instruction adds up in one lane."""


def merged(channels: int, shape: ConvShape) -> bool:
    """Whether the taps of one kernel row are one run of bytes: few channels, packed densely."""
    return channels < LANES and shape.dilation[1] == 1


@dataclass(frozen=True, slots=True)
class Depth:
    """The sum of one output: `taps` runs of `words` words, in the packed weights `most` words.

    Attributes:
        rows: Kernel rows.
        columns: Runs of each kernel row: its taps, or 1 where they are merged.
        words: Words of a run that are read.
        most: Words of a run that are packed.
    """

    rows: int
    columns: int
    words: int
    most: int

    @classmethod
    def of(cls, shape: ConvShape, in_max: int) -> "Depth":
        """For weights packed with `in_max` input channels."""
        kh, kw = shape.kernel
        if merged(in_max, shape):
            words = ceil_div(kw * in_max, WORD)
            return cls(kh, 1, words, words)
        return cls(kh, kw, ceil_div(shape.in_channels, WORD), ceil_div(in_max, WORD))

    @property
    def packed(self) -> int:
        """Words of the sum in the packed weights."""
        return self.rows * self.columns * self.most


def order(q: I8, shape: ConvShape) -> NDArray[np.int8]:
    """Weights [out, in, kh, kw] as [out / 16, words, 16, 4], zero padded."""
    out, inner, kh, _ = q.shape
    rows = np.moveaxis(q, 1, 3)  # [out, kh, kw, in]
    if merged(inner, shape):
        rows = rows.reshape(out, kh, 1, -1)
    rows = np.pad(rows, ((0, -out % LANES), (0, 0), (0, 0), (0, -rows.shape[3] % WORD)))
    rows = rows.reshape(rows.shape[0] // LANES, LANES, -1, WORD)
    return np.ascontiguousarray(rows.swapaxes(1, 2))


def pack(w: Matrix, bias: F32 | None, shape: ConvShape) -> Packed:
    """Weights [out / 16, words, 16, 4] int8; starts, scale and bias of each channel.

    Start i is -128 times the sum of the weights of the first 16 (i + 1) input channels: what makes
    up for the 128 in the codes of signed images (`start_of`).
    """
    out, inner = w.q.shape[:2]
    starts = [
        -128 * w.q[:, : RANK_STEP * (i + 1)].reshape(out, -1).sum(1, dtype=np.int32)
        for i in range(ceil_div(inner, RANK_STEP))
    ]
    pad = (0, -out % LANES)
    biases = np.zeros(out, np.float32) if bias is None else bias
    return {
        "weight": order(w.q, shape).reshape(-1),
        "start": np.pad(np.stack(starts).astype(np.int32), ((0, 0), pad)).reshape(-1),
        "scale": np.pad(w.scale, pad),
        "bias": np.pad(biases.astype(np.float32), pad),
    }


def start_of(image: Image, at: str, count: int) -> str:
    """`count` of the starts of `pack` from `at` on; for the 64 in codes of 7 bits half as large."""
    start = f"start[{lanes(at, count)}]"
    return start if image.bits == 8 else f"T.shift_right({start}, T.broadcast(1, {count}))"


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring output pixels of a row that are computed together.

    Attributes:
        first: Column of the first, of the first run.
        count: Runs of this kind, side by side.
        width: Pixels of each.
        live: For each tap column, [begin, end) of the pixels whose tap lies in the image.
    """

    first: int
    count: int
    width: int
    live: tuple[tuple[int, int], ...]

    @property
    def inner(self) -> bool:
        """Whether every tap of every pixel lies in the image."""
        return all(span == (0, self.width) for span in self.live)


def runs(shape: ConvShape, longest: int, *, skip: bool) -> tuple[Run, ...]:
    """Cut one output row into runs of at most `longest` pixels: two lengths, the longer ones first.

    Args:
        shape: Sizes.
        longest: Pixels.
        skip: Whether taps outside the image are left out.
    """
    out, pad, stride = shape.out_size[1], shape.padding[1], shape.stride[1]
    parts = ceil_div(out, longest)
    found: list[Run] = []
    first = 0
    for i in range(parts):
        width = out // parts + (i < out % parts)
        live = []
        for j in range(shape.kernel[1]):
            inside = [
                t
                for t in range(width)
                if 0 <= (first + t) * stride + j * shape.dilation[1] - pad < shape.in_size[1]
            ]
            whole = (0, width) if not skip else (0, 0)
            live.append((inside[0], inside[-1] + 1) if skip and inside else whole)
        run = Run(first, 1, width, tuple(live))
        last = found[-1] if found else run
        if found and (last.width, last.live) == (run.width, run.live):
            found[-1] = Run(last.first, last.count + 1, width, run.live)
        else:
            found.append(run)
        first += width
    return tuple(found)


Accumulators = list[list[str]]
"""Int32 vectors: [vector of channels][pixel]."""


@dataclass(frozen=True, slots=True)
class Spot:
    """One output pixel.

    Attributes:
        row: Its row.
        column: Its column is `column` + `shift`.
        shift: Pixels.
        guard: Condition under which it exists; "": it does.
    """

    row: str
    column: str
    shift: int = 0
    guard: str = ""


def row_of(row: str, column: str, width: int) -> tuple[Spot, ...]:
    """Neighbouring pixels."""
    return tuple(Spot(row, column, shift) for shift in range(width))


@dataclass(frozen=True, slots=True)
class Output:
    """Writer of what happens to finished sums.

    Attributes:
        e: Where to write.
        flow: What is computed.
        steps: Of the epilogue.
        raw: Whether the output is the sums.
        wide: Whether there are the instructions of AVX-512.
        scale: Text of the source's scale for image `b`.
    """

    e: Emitter
    flow: Flow
    steps: tuple[str, ...]
    raw: bool
    wide: bool
    scale: Callable[[str], str]

    @property
    def direct(self) -> bool:
        """Whether codes are made in registers."""
        plain = self.flow.residual is not None or "add" not in self.steps
        short = set(self.steps) <= {"relu", "add"}
        return self.flow.target is not None and short and plain and not self._planar

    @property
    def kind(self) -> str:
        """Of the operator."""
        return "conv" if self.flow.target is not None and not self.flow.floats else "planes"

    @property
    def _planar(self) -> bool:
        return self.raw or self.flow.floats or self.flow.target is None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the float32 output."""
        s = self.flow.shape
        return (s.batch, s.out_channels, *s.out_size)

    def parameters(self) -> list[str]:
        """Everything after the packed weights."""
        found = []
        if "add" in self.steps:
            if self.flow.residual is None:
                found.append(buffer("residual", self.shape, "float32"))
            else:
                found.append(Grid(self.flow.residual).parameter("residual"))
                found.append(buffer("range_residual", (RANGE,), "float32"))
        if self.flow.target is not None and not self.raw:
            found.append(buffer("range_out", (RANGE,), "float32"))
            found.append(Grid(self.flow.target).parameter("words"))
        if self._planar:
            found.append(buffer("y", self.shape, "int32" if self.raw else "float32"))
        return found

    def outs(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """(shape, dtype) of every output."""
        found = []
        if self.flow.target is not None and not self.raw:
            found.append(Grid(self.flow.target).out())
        if self._planar:
            found.append((self.shape, "int32" if self.raw else "float32"))
        return tuple(found)

    def prepare(self) -> None:
        """Write the zeros around the target."""
        if self.flow.target is not None and not self.raw:
            Grid(self.flow.target).fill_halo(self.e, "words")

    def finish(self, b: str, spots: Sequence[Spot], group: str, acc: Accumulators) -> None:
        """Store pixels.

        Args:
            b: Image.
            spots: The pixels, neighbours in one row unless the output is `direct`.
            group: Number of the first vector of channels.
            acc: The sums.
        """
        if self.direct:
            self._direct(b, spots, group, acc)
        else:
            self._staged((b, spots[0].row, spots[0].column), group, acc)

    def _factors(self, b: str, group: str, *, folded: bool) -> tuple[str, str]:
        """(scale, bias) of one vector of channels, as codes of the target if `folded`."""
        e = self.e
        here = lanes(f"({group}) * {LANES}")
        scale, bias = f"wscale[{here}] * {splat(self.scale(b))}", f"bias[{here}]"
        if folded:
            inverse = splat("range_out[1]")
            scale, bias = f"{scale} * {inverse}", f"{bias} * {inverse}"
        return e.let("s", scale), e.let("h", bias)

    def _residual(self, pixel: str, group: str) -> str:
        """Sixteen residual codes of a pixel, without the 128 of signed ones, as float32."""
        assert self.flow.residual is not None
        channels = f"({group}) * {LANES}"
        return _wide(self.e, Grid(self.flow.residual), "residual", pixel, channels)

    def _pixels(self, grid: Grid, b: str, spots: Sequence[Spot]) -> list[str]:
        """First byte of each pixel."""
        bases: dict[tuple[str, str], str] = {}
        found = []
        for spot in spots:
            where = (spot.row, spot.column)
            if where not in bases:
                line = f"{b} * {grid.plane} + {grid.origin} + ({spot.row}) * {grid.row}"
                bases[where] = self.e.let("px", f"{line} + ({spot.column}) * {grid.depth}")
            found.append(f"{bases[where]} + {spot.shift * grid.depth}")
        return found

    def _pixel(self, grid: Grid, at: tuple[str, str, str], pixel: int | str) -> str:
        b, r, c = at
        line = f"{b} * {grid.plane} + {grid.origin} + {r} * {grid.row} + ({c}) * {grid.depth}"
        return f"{line} + {pixel} * {grid.depth}"

    def _direct(self, b: str, spots: Sequence[Spot], group: str, acc: Accumulators) -> None:
        """Codes straight from registers; 1 / scale of the target is part of every factor."""
        e, target = self.e, self.flow.target
        assert target is not None
        unsigned = not target.signed
        steps = self.steps[:-1] if unsigned and self.steps[-1:] == ("relu",) else self.steps
        factors = [self._factors(b, f"{group} + {v}", folded=True) for v in range(len(acc))]
        ratio, more = "", list[str]()
        if "add" in steps:
            assert self.flow.residual is not None
            ratio = e.let("ratio", splat("(range_residual[0] * range_out[1])"))
            more = self._pixels(Grid(self.flow.residual), b, spots)
        codes: list[tuple[int, int, str]] = []
        for p in range(len(acc[0])):
            for v, row in enumerate(acc):
                scale, bias = factors[v]
                value = e.let("v", f'T.cast({row[p]}, "float32x16") * {scale} + {bias}')
                for step in steps:
                    if step == "relu":
                        value = e.let("v", f"T.max({value}, {f32(0.0)})")
                    else:
                        residual = self._residual(more[p], f"{group} + {v}")
                        value = e.let("v", f"{residual} * {ratio} + {value}")
                codes.append((p, v, value))
        pixels = self._pixels(Grid(target), b, spots)
        count = len(acc)
        for first in range(0, len(codes), 4):
            four = codes[first : first + 4]
            values = [value for _, _, value in four]
            packed = codes_of(e, values, target, wide=self.wide)
            begin = 0
            while begin < len(four):
                p, vector, _ = four[begin]
                size = min(count - vector, len(four) - begin)
                with e.maybe(spots[p].guard):
                    self._put(pixels[p], vector, group, packed, begin, size)
                begin += size

    def _put(self, pixel: str, vector: int, group: str, packed: str, start: int, size: int) -> None:
        """Store `size` sixteens of `packed`, which begin at its sixteen `start`, for one pixel."""
        assert self.flow.target is not None
        at = f"{pixel} + {vector * LANES} + ({group}) * {LANES}"
        count = min(size * LANES, Grid(self.flow.target).depth)
        store_bytes(self.e, "words", at, packed, count, first=start * LANES)

    def _staged(self, at: tuple[str, str, str], group: str, acc: Accumulators) -> None:
        """Sums go through memory: long epilogues are written once, planes are transposed."""
        e = self.e
        count, width = len(acc), len(acc[0])
        sums = e.alloc("sums", (count * LANES * LANES,), "int32")
        for v, names in enumerate(acc):
            for p, name in enumerate(names):
                e(f"{sums}[{lanes((v * LANES + p) * LANES)}] = {name}")
        if self.raw:
            self._planes(at, group, sums, count, width)
            return
        b, row, column = at
        tile = e.alloc("tile", (count * LANES * LANES,), "float32")
        with e.loop("v", count) as vector:
            channels = f"{group} + {vector}"
            scale, bias = self._factors(b, channels, folded=False)
            floats = "add" in self.steps and self.flow.residual is None
            if floats:
                self._gather(at, channels, f"{vector} * {LANES}", tile, width)
            with e.loop("p", width) as pixel:
                spot = f"{column} + {pixel}"
                here = lanes(f"({vector} * {LANES} + {pixel}) * {LANES}")
                value = e.let("v", f'T.cast({sums}[{here}], "float32x16") * {scale} + {bias}')
                residual = None
                if floats:
                    residual = f"{tile}[{here}]"
                elif "add" in self.steps:
                    assert self.flow.residual is not None
                    (where,) = self._pixels(Grid(self.flow.residual), b, [Spot(row, spot)])
                    more = self._residual(where, channels)
                    residual = f"{more} * {splat('range_residual[0]')}"
                value = activate(e, self.steps, value, residual)
                if self.flow.target is not None:
                    grid = Grid(self.flow.target)
                    scaled = e.let("q", f"{value} * {splat('range_out[1]')}")
                    packed = codes_of(e, [scaled], self.flow.target, wide=self.wide)
                    (where,) = self._pixels(grid, b, [Spot(row, spot)])
                    to = f"{where} + ({channels}) * {LANES}"
                    store_bytes(e, "words", to, packed, min(LANES, grid.depth))
                if self._planar:
                    e(f"{tile}[{here}] = {value}")
        if self._planar:
            self._planes(at, group, tile, count, width)

    def _valid(self, group: str) -> Iterator[tuple[str, int]]:
        """(condition, channels) for the ways in which a vector of channels can be filled."""
        whole, rest = divmod(self.flow.shape.out_channels, LANES)
        if whole:
            yield f"{group} < {whole}" if rest else "", LANES
        if rest:
            yield f"{group} == {whole}" if whole else "", rest

    def _gather(
        self, at: tuple[str, str, str], group: str, row: str, tile: str, width: int
    ) -> None:
        """Tile rows `row`, ... (pixels) of the float32 residual's sixteen channels `group`."""
        e, (b, r, c) = self.e, at
        spare = e.alloc("spare", (LANES * LANES,), "float32")
        for condition, live in self._valid(group):
            with e.maybe(condition), e.loop("k", live) as k:
                for start, size in pieces(width):
                    line = f"residual[{b}, ({group}) * {LANES} + {k}, {r}, "
                    source = f"{line}{lanes(f'{c} + {start}', size)}]"
                    e(f"{spare}[{lanes(f'{k} * {LANES} + {start}', size)}] = {source}")
        rows = [e.let("r", f"{spare}[{lanes(k * LANES)}]") for k in range(LANES)]
        for p, name in enumerate(transpose(e, rows)[:width]):
            e(f"{tile}[{lanes(f'({row} + {p}) * {LANES}')}] = {name}")

    def _planes(
        self, at: tuple[str, str, str], group: str, tile: str, count: int, width: int
    ) -> None:
        """Store tile [vector, pixel, 16 channels] as rows of the planes of y."""
        e, (b, r, c) = self.e, at
        with e.loop("v", count) as v:
            rows = [
                e.let("r", f"{tile}[{lanes(f'({v} * {LANES} + {min(p, width - 1)}) * {LANES}')}]")
                for p in range(LANES)
            ]
            columns = e.let("g", f"{group} + {v}")
            turned = transpose(e, rows)
            for condition, live in self._valid(columns):
                with e.maybe(condition):
                    for k in range(live):
                        to = f"y[{b}, {columns} * {LANES} + {k}, {r}, "
                        self._put_row(to, c, turned[k], width)

    def _put_row(self, to: str, column: str, value: str, width: int) -> None:
        """Store the first `width` lanes; `to` is the text of y up to the last index."""
        e = self.e
        if self.wide and 1 < width < LANES:
            kept = f"T.ramp(0, 1, {LANES}) < T.broadcast({width}, {LANES})"
            e.intrinsic("llvm.masked.store", value, f"T.address_of({to}{column}])", kept)
            return
        for start, size in pieces(width):
            part = f"T.Shuffle([{value}], {list(range(start, start + size))})"
            piece = value if size == LANES else part
            e(f"{to}{lanes(f'{column} + {start}', size)}] = {piece}")


def _wide(e: Emitter, grid: Grid, name: str, pixel: str, channels: str) -> str:
    """Sixteen codes from `channels` on as float32, without the 128 of signed ones."""
    count = min(LANES, grid.depth)
    if count == LANES:
        code = f'T.cast({name}[{lanes(f"{pixel} + {channels}")}], "int32x16")'
    else:
        spare = e.alloc("spare", (LANES,), "uint8")
        e(f"{spare}[{lanes(0)}] = T.broadcast(T.uint8(0), {LANES})")
        for at, size in pieces(count):
            line = f"{name}[{lanes(f'{pixel} + {channels} + {at}', size)}]"
            e(f"{spare}[{lanes(at, size)}] = {line}")
        code = f'T.cast({spare}[{lanes(0)}], "int32x16")'
    if grid.zero:
        code = f"{code} - {i32(grid.zero)}"
    return e.let("r", f'T.cast({code}, "float32x16")')


def packed_parameters(shape: ConvShape, channels_max: tuple[int, int]) -> tuple[str, ...]:
    """The arrays of `pack` as parameters of a function."""
    out_max, in_max = channels_max
    out = ceil_div(out_max, LANES) * LANES
    return (
        buffer("weight", (out * Depth.of(shape, in_max).packed * WORD,), "int8"),
        buffer("start", (out * ceil_div(in_max, RANK_STEP),), "int32"),
        buffer("wscale", (out,), "float32"),
        buffer("bias", (out,), "float32"),
    )


def tag(flow: Flow, channels_max: tuple[int, int]) -> str:
    """The sizes as part of a function name."""
    s = flow.shape
    parts = [f"o{s.out_channels}", Grid(flow.source).tag()]
    for letter, pair in (("k", s.kernel), ("s", s.stride), ("p", s.padding), ("d", s.dilation)):
        parts.append(f"{letter}{pair[0]}x{pair[1]}")
    if channels_max != (s.out_channels, s.in_channels):
        parts.append(f"of{channels_max[0]}x{channels_max[1]}")
    for letter, image in (("t", flow.target), ("r", flow.residual)):
        if image is not None:
            parts.append(f"{letter}h{image.halo}{image.letters}")
    if flow.floats:
        parts.append("f32")
    return "_".join(parts)


def check_shape(s: ConvShape) -> None:
    """Refuse an empty output.

    Raises:
        ValueError: It is empty.
    """
    if min(s.out_size) < 1 or min(s.batch, s.in_channels) < 1:
        raise ValueError(
            f"convolution {s} has an empty output {s.out_size}; "
            "need an image at least as large as the dilated kernel"
        )


def check(flow: Flow) -> None:
    """Refuse images that do not fit the shape.

    Raises:
        ValueError: What does not fit.
    """
    s = flow.shape
    check_shape(s)
    sizes = {
        "source": (flow.source, (s.batch, s.in_channels, s.in_size)),
        "target": (flow.target, (s.batch, s.out_channels, s.out_size)),
        "residual": (flow.residual, (s.batch, s.out_channels, s.out_size)),
    }
    for name, (image, want) in sizes.items():
        if image is not None and (image.batch, image.channels, image.size) != want:
            raise ValueError(f"{name} {image} does not fit {s}: need batch, channels, size {want}")
    if flow.source.halo < max(s.padding):
        raise ValueError(
            f"source halo {flow.source.halo} is below the padding {s.padding} of {s}; "
            "give the image the largest padding of its readers"
        )
