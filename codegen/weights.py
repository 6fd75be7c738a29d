"""The weight file of an artifact: every tensor that some profile reads, packed once and shared."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.kernels.family import (
    AbstractConvKernels,
    AbstractGroupedKernels,
    AbstractLinearKernels,
    ConvShape,
    Packed,
)
from t3c.core.codes import F32, Correction, Matrix, SiteCodes
from t3c.core.errors import LoweringError
from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2
from t3c.core.sites import ConvSite, LinearSite, Site

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Families:
    """The kernels of one target.

    Attributes:
        linear: Int8 linear kernels.
        conv: Int8 convolution kernels.
        lanes: Float32 lanes of a vector register, for the float kernels.
    """

    linear: AbstractLinearKernels
    conv: AbstractConvKernels
    lanes: int

    def grouped(self) -> AbstractGroupedKernels:
        """The linear kernels of 4-bit weights.

        Raises:
            LoweringError: The linear family has none.
        """
        if self.linear.grouped is None:
            raise LoweringError(
                f"linear family {self.linear.name!r} has no 4-bit kernels; use formats of 8 bits"
            )
        return self.linear.grouped


def conv_shape(site: ConvSite) -> ConvShape:
    """The whole layer as one convolution."""
    return ConvShape(
        batch=site.batch,
        in_channels=site.in_channels,
        out_channels=site.out_channels,
        in_size=site.in_size,
        kernel=site.kernel,
        stride=site.stride,
        padding=site.padding,
        dilation=site.dilation,
    )


@dataclass(frozen=True, slots=True)
class ConvStep:
    """One convolution of a factorized layer.

    Attributes:
        part: Name of its weights within the site.
        shape: Its sizes in this profile.
        channels_max: (out, in) channels of the packed weights.
        codes: Weights at the largest ranks.
        bias: Added to the last step only.
        last: Whether the layer's epilogue follows.
    """

    part: str
    shape: ConvShape
    channels_max: tuple[int, int]
    codes: Matrix
    bias: F32 | None
    last: bool = False


@dataclass(frozen=True, slots=True)
class DepthwiseStep:
    """One float32 convolution of each channel by itself, between the integer ones of CP.

    Attributes:
        part: Name of its weights within the site.
        shape: Its sizes in this profile; in and out channels are the rank.
        weight: [rank_max, 1, kh, kw].
    """

    part: str
    shape: ConvShape
    weight: F32

    @property
    def stored(self) -> int:
        """Channels of the packed weights: whole vectors, so that arrays stay aligned."""
        return -(-len(self.weight) // _ALIGNED) * _ALIGNED

    def pack(self) -> Packed:
        """Weights and a bias of zeros."""
        more = ((0, self.stored - len(self.weight)), (0, 0), (0, 0), (0, 0))
        bias = np.zeros(self.stored, np.float32)
        return {"weight": np.pad(self.weight, more), "bias": bias}


Step = ConvStep | DepthwiseStep
_LINE = 64
_ALIGNED = _LINE // 4
"""Float32 elements in 64 bytes."""


def conv_steps(site: ConvSite, codes: SiteCodes, fmt: Format) -> tuple[Step, ...]:
    """The convolutions that one format of a site runs, in order.

    Before: y = conv(x)
    After:  y = conv(x)                          dense
            y = expand(reduce(x))                lowrank (1x1 windows)
            y = expand(core(reduce(x)))          tucker2
            y = out(wide(tall(in(x))))           cp: integers, float32, float32, integers
    """
    whole = conv_shape(site)
    match fmt:
        case Dense():
            dense = _need(codes.dense, site, fmt)
            full = (site.out_channels, site.in_channels)
            return (ConvStep("dense", whole, full, dense, codes.bias, True),)
        case LowRank():
            low, high = _need(codes.low, site, fmt), _need(codes.high, site, fmt)
            first = _pointwise(whole, site.in_channels, fmt.rank, site.in_size, whole)
            last = _pointwise(whole, fmt.rank, site.out_channels, site.out_size, None)
            rank = low.q.shape[0]
            return (
                ConvStep("low", first, (rank, site.in_channels), _as_conv(low), None),
                ConvStep("high", last, (site.out_channels, rank), _as_conv(high), codes.bias, True),
            )
        case Tucker2():
            reduce, core, expand = (
                _need(m, site, fmt) for m in (codes.reduce, codes.core, codes.expand)
            )
            first = _pointwise(whole, site.in_channels, fmt.rank_in, site.in_size, None)
            middle = ConvShape(
                batch=site.batch,
                in_channels=fmt.rank_in,
                out_channels=fmt.rank_out,
                in_size=site.in_size,
                kernel=site.kernel,
                stride=site.stride,
                padding=site.padding,
                dilation=site.dilation,
            )
            last = _pointwise(whole, fmt.rank_out, site.out_channels, site.out_size, None)
            r_out, r_in = core.q.shape[:2]
            return (
                ConvStep("reduce", first, (r_in, site.in_channels), _as_conv(reduce), None),
                ConvStep("core", middle, (r_out, r_in), core, None),
                ConvStep(
                    "expand", last, (site.out_channels, r_out), _as_conv(expand), codes.bias, True
                ),
            )
        case CP():
            inner, outer = _need(codes.cp_in, site, fmt), _need(codes.cp_out, site, fmt)
            tall, wide = _need(codes.cp_tall, site, fmt), _need(codes.cp_wide, site, fmt)
            first = _pointwise(whole, site.in_channels, fmt.rank, site.in_size, None)
            down = _axis(whole, fmt.rank, site.in_size, 0)
            across = _axis(whole, fmt.rank, (site.out_size[0], site.in_size[1]), 1)
            last = _pointwise(whole, fmt.rank, site.out_channels, site.out_size, None)
            rank = inner.q.shape[0]
            return (
                ConvStep("cp_in", first, (rank, site.in_channels), _as_conv(inner), None),
                DepthwiseStep("cp_tall", down, tall[:, None, :, None]),
                DepthwiseStep("cp_wide", across, wide[:, None, None, :]),
                ConvStep(
                    "cp_out", last, (site.out_channels, rank), _as_conv(outer), codes.bias, True
                ),
            )


def _pointwise(
    like: ConvShape, c_in: int, c_out: int, size: tuple[int, int], window: ConvShape | None
) -> ConvShape:
    """A 1x1 convolution; stride and padding from `window`, or none."""
    return ConvShape(
        batch=like.batch,
        in_channels=c_in,
        out_channels=c_out,
        in_size=size,
        kernel=(1, 1),
        stride=window.stride if window else (1, 1),
        padding=window.padding if window else (0, 0),
        dilation=(1, 1),
    )


def _axis(like: ConvShape, rank: int, size: tuple[int, int], axis: int) -> ConvShape:
    """A depthwise convolution along one axis, with that axis' share of the window."""

    def along(pair: tuple[int, int], other: int) -> tuple[int, int]:
        return (pair[0], other) if axis == 0 else (other, pair[1])

    return ConvShape(
        batch=like.batch,
        in_channels=rank,
        out_channels=rank,
        in_size=size,
        kernel=along(like.kernel, 1),
        stride=along(like.stride, 1),
        padding=along(like.padding, 0),
        dilation=along(like.dilation, 1),
    )


