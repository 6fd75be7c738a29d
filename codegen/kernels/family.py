"""What a kernel family promises: the shape of its kernels' arguments and the packing of weights.

The pipeline calls kernels through `relax.call_tir`: a kernel's arguments are its inputs in the
order stated here, then its outputs. All shapes are static. Every kernel works for every
m, n, k >= 1.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.kernels.schedule import Op, Schedule
from t3c.core.codes import F32, Grouped, Matrix, Nested
from t3c.core.errors import LoweringError
from t3c.core.grid import ends_of

if TYPE_CHECKING:
    from t3c.codegen.kernels.linear_tiles import CodeLayout

Packed = dict[str, NDArray[np.generic]]
"""Name -> array, in the order in which the kernel takes them. The byte size of each array is a
multiple of 64 (pad), so that every array in the weight file stays 64-byte aligned."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One scheduled function.

    Attributes:
        name: Unique and deterministic: family, operator and all parameters.
        source: TVMScript text of one ``T.prim_func(s_tir=True)`` called ``name``.
        outs: (shape, dtype) of every output; outputs are the last arguments.
        op: What it computes, where it has schedules (kernels/schedule.py); None: it has none.
        schedule: The one that it follows.
    """

    name: str
    source: str
    outs: tuple[tuple[tuple[int, ...], str], ...]
    op: Op | None = None
    schedule: Schedule | None = None


@dataclass(frozen=True, slots=True)
class ConvShape:
    """A 2-D convolution, groups = 1, NCHW: sizes of one kernel."""

    batch: int
    in_channels: int
    out_channels: int
    in_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def out_size(self) -> tuple[int, int]:
        """(height, width) of the output."""
        h, w = (
            (self.in_size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in (0, 1)
        )
        return h, w


@dataclass(frozen=True, slots=True)
class Image:
    """Int8 codes of an image tensor, with a static range, as they travel between convolutions.

    Attributes:
        batch: Images.
        channels: Channels of each image.
        size: (height, width).
        halo: Zeros that readers find around the image, the largest padding of any reader.
        signed: Whether codes are -127..127 rather than 0..255 (after a ReLU).
        bits: Of a code: 8, or 7 where codes are -63..63 or 0..127.
    """

    batch: int
    channels: int
    size: tuple[int, int]
    halo: int
    signed: bool
    bits: int = 8

    @property
    def ends(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return ends_of(self.bits, signed=self.signed)

    @property
    def letters(self) -> str:
        """Kind of code as part of a function name."""
        return ("s" if self.signed else "u") + ("" if self.bits == 8 else str(self.bits))


@dataclass(frozen=True, slots=True)
class Flow:
    """One convolution from codes to codes.

    Attributes:
        shape: Sizes; any stride and dilation.
        source: What it reads; its halo is at least the padding.
        target: Codes that it writes; None: none.
        residual: Codes that the epilogue step "add" adds, with any halo; with None the step adds
            float32 values.
        floats: Whether it writes float32 y [batch, out, oh, ow] (besides the target, if any).
    """

    shape: ConvShape
    source: Image
    target: Image | None
    residual: Image | None = None
    floats: bool = False


class AbstractGroupedKernels(ABC):
    """Linear layers with 4-bit weights, over the codes that an int8 family's `quantize` makes."""

    @abstractmethod
    def pack_dense(self, w: Grouped, bias: F32) -> Packed:
        """Weights of `dense`."""

    @abstractmethod
    def dense(self, m: int, n: int, k: int, epilogue: str = "", *, raw: bool = False) -> Kernel:
        """(codes, scales, *pack_dense, [residual [m, n] f32]) -> y [m, n] f32.

        With `raw` the output is the int32 accumulators of each group, [ceil(k / 64) * m, n].
        """

    @abstractmethod
    def pack_fine(self, w: Nested) -> Packed:
        """The second plane of `nested`; the first is `pack_dense` of its coarse codes."""

    @abstractmethod
    def nested(self, m: int, n: int, k: int, epilogue: str = "", *, raw: bool = False) -> Kernel:
        """(codes, scales, *pack_dense, *pack_fine, [residual [m, n] f32]) -> y [m, n] f32.

        The 8-bit weights of both planes. With `raw` as `dense`.
        """

    @abstractmethod
    def pack_low_rank(self, low: Grouped, high: Grouped, bias: F32) -> Packed:
        """Weights of `low_rank` at the largest rank; every smaller rank reads a prefix."""

    @abstractmethod
    def low_rank(
        self, m: int, n: int, k: int, rank: int, rank_max: int, epilogue: str = ""
    ) -> Kernel:
        """(codes, scales, *pack_low_rank at rank_max, [residual]) -> y [m, n] f32."""


