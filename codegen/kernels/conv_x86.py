"""What the x86 convolutions share: quantization into the layout of conv_layout, and the store.

Sixteen pixels of a channel are one vector everywhere. A vector of the product may span the end of
an output row; its valid lanes are neighbours in the output, so they are compressed and stored in
one piece.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from t3c.codegen.kernels.conv_layout import Layout
from t3c.codegen.kernels.emit import LANES, Emitter, activate, buffer, ceil_div, i32, lanes, splat
from t3c.codegen.kernels.family import ConvShape, Kernel

PARALLEL_ELEMENTS = 1 << 17
"""Elements of a quantization worth several threads: about 50 us of one."""
ZERO = "T.broadcast(T.float32(0), 16)"


def below(count: str | int, width: int = LANES) -> str:
    """A vector of bool: lane < count."""
    return f"{lanes(0, width)} < T.broadcast({count}, {width})"


def masked_load(address: str, mask: str, *, expand: bool = False) -> str:
    """Float32 lanes from memory, zero where the mask is false; expand: consecutive in memory."""
    name = "llvm.masked.expandload" if expand else "llvm.masked.load"
    return f'T.call_llvm_intrin("float32x16", "{name}", T.address_of({address}), {mask}, {ZERO})'


def codes_of(vector: str) -> str:
    """Float vector to int32, rounded to the nearest even: one instruction."""
    return (
        f'T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.mask.cvtps2dq.512", {vector}, '
        f"{i32(0)}, T.int16(-1), T.int32(4))"
    )


def quantize_kernel(layout: Layout, name: str, *, offset: int, slack: int) -> Kernel:
    """Two passes over the image: its largest magnitude, then codes in the layout.

    Args:
        layout: Where the codes go.
        name: Of the function.
        offset: 0 for signed codes, 128 for unsigned ones (added to every code and every zero).
        slack: Words after the last plane.
    """
    s = layout.shape
    words = layout.words(slack)
    e = Emitter()
    inverse = emit_peaks(e, s)
    writer = _Quantizer(e, layout, offset, inverse)
    if layout.patches or s.stride[1] > 2:
        writer.bytes_then_words()
    else:
        writer.words()
    params = (
        buffer("x", (s.batch, s.in_channels, *s.in_size), "float32"),
        buffer("codes", (words,), "int32"),
        buffer("scales", (s.batch,), "float32"),
    )
    outs: tuple[tuple[tuple[int, ...], str], ...] = (((words,), "int32"), ((s.batch,), "float32"))
    return Kernel(name, e.function(name, params), outs)


def emit_peaks(e: Emitter, s: ConvShape) -> str:
    """Fill `scales`; gives the name of a buffer [batch] of their inverses."""
    size = s.in_channels * s.in_size[0] * s.in_size[1]
    blocks = size // 64
    tasks = max(1, min(16, size // (PARALLEL_ELEMENTS // 4)))
    peaks = e.alloc("peaks", (s.batch * tasks,), "float32")
    inverse = e.alloc("inverse", (s.batch,), "float32")
    with e.parallel("t", s.batch * tasks, s.batch * size >= PARALLEL_ELEMENTS) as t:
        tops = [e.alloc("top", (LANES,), "float32") for _ in range(4)]
        for top in tops:
            e(f"{top}[{lanes(0)}] = T.broadcast(T.float32(1e-12), 16)")
        if blocks:
            each = ceil_div(blocks, tasks)
            with e.loop("i", each) as i:
                # the last task reads some blocks twice instead of fewer
                at = e.let("at", f"T.min({t} % {tasks} * {each} + {i}, {blocks - 1}) * 64")
                for u, top in enumerate(tops):
                    value = f"x[{t} // {tasks}, 0, 0, {lanes(f'{at} + {16 * u}')}]"
                    e(f"{top}[{lanes(0)}] = T.max({top}[{lanes(0)}], T.abs({value}))")
        if size % 64:
            with e.loop("i", size % 64) as i:
                value = f"x[{t} // {tasks}, 0, 0, {blocks * 64} + {i}]"
                e(f"{tops[0]}[0] = T.max({tops[0]}[0], T.abs({value}))")
        a, b, c, d = (f"{top}[{lanes(0)}]" for top in tops)
        all_four = f"T.max(T.max({a}, {b}), T.max({c}, {d}))"
        reduced = f'T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fmax", {all_four})'
        e(f"{peaks}[{t}] = {reduced}")
    with e.loop("b", s.batch) as b:
        e(f"scales[{b}] = {peaks}[{b} * {tasks}]")
        if tasks > 1:
            with e.loop("t", tasks - 1) as t:
                e(f"scales[{b}] = T.max(scales[{b}], {peaks}[{b} * {tasks} + 1 + {t}])")
        e(f"{inverse}[{b}] = T.float32(127) / scales[{b}]")
        e(f"scales[{b}] = scales[{b}] * T.float32({1 / 127!r})")
    return inverse


def _join(bytes_: Iterable[str]) -> str:
    """One word of four bytes, the first lowest."""
    word = ""
    for u, byte in enumerate(bytes_):
        part = f'T.bitwise_and(T.cast({byte}, "int32"), 255)'
        part = f"T.shift_left({part}, {8 * u})" if u else part
        word = f"T.bitwise_or({word}, {part})" if u else part
    return word


@dataclass(frozen=True, slots=True)
class _Quantizer:
    """Writer of the second pass."""

    e: Emitter
    layout: Layout
    offset: int
    inverse: str

    @property
    def zero(self) -> str:
        """The word of four zeros."""
        return "T.int32(-2139062144)" if self.offset else "T.int32(0)"

    @property
    def threads(self) -> bool:
        """Whether the pass is worth several threads."""
        s = self.layout.shape
        return s.batch * s.in_channels * s.in_size[0] * s.in_size[1] >= PARALLEL_ELEMENTS

    def words(self) -> None:
        """Four channels by sixteen pixels at a time, straight from the image."""
        e, layout, s = self.e, self.layout, self.layout.shape
        whole, rest = divmod(s.in_channels, 4)
        for first, count, live in ((whole, 1, rest), (0, whole, 4)):
            if not (count and live):
                continue
            with e.parallel("t", s.batch * count, self.threads and count > 1) as t:
                b = e.let("b", f"{t} // {count}")
                # backwards: the end of the image is still in cache from the first pass
                q = e.let("q", f"{first + count - 1} - {t} % {count}")
                inverse = e.let("inv", splat(f"{self.inverse}[{b}]"))
                to = e.let("to", f"{b} * {layout.image_words} + {q} * {layout.quad_words}")
                if layout.padded:
                    with e.loop("i", layout.quad_words // LANES) as i:
                        e(f"codes[{lanes(f'{to} + {i} * 16')}] = {splat(self.zero)}")
                channels = [f"x[{b}, {q} * 4 + {u}, 0, " for u in range(live)]
                self._quad(channels, inverse, to)

    def _quad(self, channels: list[str], inverse: str, to: str) -> None:
        """All pixels of one quad."""
        e, layout = self.e, self.layout
        h, w = layout.axis(0), layout.axis(1)
        if layout.flat:
            self._row(channels, inverse, "0", h.size * w.size, 1, {0: to})
            return
        limit = min(w.size, w.stride * w.extent - w.padding)
        for i, phase in enumerate(h.phases):
            first, end = h.span(phase)
            if first == end:
                continue
            with e.loop("r", end - first) as r:
                line = f"(({r} + {first}) * {h.stride} + {phase - h.padding}) * {w.size}"
                source = e.let("source", line)
                starts = {}
                for j, side in enumerate(w.phases):
                    column = (side - w.padding) % w.stride  # first pixel of the image in this phase
                    at = (i * len(w.phases) + j) * layout.plane + (column + w.padding) // w.stride
                    line = f"{to} + ({r} + {first}) * {layout.pitch} + {at}"
                    starts[column] = e.let("start", line)
                self._row(channels, inverse, source, limit, w.stride, starts)

    def _row(
        self,
        channels: list[str],
        inverse: str,
        source: str,
        size: int,
        stride: int,
        starts: dict[int, str],
    ) -> None:
        """`size` neighbouring pixels.

        Args:
            channels: Text of the image up to its last index, for each channel that exists.
            inverse: 127 / peak, a vector.
            source: Index of the first pixel within a channel.
            size: Pixels.
            stride: 1 or 2.
            starts: Residue of the pixel modulo the stride -> word of its first pixel.
        """
        e = self.e
        whole, rest = divmod(size, LANES)
        if whole:
            with e.loop("v", whole) as v:
                word = self._word(channels, inverse, f"{source} + {v} * 16", None)
                self._put(word, stride, f"{v} * {LANES // stride}", starts, None)
        if rest and whole and (size - LANES) % stride == 0:  # once more the last sixteen
            word = self._word(channels, inverse, f"{source} + {size - LANES}", None)
            self._put(word, stride, f"{(size - LANES) // stride}", starts, None)
        elif rest:
            word = self._word(channels, inverse, f"{source} + {size - rest}", rest)
            self._put(word, stride, f"{whole * LANES // stride}", starts, rest)

    def _word(self, channels: list[str], inverse: str, at: str, count: int | None) -> str:
        """Sixteen words of a quad; only `count` pixels exist (None: all)."""
        e = self.e
        parts = []
        for u, channel in enumerate(channels):
            value = f"{channel}{lanes(at)}]"
            if count is not None:
                value = masked_load(f"{channel}{at}]", below(count))
            code = e.let("c", codes_of(f"{value} * {inverse}"))
            parts.append(f"T.bitwise_and({code}, {i32(255)})" if u < 3 else code)
        word = parts[0]
        for u, part in enumerate(parts[1:], 1):
            word = f"T.bitwise_or({word}, T.shift_left({part}, {i32(8 * u)}))"
        if self.offset:
            word = f"T.bitwise_xor({word}, {splat(self.zero)})"
        return e.let("word", word)

    def _put(
        self, word: str, stride: int, at: str, starts: dict[int, str], count: int | None
    ) -> None:
        """Store words, split by their residue modulo the stride."""
        e = self.e
        width = LANES // stride
        for residue, start in starts.items():
            value = word
            if stride == 2:
                value = f"T.Shuffle([{word}], {list(range(residue, LANES, 2))})"
            kept = width if count is None else ceil_div(count - residue, stride)
            if kept == width:
                e(f"codes[{lanes(f'{start} + {at}', width)}] = {value}")
            elif kept == 1:  # LLVM 22 stores two words where a narrowing store has one lane
                e(f"codes[{start} + {at}] = T.Shuffle([{word}], [{residue}])")
            elif kept > 1:
                address = f"T.address_of(codes[{start} + {at}])"
                e.intrinsic("llvm.masked.store", value, address, below(kept, width))

    def bytes_then_words(self) -> None:
        """Quantize the image in its own order, then gather: patches and strides above two."""
        e, layout, s = self.e, self.layout, self.layout.shape
        size = s.in_channels * s.in_size[0] * s.in_size[1]
        image = e.alloc("image", (s.batch * size,), "int8")
        with e.loop("b", s.batch) as b:
            if size >= LANES:
                inverse = e.let("inv", splat(f"{self.inverse}[{b}]"))
                with e.loop("v", ceil_div(size, LANES)) as v:
                    at = e.let("at", f"T.min({v} * 16, {size - LANES})")
                    value = codes_of(f"x[{b}, 0, 0, {lanes(at)}] * {inverse}")
                    if self.offset:
                        value = f"T.bitwise_xor({value}, {i32(-128)})"
                    e(f'{image}[{lanes(f"{b} * {size} + {at}")}] = T.cast({value}, "int8x16")')
            else:
                with e.loop("v", size) as v:
                    value = f'T.cast(T.nearbyint(x[{b}, 0, 0, {v}] * {self.inverse}[{b}]), "int32")'
                    if self.offset:
                        value = f"T.bitwise_xor({value}, -128)"
                    e(f'{image}[{b} * {size} + {v}] = T.cast({value}, "int8")')
        if layout.patches:
            self._gather_patches(image)
        else:
            self._gather(image)

    def _gather_patches(self, image: str) -> None:
        """Four neighbours of a patch are one word: bytes of a row, or of any rows and channels."""
        e, layout, s = self.e, self.layout, self.layout.shape
        (height, width), (oh, ow) = s.in_size, s.out_size
        (kh, kw), c = s.kernel, s.in_channels

        def source(tap: str, b: str, r: str, v: str) -> str:
            line = f"({b} * {c} + {tap} // {kh * kw}) * {height} + {r} * {kh}"
            return f"({line} + {tap} // {kw} % {kh}) * {width} + {v} * {kw} + {tap} % {kw}"

        with e.parallel("t", s.batch * layout.quads, self.threads) as t:
            b = e.let("b", f"{t} // {layout.quads}")
            tap = e.let("tap", f"{t} % {layout.quads} * 4")
            with e.loop("r", oh) as r, e.loop("v", ow) as v:
                if kw % 4 == 0:
                    four = lanes(source(tap, b, r, v), 4)
                    word = f'T.reinterpret({image}[{four}], dtype="int32")'
                else:  # a tap past the last repeats it: its weights are zero
                    last = layout.channels - 1
                    word = _join(
                        f"{image}[{source(f'T.min({tap} + {u}, {last})', b, r, v)}]"
                        for u in range(4)
                    )
                e(f"codes[{t} * {layout.plane} + {r} * {ow} + {v}] = {word}")

    def _gather(self, image: str) -> None:
        """Any stride, word by word."""
        e, layout, s = self.e, self.layout, self.layout.shape
        height, width = s.in_size
        h, w = layout.axis(0), layout.axis(1)
        with e.parallel("t", s.batch * layout.quads, self.threads) as t:
            to = e.let("to", f"{t} * {layout.quad_words}")
            b = e.let("b", f"{t} // {layout.quads}")
            q = e.let("q", f"{t} % {layout.quads}")
            with e.loop("i", layout.quad_words) as i:
                e(f"codes[{to} + {i}] = {self.zero}")
            for index, (ph, pw) in enumerate(layout.phases):
                (top, bottom), (left, right) = h.span(ph), w.span(pw)
                if top == bottom or left == right:
                    continue
                with e.loop("r", bottom - top) as r, e.loop("v", right - left) as v:
                    at = f"{to} + {index * layout.plane} + ({r} + {top}) * {layout.pitch}"
                    at += f" + {v} + {left}"
                    pixel = f"(({r} + {top}) * {h.stride} + {ph - h.padding}) * {width}"
                    pixel += f" + ({v} + {left}) * {w.stride} + {pw - w.padding}"
                    word = _join(  # a channel past the last repeats it: its weights are zero
                        f"{image}[({b} * {s.in_channels}"
                        f" + T.min({q} * 4 + {u}, {s.in_channels - 1}))"
                        f" * {height * width} + {pixel}]"
                        for u in range(4)
                    )
                    e(f"codes[{at}] = {word}")


@dataclass(frozen=True, slots=True)
class Panel:
    """Output positions of neighbouring pixel vectors.

    Attributes:
        e: Where to write.
        layout: The geometry.
        start: Output index (within a channel) of the first lane that counts, for each vector.
        end: Output index after the last lane that counts; empty if rows are not split.
        column: Name of each vector of output columns; lanes at `out` or beyond are garbage.
        count: Lanes of the last vector that exist, if rows are not split (None: all).
    """

    e: Emitter
    layout: Layout
    start: tuple[str, ...]
    end: tuple[str, ...]
    column: tuple[str, ...]
    count: int | None

    @property
    def split(self) -> bool:
        """Whether garbage columns lie between rows."""
        return self.layout.pitch != self.layout.shape.out_size[1]

    def _mask(self, j: int) -> str:
        return f"{self.column[j]} < T.broadcast({self.layout.shape.out_size[1]}, 16)"

    def _left(self, j: int) -> int | None:
        return self.count if j == len(self.start) - 1 else None

    def load(self, channel: str, j: int) -> str:
        """Vector `j` of a float32 buffer; `channel` is its text up to the last index."""
        address = f"{channel}{self.start[j]}]"
        if self.split:
            return masked_load(address, self._mask(j), expand=True)
        if (left := self._left(j)) is not None:
            return masked_load(address, below(left))
        return f"{channel}{lanes(self.start[j])}]"

    def store(self, channel: str, j: int, value: str, dtype: str) -> None:
        """Store vector `j`; `channel` is the text of the output up to the last index."""
        if self.split:
            zero = ZERO if dtype == "float32" else i32(0)
            value = (
                f'T.call_llvm_pure_intrin("{dtype}x16", "llvm.experimental.vector.compress", '
                f"{value}, {self._mask(j)}, {zero})"
            )
            kept = below(f"{self.end[j]} - {self.start[j]}")
        elif (left := self._left(j)) is not None:
            kept = below(left)
        else:
            self.e(f"{channel}{lanes(self.start[j])}] = {value}")
            return
        address = f"T.address_of({channel}{self.start[j]}])"
        self.e.intrinsic("llvm.masked.store", value, address, kept)

    def finish(
        self,
        j: int,
        channel: str,
        accumulators: str,
        scale: str,
        bias: str,
        steps: tuple[str, ...],
    ) -> None:
        """Dequantize vector `j` of channel text ``b, n`` of `y`, apply the epilogue, store."""
        e = self.e
        value = e.let("v", f'T.cast({accumulators}, "float32x16") * {scale} + {bias}')
        residual = self.load(f"residual[{channel}, 0, ", j) if "add" in steps else None
        value = activate(e, steps, value, residual)
        self.store(f"y[{channel}, 0, ", j, value, "float32")


def panel_at(e: Emitter, layout: Layout, at: str, vectors: int, *, last: bool) -> Panel:
    """Positions of `vectors` pixel vectors starting at pixel `at` (pitch order).

    Args:
        e: Where to write.
        layout: The geometry.
        at: First pixel, a multiple of the lanes.
        vectors: Number of vectors.
        last: Whether the image ends inside the last vector.
    """
    oh, ow = layout.shape.out_size
    if layout.pitch == ow:
        start = tuple(e.let("o", f"{at} + {LANES * j}") for j in range(vectors))
        return Panel(e, layout, start, (), (), (layout.pixels % LANES or None) if last else None)
    column, edge = [], []
    for j in range(vectors + 1):
        pixel = e.let("p", f"{at} + {LANES * j}")
        line = f"{pixel} // {layout.pitch} * {ow} + T.min({pixel} % {layout.pitch}, {ow})"
        edge.append(e.let("o", f"T.min({line}, {oh * ow})"))
        if j < vectors:
            value = f"T.floormod({lanes(pixel)}, {i32(layout.pitch)})"
            if last:
                inside = f"{lanes(pixel)} < {i32(layout.pixels)}"
                value = f"T.Select({inside}, {value}, {i32(ow)})"
            column.append(e.let("m", value))
    return Panel(e, layout, tuple(edge[:-1]), tuple(edge[1:]), tuple(column), None)