def _as_conv(m: Matrix) -> Matrix:
    return Matrix(m.q.reshape(*m.q.shape, 1, 1), m.scale)


def _need(m: _T | None, site: Site, fmt: Format) -> _T:
    if m is None:
        raise LoweringError(f"site {site.name!r}: no weights were made for format {fmt}")
    return m


@dataclass(slots=True)
class WeightStore:
    """Packs the parts of sites on first use.

    Attributes:
        sites: Site name -> site.
        codes: Site name -> integer weights at the largest ranks in use.
        families: Kernels, which know their packing.
        corrections: Profile name -> site name -> what the profile changes of its outputs.
        tensors: Tensor name -> array, in the order of first use.
    """

    sites: Mapping[str, Site]
    codes: Mapping[str, SiteCodes]
    families: Families
    corrections: Mapping[str, Mapping[str, Correction]] = field(default_factory=dict)
    tensors: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    _parts: dict[tuple[str, str], Packed] = field(default_factory=dict)
    _alone: dict[tuple[str, Format], dict[str, tuple[int, ...]]] = field(default_factory=dict)

    def parameter(self, name: str, value: NDArray[np.generic]) -> str:
        """Keep a parameter that no site owns (an embedding, a norm's gain)."""
        self.tensors.setdefault(name, value)
        return name

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """Keep an array that the graph holds; a short one is padded, so that no load copies it."""
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        return self.parameter(
            name, np.pad(flat, (0, -flat.size % _LINE)) if flat.size % _LINE else value
        )

    def names(self, site: str, fmt: Format, profile: str = "") -> tuple[str, ...]:
        """Tensors that `fmt` of `site` reads, in the order in which its kernels take them.

        Where `profile` corrects the site, scale and bias of the last factor are its own; the codes
        are everyone's.
        """
        packers = self._packers(site, fmt)
        read = {
            f"{site}:{part}.{name}": value
            for part, pack in packers
            for name, value in self._part(site, part, pack).items()
        }
        correction = self.corrections.get(profile, {}).get(site)
        if correction is not None:
            part = packers[-1][0]
            own = self._corrected(site, fmt, profile, correction)
            read = {
                (f"{k}@{profile}" if (name := k.removeprefix(f"{site}:{part}.")) in own else k): (
                    own.get(name, v)
                )
                for k, v in read.items()
            }
        for name, value in read.items():
            self.tensors.setdefault(name, value)
        return tuple(read)

    def _part(self, site: str, part: str, pack: Callable[[], Packed]) -> Packed:
        key = (site, part)
        if key not in self._parts:
            self._parts[key] = pack()
        return self._parts[key]

    def _corrected(self, name: str, fmt: Format, profile: str, correction: Correction) -> Packed:
        """Scale and bias of the last step of a convolution, packed for one profile."""
        key = (name, f"@{profile}")
        if key not in self._parts:
            site = self.sites[name]
            if not isinstance(site, ConvSite):
                raise LoweringError(f"site {name!r} is linear; only convolutions are corrected")
            last = conv_steps(site, self.codes[name], fmt)[-1]
            assert isinstance(last, ConvStep)
            step = replace(last, codes=correction.scaled(last.codes), bias=correction.bias)
            packed = _pack(step, self.families.conv, exact=False)
            self._parts[key] = {part: packed[part] for part in ("scale", "bias")}
        return self._parts[key]

    def _packers(
        self, name: str, fmt: Format, *, exact: bool = False
    ) -> list[tuple[str, Callable[[], Packed]]]:
        """(part, packing) of a format; `exact` packs only the ranks that this format reads."""
        site, codes, linear, conv = (
            self.sites[name], self.codes[name], self.families.linear, self.families.conv,
        )  # fmt: skip
        if isinstance(site, ConvSite):
            return [
                (s.part, partial(_pack, s, conv, exact=exact)) for s in conv_steps(site, codes, fmt)
            ]
        match fmt:
            case Dense(bits=4):
                four, whole = self.families.grouped(), _need(codes.dense4, site, fmt)
                return [("dense4", lambda: four.pack_dense(whole, codes.bias))]
            case LowRank(bits=4):
                four = self.families.grouped()
                thin, wide = _need(codes.low4, site, fmt), _need(codes.high4, site, fmt)
                if exact:
                    thin, wide = thin.prefix(rows=fmt.rank), wide.prefix(cols=fmt.rank)
                return [("factors4", lambda: four.pack_low_rank(thin, wide, codes.bias))]
            case Dense() if codes.nested is not None:
                four, nested = self.families.grouped(), codes.nested
                return [
                    ("dense4", lambda: four.pack_dense(nested.coarse, codes.bias)),
                    ("fine", lambda: four.pack_fine(nested)),
                ]
            case Dense():
                dense = _need(codes.dense, site, fmt)
                return [("dense", lambda: linear.pack_dense(dense, codes.bias))]
            case LowRank():
                low, high = _need(codes.low, site, fmt), _need(codes.high, site, fmt)
                if exact:
                    low, high = low.prefix(rows=fmt.rank), high.prefix(cols=fmt.rank)
                return [("factors", lambda: linear.pack_low_rank(low, high, codes.bias))]
            case _:
                raise LoweringError(f"site {name!r} is linear; {fmt} is a convolution format")

    def bytes(self, name: str, fmt: Format) -> int:
        """Bytes that a file with only this format of the site would hold: packed and counted."""
        return sum(size for size, *_ in self._packed_alone(name, fmt).values())

    def reads(self, name: str, fmt: Format) -> dict[str, int]:
        """Tensor name -> bytes that the format reads at its front, where the rest is not read.

        Kernels of one rank walk the outermost axis up to it: where only that axis of an array is
        longer than of one packed for this rank alone, the rest belongs to larger ranks.
        """
        found = {}
        for part, pack in self._packers(name, fmt):
            for array, whole in self._part(name, part, pack).items():
                tensor = f"{name}:{part}.{array}"
                size, *shape = self._packed_alone(name, fmt)[tensor]
                if size < whole.nbytes and tuple(shape[1:]) == whole.shape[1:]:
                    found[tensor] = size
        return found

    def _packed_alone(self, name: str, fmt: Format) -> dict[str, tuple[int, ...]]:
        """Tensor name -> (bytes, *shape) of arrays that are packed for this format alone."""
        key = (name, fmt)
        if key not in self._alone:
            self._alone[key] = {
                f"{name}:{part}.{array}": (value.nbytes, *value.shape)
                for part, pack in self._packers(name, fmt, exact=True)
                for array, value in pack().items()
            }
        return self._alone[key]


def _pack(step: Step, conv: AbstractConvKernels, *, exact: bool) -> Packed:
    """All channels that are stored, or (`exact`) only those that the step reads."""
    outputs, inputs = step.shape.out_channels, step.shape.in_channels
    if isinstance(step, DepthwiseStep):
        cut = replace(step, weight=step.weight[:outputs]) if exact else step
        return cut.pack()
    codes = step.codes.prefix(rows=outputs, cols=inputs) if exact else step.codes
    return conv.pack(codes, step.bias, step.shape)


def rank_max(site: LinearSite, codes: SiteCodes, fmt: LowRank) -> int:
    """The rank for which a linear site's factors of a width are packed."""
    if fmt.bits == 4:
        return len(_need(codes.low4, site, fmt).q)
    return len(_need(codes.low, site, fmt).q)