class AbstractLinearKernels(ABC):
    """Int8 linear layers of one ISA: quantize once per input, then dense or low-rank products."""

    name: ClassVar[str]
    rank_step: ClassVar[int]
    """Ranks must be multiples of this."""
    grouped: ClassVar[AbstractGroupedKernels | None] = None
    """Kernels of 4-bit weights over the same codes; None: there are none."""

    @abstractmethod
    def quantize(self, m: int, k: int) -> Kernel:
        """(x [m, k] f32) -> (codes, scales [>= m] f32), codes in this family's own layout."""

    def rows_layout(self, m: int) -> "CodeLayout | None":
        """Layout of the codes of `quantize`, which a norm may then write too; None: it may not."""
        return None

    @abstractmethod
    def pack_dense(self, w: Matrix, bias: F32) -> Packed:
        """Weights of `dense`."""

    @abstractmethod
    def dense(self, m: int, n: int, k: int, epilogue: str = "", *, raw: bool = False) -> Kernel:
        """(codes, scales, *pack_dense, [residual [m, n] f32]) -> y [m, n] f32.

        The residual is an argument only if `epilogue` has the step "add". With `raw` the output is
        the int32 accumulator instead (for tests), and there is no epilogue.
        """

    @abstractmethod
    def pack_low_rank(self, low: Matrix, high: Matrix, bias: F32) -> Packed:
        """Weights of `low_rank` at the largest rank; every smaller rank reads a prefix."""

    @abstractmethod
    def low_rank(
        self, m: int, n: int, k: int, rank: int, rank_max: int, epilogue: str = ""
    ) -> Kernel:
        """(codes, scales, *pack_low_rank at rank_max, [residual]) -> y [m, n] f32.

        Reads the first `rank` components of buffers packed for `rank_max`.
        """


class AbstractConvKernels(ABC):
    """Int8 2-D convolutions of one ISA, NCHW float32 in and out."""

    name: ClassVar[str]
    rank_step: ClassVar[int]

    @abstractmethod
    def quantize(self, shape: ConvShape) -> Kernel:
        """(x [batch, in, h, w] f32) -> (codes in this family's layout, scales [batch] f32)."""

    @abstractmethod
    def pack(self, w: Matrix, bias: F32 | None, shape: ConvShape) -> Packed:
        """Weights of `conv`. `w.q` is [out_max, in_max, kh, kw], at least the shape's channels.

        Packed so that `conv` can run any prefix of the channels (in steps of `rank_step`).
        """

    @abstractmethod
    def conv(
        self,
        shape: ConvShape,
        channels_max: tuple[int, int] | None = None,
        epilogue: str = "",
        *,
        raw: bool = False,
    ) -> Kernel:
        """(codes, scales, *pack, [residual f32, as y]) -> y [batch, out, oh, ow] f32.

        `channels_max` is (out_max, in_max) of the packed weights; None: exactly the shape's.
        """

    static: ClassVar[bool] = False
    """Whether the family has the kernels below: codes with static ranges that flow from one
    convolution to the next. A range is float32 [16]: scale, 1 / scale, the rest unused."""

    activation_bits: ClassVar[int] = 8
    """Bits of the codes that grids should have: fewer where the fastest product would saturate."""

    def buffer(self, image: Image) -> tuple[tuple[int, ...], str]:
        """(shape, dtype) of an image's codes."""
        raise self._dynamic()

    def encode(self, image: Image) -> Kernel:
        """(x f32 NCHW, range) -> codes, clip(rint(x * range[1])), and the zeros of the halo."""
        raise self._dynamic()

    def decode(self, image: Image) -> Kernel:
        """(codes, range) -> x f32 NCHW."""
        raise self._dynamic()

    def flow(
        self,
        flow: Flow,
        channels_max: tuple[int, int] | None = None,
        epilogue: str = "",
        *,
        raw: bool = False,
    ) -> Kernel:
        """(codes, range_in, *pack, [residual, [its range]], [range_out]) -> [codes], [y f32].

        Reads and writes images as they are: nothing is gathered, first layers read `encode`.

        The residual is an argument only if `epilogue` has the step "add", its range only if it is
        codes, `range_out` only with a target. With v = acc * (range_in[0] * scale) + bias and then
        the epilogue's steps, the codes are rint(v * range_out[1]), saturated. With `raw` the only
        output is the int32 accumulator as y, and there is no epilogue.
        """
        raise self._dynamic()

    def max_pool(
        self,
        source: Image,
        target: Image,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Kernel:
        """(codes) -> codes of the target, the largest under each window."""
        raise self._dynamic()

    def average(self, image: Image) -> Kernel:
        """(codes, range) -> means over the pixels, f32 [batch, channels, 1, 1]."""
        raise self._dynamic()

    def _dynamic(self) -> LoweringError:
        return LoweringError(
            f"convolution family {self.name!r} has no static codes; use quantize and conv, or a "
            "family whose `static` is true"
        )
