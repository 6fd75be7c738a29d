"""What the convolution families of x86 share: codes channels last, and everything but the product.

Dynamic convolutions read signed codes with one scale for each image, and write float32 planes;
flows read and write codes with static ranges. The product is the same.
"""

from abc import abstractmethod
from typing import ClassVar

from t3c.codegen.kernels import conv_flow, image_codes
from t3c.codegen.kernels.conv_flow import RANK_STEP, Depth, Output
from t3c.codegen.kernels.emit import (
    LANES,
    Emitter,
    buffer,
    ceil_div,
    epilogue_steps,
    kernel_name,
    lanes,
)
from t3c.codegen.kernels.family import (
    AbstractConvKernels,
    ConvShape,
    Flow,
    Image,
    Kernel,
)
from t3c.codegen.kernels.image_codes import PARALLEL_ELEMENTS, RANGE, Encoder, Grid
from t3c.codegen.kernels.schedule import Op, Schedule, epilogue_class

_SIZES = (("k", "kernel"), ("s", "stride"), ("p", "padding"), ("d", "dilation"))


KINDS = ("conv", "planes")
"""Operators: convolutions that write codes only, and those that write float32 planes."""


def op_of(shape: ConvShape, epilogue: str, kind: str = "conv") -> Op:
    """The operator of a convolution, for records."""
    sizes = {"b": shape.batch, "c": shape.in_channels, "o": shape.out_channels}
    sizes |= {"h": shape.in_size[0], "w": shape.in_size[1]}
    for letter, field in _SIZES:
        tall, wide = getattr(shape, field)
        sizes |= {f"{letter}h": tall, f"{letter}w": wide}
    return Op.of(kind, epilogue_class(epilogue), **sizes)


def shape_of(op: Op) -> ConvShape:
    """The sizes of an operator."""
    pairs = ((op[f"{letter}h"], op[f"{letter}w"]) for letter, _ in _SIZES)
    return ConvShape(op["b"], op["c"], op["o"], (op["h"], op["w"]), *pairs)


def source_of(shape: ConvShape) -> Image:
    """The signed codes that a dynamic convolution reads."""
    return Image(shape.batch, shape.in_channels, shape.in_size, max(shape.padding), True)


class AbstractX86Conv(AbstractConvKernels):
    """A family that differs from the others of x86 in its product only."""

    rank_step: ClassVar[int] = RANK_STEP
    static: ClassVar[bool] = True
    wide: ClassVar[bool]
    """Whether the epilogue has the instructions of AVX-512."""

    @abstractmethod
    def product(
        self, output: Output, depth: Depth, most: tuple[int, int], epilogue: str
    ) -> tuple[Op, Schedule, str] | None:
        """Write the body of a convolution; gives operator, schedule and the end of its name.

        None where the family has no schedules.

        Args:
            output: What happens to finished sums; knows the flow.
            depth: The sum of one output.
            most: Channels (out, in) of the packed weights.
            epilogue: Of the operator.
        """

    def quantize(self, shape: ConvShape) -> Kernel:
        """(x) -> (codes, scales)."""
        conv_flow.check_shape(shape)
        grid, e = Grid(source_of(shape)), Emitter()
        inverse = emit_peaks(e, shape)
        size = shape.batch * shape.in_channels * shape.in_size[0] * shape.in_size[1]
        threads = size >= PARALLEL_ELEMENTS
        Encoder(e, grid, "codes").write(lambda b: f"{inverse}[{b}]", threads)
        params = (
            buffer("x", (shape.batch, shape.in_channels, *shape.in_size), "float32"),
            grid.parameter("codes"),
            buffer("scales", (shape.batch,), "float32"),
        )
        name = f"conv_quantize_{grid.tag()}"
        outs = (grid.out(), ((shape.batch,), "float32"))
        return Kernel(name, e.function(name, params), outs)

    def conv(
        self,
        shape: ConvShape,
        channels_max: tuple[int, int] | None = None,
        epilogue: str = "",
        *,
        raw: bool = False,
    ) -> Kernel:
        """(codes, scales, weight, start, scale, bias, [residual]) -> y."""
        flow = Flow(shape, source_of(shape), None, None, True)
        return self._convolution(flow, channels_max, epilogue, raw, dynamic=True)

    def buffer(self, image: Image) -> tuple[tuple[int, ...], str]:
        """(shape, dtype) of an image's codes."""
        return Grid(image).out()

    def encode(self, image: Image) -> Kernel:
        """(x, range) -> codes."""
        return image_codes.encode(image)

    def decode(self, image: Image) -> Kernel:
        """(codes, range) -> x."""
        return image_codes.decode(image)

    def flow(
        self,
        flow: Flow,
        channels_max: tuple[int, int] | None = None,
        epilogue: str = "",
        *,
        raw: bool = False,
    ) -> Kernel:
        """(codes, range_in, *pack, [residual, [its range]], [range_out]) -> [codes], [y]."""
        return self._convolution(flow, channels_max, epilogue, raw, dynamic=False)

    def max_pool(
        self,
        source: Image,
        target: Image,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Kernel:
        """(codes) -> codes of the target."""
        return image_codes.max_pool(source, target, kernel, stride, padding)

    def average(self, image: Image) -> Kernel:
        """(codes, range) -> means over the pixels."""
        return image_codes.average(image)

    def _convolution(
        self,
        flow: Flow,
        channels_max: tuple[int, int] | None,
        epilogue: str,
        raw: bool,
        *,
        dynamic: bool,
    ) -> Kernel:
        s = flow.shape
        conv_flow.check(flow)
        most = channels_max or (s.out_channels, s.in_channels)
        e = Emitter()
        scale = (lambda b: f"scales[{b}]") if dynamic else (lambda b: "range_in[0]")
        steps = epilogue_steps(epilogue)
        output = Output(e, flow, () if raw else steps, raw, self.wide, scale)
        output.prepare()
        made = self.product(output, Depth.of(s, most[1]), most, epilogue)
        first = buffer("scales", (s.batch,), "float32")
        params = [
            Grid(flow.source).parameter("codes"),
            first if dynamic else buffer("range_in", (RANGE,), "float32"),
            *conv_flow.packed_parameters(s, most),
            *output.parameters(),
        ]
        kind = self.name.removeprefix("x86-")
        told = "raw" if raw else "_".join(steps)
        mode = "dynamic" if dynamic else "flow"
        name = kernel_name(
            f"{kind}_{mode}", conv_flow.tag(flow, most), told, made[2] if made else ""
        )
        chosen = made[:2] if made else (None, None)
        return Kernel(name, e.function(name, params), output.outs(), *chosen)


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
