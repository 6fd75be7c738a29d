"""The family ``generic``: no kernels, only packing; sites become tensor expressions.

A target that names it gets every profile on the day that TVM can build for it. Speed comes with a
family of its own.
"""

from functools import partial
from math import prod
from typing import Any, ClassVar, Never, final

from t3c.codegen import generic_ops as ops
from t3c.codegen.expand import Body, ProfileBuilder, called
from t3c.codegen.import_graph import SiteCall
from t3c.codegen.kernels.emit import epilogue_steps
from t3c.codegen.kernels.family import (
    AbstractConvKernels,
    AbstractLinearKernels,
    ConvShape,
    Kernel,
    Packed,
)
from t3c.codegen.weights import DepthwiseStep, conv_steps
from t3c.core.codes import F32, Matrix
from t3c.core.errors import LoweringError
from t3c.core.formats import Format, LowRank
from t3c.core.sites import ConvSite, LinearSite

RANK_STEP = 16


def _none(what: str) -> Never:
    raise LoweringError(f"the family 'generic' has no {what} kernel; GenericBuilder expands it")


@final
class GenericLinear(AbstractLinearKernels):
    """Weights as they are: codes [n, k], steps, bias."""

    name: ClassVar[str] = "generic"
    rank_step: ClassVar[int] = RANK_STEP

    def quantize(self, m: int, k: int) -> Kernel:
        """There is none."""
        _none("quantize")

    def pack_dense(self, w: Matrix, bias: F32) -> Packed:
        """Codes, steps, bias."""
        return {"weight": w.q, "scale": w.scale, "bias": bias}

    def dense(self, m: int, n: int, k: int, epilogue: str = "", *, raw: bool = False) -> Kernel:
        """There is none."""
        _none("dense")

    def pack_low_rank(self, low: Matrix, high: Matrix, bias: F32) -> Packed:
        """Codes and steps of both factors, bias."""
        return {
            "low": low.q,
            "low_scale": low.scale,
            "high": high.q,
            "high_scale": high.scale,
            "bias": bias,
        }

    def low_rank(
        self, m: int, n: int, k: int, rank: int, rank_max: int, epilogue: str = ""
    ) -> Kernel:
        """There is none."""
        _none("low-rank")


@final
class GenericConv(AbstractConvKernels):
    """Weights as they are: codes [out, in, kh, kw], steps, bias."""

    name: ClassVar[str] = "generic"
    rank_step: ClassVar[int] = RANK_STEP

    def quantize(self, shape: ConvShape) -> Kernel:
        """There is none."""
        _none("quantize")

    def pack(self, w: Matrix, bias: F32 | None, shape: ConvShape) -> Packed:
        """Codes, steps and, if there is one, bias."""
        packed: Packed = {"weight": w.q, "scale": w.scale}
        return packed if bias is None else {**packed, "bias": bias}

    def conv(
        self,
        shape: ConvShape,
        channels_max: tuple[int, int] | None = None,
        epilogue: str = "",
        *,
        raw: bool = False,
    ) -> Kernel:
        """There is none."""
        _none("convolution")


class GenericBuilder(ProfileBuilder):
    """Writes profiles whose sites are tensor expressions; to be scheduled afterwards."""

    def body(self, names: list[str], weights: Any, formats: Any) -> Body:
        """See `ProfileBuilder.body`."""
        return _GenericBody(self, names, weights, formats)


class _GenericBody(Body):
    """Expands sites by `generic_ops`."""

    def linear(self, site: LinearSite, fmt: Format, what: SiteCall, args: list[Any]) -> Any:
        """See `Body.linear`."""
        rows = prod(what.out_shape[:-1])
        steps = epilogue_steps(what.epilogue)
        weights = [self.weight(n) for n in self.names(site, fmt)]
        x, shape = args[0], (rows, site.k)
        extra = [self.reshape(a, (rows, site.n)) for a in args[1:]]
        if isinstance(fmt, LowRank):
            low, low_scale, *weights = weights
            x = self.builder.emit_te(
                ops.product, *self.codes(x, shape), low, low_scale, n=fmt.rank, bias=False, steps=()
            )
            shape = (rows, fmt.rank)
        y = self.builder.emit_te(
            ops.product, *self.codes(x, shape), *weights, *extra, n=site.n, bias=True, steps=steps
        )
        return self.reshape(y, what.out_shape)

    def conv(self, site: ConvSite, fmt: Format, what: SiteCall, args: list[Any]) -> Any:
        """See `Body.conv`."""
        store = self.owner.store
        names = self.names(site, fmt)
        y = args[0]
        for step in conv_steps(called(site, y, what), store.codes[site.name], fmt):
            weights = [self.weight(n) for n in names if n.startswith(f"{site.name}:{step.part}.")]
            s = step.shape
            if isinstance(step, DepthwiseStep):
                x = self.reshape(y, (s.batch, s.in_channels, *s.in_size))
                depthwise = partial(ops.depthwise, shape=s)  # emit_te takes no such keyword
                y = self.builder.emit_te(depthwise, x, weights[0], primfunc_name_hint="depthwise")
                continue
            convolution = partial(
                ops.convolution,
                shape=s,
                bias=step.bias is not None,
                steps=epilogue_steps(what.epilogue) if step.last else (),
            )
            codes = self.codes(y, (s.batch, s.in_channels, *s.in_size))
            extra = args[1:] if step.last else []
            y = self.builder.emit_te(
                convolution, *codes, *weights, *extra, primfunc_name_hint="convolution"
            )
        return self.reshape(y, what.out_shape)

    def codes(self, x: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """Codes and steps of x as `shape`, one step for each slice of its first axis; made once."""
        key = (x, f"generic{shape}")
        if key not in self.quantized:
            x = self.reshape(x, shape)
            peak = self.builder.emit_te(ops.peaks, x)
            made = self.builder.emit_te(ops.codes, x, peak), self.builder.emit_te(ops.scales, peak)
            self.quantized[key] = made
        return self.quantized[key][0], self.quantized[key][1]
