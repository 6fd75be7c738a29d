"""Where a convolution's codes and weights lie: the geometry shared by every kernel family.

Codes are int32 words of four int8 channels ("quads"), because sixteen neighbouring pixels of NCHW
data pack into sixteen words by vector operations alone. A word sits at

    codes[image, quad, phase, row * pitch + column]

where a phase holds every stride-th pixel of the zero-padded image, so that every tap of a strided
convolution reads consecutive words: output pixel p = row * pitch + column needs, for each tap, the
word at p + offset(tap). Columns between the output's width and the pitch compute garbage, which the
kernels never store. Neighbouring rows share their zeros: the right padding of one row is the left
padding of the next.
"""

from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.kernels.emit import LANES, ceil_div
from t3c.codegen.kernels.family import ConvShape
from t3c.core.codes import I8


@dataclass(frozen=True, slots=True)
class TapClass:
    """Taps that read one phase, a regular grid of `count` taps.

    Attributes:
        phase: Index of the phase among the stored ones.
        count: Taps along (height, width).
        start: Words from an output pixel to the word of the first tap.
        step: Words between neighbouring taps along (height, width).
        first: Index of the first tap in the order of the packed weights.
    """

    phase: int
    count: tuple[int, int]
    start: int
    step: tuple[int, int]
    first: int


