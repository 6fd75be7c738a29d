"""The elastic convolution."""

from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from t3c.core.formats import CP, Dense, Format, LowRank, Tucker2
from t3c.core.sites import ConvSite
from t3c.elastic import fake_quant
from t3c.elastic.factorize.cp import CP_ALS
from t3c.elastic.layer import INPUT, ElasticLayer


@final
class ElasticConv(ElasticLayer):
    """A 2-D convolution, dense, low rank (1x1 windows), Tucker-2 or CP, in float or on integers.

    Every step of a factorized form quantizes its input again: on the fixed grids of `grids`, or
    with one scale per image where there are none. A strided 1x1 window strides in the first of its
    two steps, a Tucker-2 in its core, a CP in its middle.
    """

    site: ConvSite

    def __init__(
        self, site: ConvSite, weight: Tensor, bias: Tensor | None = None, kxk: str = "tucker2"
    ) -> None:
        """Take over weight [out, in, kh, kw] and bias [out].

        Args:
            site: Shape and geometry.
            weight: Dense weight.
            bias: Bias, or None.
            kxk: What windows above 1x1 factorize into by default: ``tucker2`` or ``cp``.
        """
        if tuple(weight.shape) != (site.out_channels, site.in_channels, *site.kernel):
            raise ValueError(
                f"site {site.name!r}: {site} does not fit weight {tuple(weight.shape)}"
            )
        if kxk not in ("tucker2", "cp"):
            raise ValueError(f"kxk is {kxk!r}; allowed are 'tucker2' and 'cp'")
        super().__init__(site, weight, bias)
        self.kxk = kxk

    def check(self, fmt: Format) -> None:
        """As the base; a 1x1 window takes low rank, not Tucker-2 or CP."""
        if self.site.pointwise and isinstance(fmt, Tucker2 | CP):
            raise ValueError(f"site {self.site.name!r} has a 1x1 window; {fmt} needs a larger one")
        super().check(fmt)

    def most(self, fmt: Format) -> tuple[int, int]:
        """What the factors reach, or would: (in, out) channels for Tucker-2."""
        match fmt:
            case Tucker2():
                return (
                    self.reach("reduce", self.site.in_channels),
                    self.reach("expand", self.site.out_channels, 1),
                )
            case CP():
                rank = self.reach("cp_in", self._cp_rank())
                return rank, rank
            case _:
                rank = self.reach("low", self.site.full_rank)
                return rank, rank

    def factorizer(self, kind: type[Format]) -> str:
        """By the format's kind."""
        names: dict[type[Format], str] = {LowRank: self.thin, Tucker2: "tucker2", CP: "cp"}
        return names[kind]

    def _cp_rank(self) -> int:
        """The largest CP rank worth fitting: above it the dense weight is smaller."""
        return max(1, int(CP_ALS.break_even(tuple(self.weight.shape))))

    def fit_ranks(self, kind: type[Format]) -> tuple[int, ...] | None:
        """For CP, whose components depend on their number, the largest worth fitting."""
        return (self._cp_rank(),) if kind is CP else None

    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        out, channels, (kh, kw) = self.site.out_channels, self.site.in_channels, self.site.kernel
        if self.site.pointwise:
            return {"low": (None, channels), "high": (out, None)}
        return {
            "reduce": (None, channels),
            "core": (None, None, kh, kw),
            "expand": (out, None),
            "cp_in": (None, channels),
            "cp_tall": (None, kh),
            "cp_wide": (None, kw),
            "cp_out": (out, None),
        }

    def _smooth(self, x: Tensor, fmt: Format | None) -> Tensor:
        y = self._plain(x, fmt)
        if self.correction is None:
            return y
        gain = torch.from_numpy(self.correction.gain).to(x.device)[:, None, None]
        shift = torch.from_numpy(self.correction.bias).to(x.device)
        if self.bias is not None:
            shift = shift - gain[:, 0, 0] * self.bias
        return y * gain + shift[:, None, None]

    def _plain(self, x: Tensor, fmt: Format | None) -> Tensor:
        """In float, before any correction."""
        s = self.site
        match fmt:
            case LowRank():
                y = self._low(x, fmt.rank)
                return functional.conv2d(
                    y, _pointwise(self.factor("high")[:, : fmt.rank]), self.bias
                )
            case Tucker2():
                y = self._core(self._reduce(x, fmt.rank_in), fmt.rank_out, fmt.rank_in)
                last = self.factor("expand")[:, : fmt.rank_out]
                return functional.conv2d(y, _pointwise(last), self.bias)
            case CP():
                y = functional.conv2d(x, _pointwise(self.factor("cp_in")[: fmt.rank]))
                y = self._separable(y, fmt.rank)
                last = self.factor("cp_out")[:, : fmt.rank]
                return functional.conv2d(y, _pointwise(last), self.bias)
            case _:
                return functional.conv2d(x, self.weight, self.bias, s.stride, s.padding, s.dilation)

    def _low(self, x: Tensor, rank: int) -> Tensor:
        s = self.site
        return functional.conv2d(
            x, _pointwise(self.factor("low")[:rank]), None, s.stride, s.padding
        )

    def _reduce(self, x: Tensor, rank: int) -> Tensor:
        return functional.conv2d(x, _pointwise(self.factor("reduce")[:rank]))

    def _core(self, y: Tensor, rank_out: int, rank_in: int) -> Tensor:
        s = self.site
        core = self.factor("core")[:rank_out, :rank_in]
        return functional.conv2d(y, core, None, s.stride, s.padding, s.dilation)

    @torch.no_grad()
    def inner(self, x: Tensor) -> dict[str, Tensor]:
        """Float outputs of the inner steps of factors that exist, at their largest rank.

        Args:
            x: Input [batch, in, height, width].

        Returns:
            Factor name -> output of its step.
        """
        if self.reach("low", 0):
            return {"low": self._low(x, self.reach("low", 0))}
        if self.reach("reduce", 0):
            first = self._reduce(x, self.reach("reduce", 0))
            rank_out = self.reach("core", 0)
            return {"reduce": first, "core": self._core(first, rank_out, first.shape[1])}
        return {}

    def _separable(self, y: Tensor, rank: int) -> Tensor:
        """The two depthwise steps of CP, float in every format: down the height, then the width."""
        s = self.site
        tall = self.factor("cp_tall")[:rank, None, :, None]
        wide = self.factor("cp_wide")[:rank, None, None, :]
        y = functional.conv2d(
            y, tall, None, (s.stride[0], 1), (s.padding[0], 0), (s.dilation[0], 1), rank
        )
        return functional.conv2d(
            y, wide, None, (1, s.stride[1]), (0, s.padding[1]), (1, s.dilation[1]), rank
        )

    def _integer(self, x: Tensor, fmt: Format) -> Tensor:
        s = self.site
        x = x.detach()
        bias = None if self.bias is None else self.bias.detach()
        gain: Tensor | None = None
        if self.correction is not None:
            gain = torch.from_numpy(self.correction.gain).to(x.device)
            bias = torch.from_numpy(self.correction.bias).to(x.device)

        def last(codes: fake_quant.Codes) -> fake_quant.Codes:
            return codes if gain is None else (codes[0], codes[1] * gain)

        def cut(name: str, rows: int | None, cols: int | None) -> fake_quant.Codes:
            q, scale = self.codes_of(name, fmt.bits)
            part = q[:rows, :cols].contiguous()
            return part if part.dim() == 4 else _pointwise(part), scale[:rows]

        grid, after = self.grids.get(INPUT), self.grids.get
        window = (s.stride, s.padding, s.dilation)
        match fmt:
            case Dense():
                whole = last(self.codes_of("weight", fmt.bits))
                return fake_quant.conv2d(x, whole, bias, *window, grid=grid)
            case LowRank():
                y = fake_quant.conv2d(x, cut("low", fmt.rank, None), None, *window, grid=grid)
                high = last(cut("high", None, fmt.rank))
                return fake_quant.conv2d(y, high, bias, grid=after("low"))
            case Tucker2():
                y = fake_quant.conv2d(x, cut("reduce", fmt.rank_in, None), grid=grid)
                core = cut("core", fmt.rank_out, fmt.rank_in)
                y = fake_quant.conv2d(y, core, None, *window, grid=after("reduce"))
                expand = last(cut("expand", None, fmt.rank_out))
                return fake_quant.conv2d(y, expand, bias, grid=after("core"))
            case CP():
                y = fake_quant.conv2d(x, cut("cp_in", fmt.rank, None), grid=grid)
                y = self._separable(y, fmt.rank).detach()
                return fake_quant.conv2d(y, last(cut("cp_out", None, fmt.rank)), bias)


def _pointwise(w: Tensor) -> Tensor:
    """[out, in] as a 1x1 window."""
    return w[:, :, None, None]