@dataclass(frozen=True, slots=True)
class Axis:
    """Geometry of one axis (height or width)."""

    size: int
    out: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def period(self) -> int:
        """Taps that are this far apart read the same phase."""
        return min(self.stride // gcd(self.stride, self.dilation), self.kernel)

    @property
    def phases(self) -> tuple[int, ...]:
        """Stride phases that some tap reads."""
        return tuple(sorted({r * self.dilation % self.stride for r in range(self.period)}))

    @property
    def extent(self) -> int:
        """Pixels of one phase that some output reads."""
        return self.out + (self.kernel - 1) * self.dilation // self.stride

    def span(self, phase: int) -> tuple[int, int]:
        """[first, end) of the phase's pixels that lie inside the image."""
        first = max(0, ceil_div(self.padding - phase, self.stride))
        end = (self.size - 1 + self.padding - phase) // self.stride + 1
        return first, max(first, min(self.extent, end))

    def taps(self, residue: int) -> int:
        """Number of taps with this residue modulo the period."""
        return ceil_div(self.kernel - residue, self.period)


@dataclass(frozen=True, slots=True)
class Layout:
    """Geometry of one convolution.

    A patch embedding (kernel == stride) has a phase for every tap; there the taps become channels
    instead and the convolution 1x1 (`patches`).
    """

    shape: ConvShape

    def __post_init__(self) -> None:
        """Refuse an empty output."""
        if min(self.shape.out_size) < 1 or min(self.shape.batch, self.shape.in_channels) < 1:
            raise ValueError(
                f"convolution {self.shape} has an empty output {self.shape.out_size}; "
                "need an image at least as large as the dilated kernel"
            )

    @property
    def patches(self) -> bool:
        """Whether taps are treated as channels."""
        s = self.shape
        return (
            s.kernel == s.stride
            and s.padding == (0, 0)
            and s.dilation == (1, 1)
            and s.kernel[1] > 2
        )

    @property
    def channels(self) -> int:
        """Channels of the product, taps included if `patches`."""
        return self.shape.in_channels * self.patch_taps

    @property
    def patch_taps(self) -> int:
        """Channels of the product for each channel of the image."""
        return self.shape.kernel[0] * self.shape.kernel[1] if self.patches else 1

    @property
    def quads(self) -> int:
        """Words for each pixel."""
        return self.quads_of(self.shape.in_channels)

    def quads_of(self, channels: int) -> int:
        """Words for each pixel if the image had this many channels."""
        return ceil_div(channels * self.patch_taps, 4)

    def axis(self, i: int) -> Axis:
        """Height (0) or width (1)."""
        s = self.shape
        if self.patches:
            return Axis(s.out_size[i], s.out_size[i], 1, 1, 0, 1)
        return Axis(
            s.in_size[i], s.out_size[i], s.kernel[i], s.stride[i], s.padding[i], s.dilation[i]
        )

    @property
    def padded(self) -> bool:
        """Whether the codes have zeros around the image."""
        return any(self.shape.padding)

    @property
    def flat(self) -> bool:
        """Whether the words of a quad are the pixels of the image in order."""
        s = self.shape
        return s.kernel == (1, 1) and s.stride == (1, 1) and not self.padded

    @property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """Stored (height, width) phases in order."""
        return tuple((a, b) for a in self.axis(0).phases for b in self.axis(1).phases)

    @property
    def shared(self) -> int:
        """Zeros that neighbouring rows share."""
        w = self.axis(1)
        spans = [w.span(phase) for phase in w.phases]
        return min(w.extent - w.out, *(min(first, w.extent - end) for first, end in spans))

    @property
    def pitch(self) -> int:
        """Words from one row to the next."""
        return self.axis(1).extent - self.shared

    @property
    def plane(self) -> int:
        """Words of one phase: an odd number of cache lines, so that planes spread over the sets."""
        lines = ceil_div(self.axis(0).extent * self.pitch + self.shared, LANES)
        return LANES * (lines | 1)

    @property
    def quad_words(self) -> int:
        """Words from one quad to the next."""
        return len(self.phases) * self.plane

    @property
    def image_words(self) -> int:
        """Words from one image to the next."""
        return self.quads * self.quad_words

    def words(self, slack: int) -> int:
        """Words of the whole buffer; the last `slack` ones may be read but are never used."""
        return self.shape.batch * self.image_words + slack

    @property
    def pixels(self) -> int:
        """Output pixels of one image in pitch order, garbage columns between rows included."""
        oh, ow = self.shape.out_size
        return (oh - 1) * self.pitch + ow

    @property
    def vectors(self) -> int:
        """Pixel vectors of one image."""
        return ceil_div(self.pixels, LANES)

    @property
    def classes(self) -> tuple[TapClass, ...]:
        """Every tap, grouped by phase, in the order of the packed weights."""
        h, w = self.axis(0), self.axis(1)
        found: list[TapClass] = []
        first = 0
        for i in range(h.period):
            for j in range(w.period):
                phase = (i * h.dilation % h.stride, j * w.dilation % w.stride)
                index = self.phases.index(phase)
                count = (h.taps(i), w.taps(j))
                shift = (i * h.dilation // h.stride) * self.pitch + j * w.dilation // w.stride
                step = (h.period * h.dilation // h.stride * self.pitch, w.period * w.dilation)
                step = (step[0], step[1] // w.stride)
                found.append(TapClass(index, count, index * self.plane + shift, step, first))
                first += count[0] * count[1]
        return tuple(found)

    @property
    def taps(self) -> int:
        """Number of taps of the product."""
        return self.axis(0).kernel * self.axis(1).kernel

    @property
    def offsets(self) -> tuple[int, ...]:
        """Words from an output pixel to each tap, in the order of the packed weights."""
        return tuple(
            c.start + i * c.step[0] + j * c.step[1]
            for c in self.classes
            for i in range(c.count[0])
            for j in range(c.count[1])
        )

    def order(self, q: I8) -> NDArray[np.int8]:
        """Weights [out, in, kh, kw] as [out, quads, taps, 4] in the kernels' order, zero padded."""
        out, inner = q.shape[:2]
        if self.patches:
            rows = q.reshape(out, inner * self.patch_taps, 1)
        else:
            h, w = self.axis(0), self.axis(1)
            rows = np.concatenate(
                [
                    q[:, :, i :: h.period, j :: w.period].reshape(out, inner, -1)
                    for i in range(h.period)
                    for j in range(w.period)
                ],
                axis=2,
            )
        quads = ceil_div(rows.shape[1], 4)
        rows = np.pad(rows, ((0, 0), (0, 4 * quads - rows.shape[1]), (0, 0)))
        return np.ascontiguousarray(rows.reshape(out, quads, 4, self.taps).swapaxes(2, 3))

    def tag(self, *, outputs: bool = True) -> str:
        """The sizes as part of a function name."""
        s = self.shape
        parts = [
            f"{s.batch}x{s.in_channels}x{s.in_size[0]}x{s.in_size[1]}",
            f"k{s.kernel[0]}x{s.kernel[1]}",
            f"s{s.stride[0]}x{s.stride[1]}",
            f"p{s.padding[0]}x{s.padding[1]}",
            f"d{s.dilation[0]}x{s.dilation[1]}",
        ]
        return "_".join([f"o{s.out_channels}", *parts] if outputs else parts)


def pad_bytes(a: NDArray[np.generic]) -> NDArray[np.generic]:
    """The array flattened and zero padded to a multiple of 64 bytes."""
    flat = np.ascontiguousarray(a).reshape(-1)
    return np.pad(flat, (0, -flat.nbytes % 64 // flat.itemsize))
