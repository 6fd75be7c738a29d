"""A convolution family of plain loops: what the graph side calls, readable, on any processor."""

from typing import ClassVar, final

from t3c.codegen.kernels.conv_portable import PortableConv
from t3c.codegen.kernels.emit import Emitter, buffer, epilogue_steps
from t3c.codegen.kernels.family import (
    AbstractConvKernels,
    ConvShape,
    Flow,
    Image,
    Kernel,
    Packed,
)
from t3c.core.codes import F32, Matrix

Pair = tuple[int, int]


def _tag(image: Image | None) -> str:
    if image is None:
        return "none"
    size = "x".join(map(str, (image.batch, image.channels, *image.size)))
    return f"{size}h{image.halo}{'s' if image.signed else 'u'}"


def _limits(image: Image) -> Pair:
    return (-127, 127) if image.signed else (0, 255)


@final
class PlainConv(AbstractConvKernels):
    """Codes are int16, NCHW with zeros around."""

    name: ClassVar[str] = "plain"
    rank_step: ClassVar[int] = 16
    static: ClassVar[bool] = True

    def quantize(self, shape: ConvShape) -> Kernel:
        return PortableConv().quantize(shape)

    def conv(
        self,
        shape: ConvShape,
        channels_max: Pair | None = None,
        epilogue: str = "",
        *,
        raw: bool = False,
    ) -> Kernel:
        return PortableConv().conv(shape, channels_max, epilogue, raw=raw)

    def pack(self, w: Matrix, bias: F32 | None, shape: ConvShape) -> Packed:
        return PortableConv().pack(w, bias, shape)

    def buffer(self, image: Image) -> tuple[tuple[int, ...], str]:
        h, w = (n + 2 * image.halo for n in image.size)
        return (image.batch, image.channels, h, w), "int16"

    def _image(self, name: str, image: Image) -> str:
        return buffer(name, *self.buffer(image))

    def encode(self, image: Image) -> Kernel:
        e = Emitter()
        shape, dtype = self.buffer(image)
        low, high = _limits(image)
        with (
            e.loop("b", image.batch) as b,
            e.loop("c", image.channels) as c,
            e.loop("i", shape[2]) as i,
            e.loop("j", shape[3]) as j,
        ):
            e(f"codes[{b}, {c}, {i}, {j}] = T.int16(0)")
        with (
            e.loop("b", image.batch) as b,
            e.loop("c", image.channels) as c,
            e.loop("i", image.size[0]) as i,
            e.loop("j", image.size[1]) as j,
        ):
            q = f"T.nearbyint(x[{b}, {c}, {i}, {j}] * range[1])"
            q = f"T.min(T.max({q}, T.float32({low}.0)), T.float32({high}.0))"
            at = f"{b}, {c}, {i} + {image.halo}, {j} + {image.halo}"
            e(f'codes[{at}] = T.cast({q}, "int16")')
        params = (
            buffer("x", (image.batch, image.channels, *image.size), "float32"),
            buffer("range", (16,), "float32"),
            self._image("codes", image),
        )
        name = f"plain_encode_{_tag(image)}"
        return Kernel(name, e.function(name, params), ((shape, dtype),))

    def decode(self, image: Image) -> Kernel:
        e = Emitter()
        shape = (image.batch, image.channels, *image.size)
        with (
            e.loop("b", image.batch) as b,
            e.loop("c", image.channels) as c,
            e.loop("i", image.size[0]) as i,
            e.loop("j", image.size[1]) as j,
        ):
            code = f"codes[{b}, {c}, {i} + {image.halo}, {j} + {image.halo}]"
            e(f'x[{b}, {c}, {i}, {j}] = T.cast({code}, "float32") * range[0]')
        params = (
            self._image("codes", image),
            buffer("range", (16,), "float32"),
            buffer("x", shape, "float32"),
        )
        name = f"plain_decode_{_tag(image)}"
        return Kernel(name, e.function(name, params), ((shape, "float32"),))

    def max_pool(
        self, source: Image, target: Image, kernel: Pair, stride: Pair, padding: Pair
    ) -> Kernel:
        e = Emitter()
        shape, dtype = self.buffer(target)
        (h, w), halo = source.size, source.halo
        with (
            e.loop("b", target.batch) as b,
            e.loop("c", target.channels) as c,
            e.loop("i", shape[2]) as i,
            e.loop("j", shape[3]) as j,
        ):
            e(f"to[{b}, {c}, {i}, {j}] = T.int16(0)")
        with (
            e.loop("b", target.batch) as b,
            e.loop("c", target.channels) as c,
            e.loop("i", target.size[0]) as i,
            e.loop("j", target.size[1]) as j,
        ):
            at = f"to[{b}, {c}, {i} + {target.halo}, {j} + {target.halo}]"
            e(f"{at} = T.int16(-127)")
            with e.loop("k", kernel[0]) as k, e.loop("l", kernel[1]) as m:
                row = e.let("row", f"{i} * {stride[0]} + {k} - {padding[0]}")
                column = e.let("column", f"{j} * {stride[1]} + {m} - {padding[1]}")
                with e.block(
                    f"if {row} >= 0 and {row} < {h} and {column} >= 0 and {column} < {w}:"
                ):
                    e(f"{at} = T.max({at}, codes[{b}, {c}, {row} + {halo}, {column} + {halo}])")
        params = (self._image("codes", source), self._image("to", target))
        window = "_".join(f"{a}x{b}" for a, b in (kernel, stride, padding))
        name = f"plain_pool_{_tag(source)}_{_tag(target)}_{window}"
        return Kernel(name, e.function(name, params), ((shape, dtype),))

    def flow(
        self,
        flow: Flow,
        channels_max: Pair | None = None,
        epilogue: str = "",
        *,
        raw: bool = False,
    ) -> Kernel:
        assert not raw
        s, e, steps = flow.shape, Emitter(), epilogue_steps(epilogue)
        most = channels_max or (s.out_channels, s.in_channels)
        step = 16 if most[1] >= 16 else 4
        packed = -(-most[1] // step) * step
        shape = (s.batch, s.out_channels, *s.out_size)
        floats: list[tuple[tuple[int, ...], str]] = [(shape, "float32")]
        outs = [self.buffer(flow.target)] if flow.target else []
        outs += floats if flow.floats else []
        count = -(-most[0] * s.kernel[0] * s.kernel[1] * packed // 64) * 64
        columns = -(-most[0] // 16) * 16
        params = [
            self._image("codes", flow.source),
            buffer("range_in", (16,), "float32"),
            buffer("weight", (count,), "int8"),
            buffer("wscale", (columns,), "float32"),
            buffer("bias", (columns,), "float32"),
        ]
        if "add" in steps and flow.residual:
            params += [
                self._image("residual", flow.residual),
                buffer("range_add", (16,), "float32"),
            ]
        elif "add" in steps:
            params.append(buffer("residual", shape, "float32"))
        if flow.target:
            params += [buffer("range_out", (16,), "float32"), self._image("to", flow.target)]
        if flow.floats:
            params.append(buffer("y", shape, "float32"))
        if flow.target:
            (b_, c_, h_, w_), _ = self.buffer(flow.target)
            with (
                e.loop("b", b_) as b,
                e.loop("c", c_) as c,
                e.loop("i", h_) as i,
                e.loop("j", w_) as j,
            ):
                e(f"to[{b}, {c}, {i}, {j}] = T.int16(0)")
        acc = e.alloc("acc", (1,), "int32")
        value = e.alloc("value", (1,), "float32")
        halo = flow.source.halo
        with (
            e.loop("b", s.batch) as b,
            e.loop("c", s.out_channels) as c,
            e.loop("i", s.out_size[0]) as i,
            e.loop("j", s.out_size[1]) as j,
        ):
            e(f"{acc}[0] = 0")
            with (
                e.loop("q", s.in_channels) as q,
                e.loop("k", s.kernel[0]) as k,
                e.loop("l", s.kernel[1]) as m,
            ):
                row = f"{i} * {s.stride[0]} + {k} * {s.dilation[0]} + {halo - s.padding[0]}"
                column = f"{j} * {s.stride[1]} + {m} * {s.dilation[1]} + {halo - s.padding[1]}"
                x = f'T.cast(codes[{b}, {q}, {row}, {column}], "int32")'
                at = f"(({c} * {s.kernel[0]} + {k}) * {s.kernel[1]} + {m}) * {packed} + {q}"
                e(f'{acc}[0] = {acc}[0] + {x} * T.cast(weight[{at}], "int32")')
            scale = f"(range_in[0] * wscale[{c}])"
            e(f'{value}[0] = T.cast({acc}[0], "float32") * {scale} + bias[{c}]')
            for name in steps:
                if name == "relu":
                    e(f"{value}[0] = T.max({value}[0], T.float32(0))")
                elif name == "silu":
                    v = f"{value}[0]"
                    e(f"{v} = {v} / (T.float32(1) + T.exp(T.float32(0) - {v}))")
                else:
                    assert name == "add"
                    other = f"residual[{b}, {c}, {i}, {j}]"
                    if flow.residual:
                        r = flow.residual.halo
                        code = f"residual[{b}, {c}, {i} + {r}, {j} + {r}]"
                        other = f'T.cast({code}, "float32") * range_add[0]'
                    e(f"{value}[0] = {value}[0] + {other}")
            if flow.floats:
                e(f"y[{b}, {c}, {i}, {j}] = {value}[0]")
            if flow.target:
                low, high = _limits(flow.target)
                code = f"T.nearbyint({value}[0] * range_out[1])"
                code = f"T.min(T.max({code}, T.float32({low}.0)), T.float32({high}.0))"
                t = flow.target.halo
                e(f'to[{b}, {c}, {i} + {t}, {j} + {t}] = T.cast({code}, "int16")')
        sizes = f"{s}".replace("ConvShape", "")
        sizes = "".join(ch if ch.isalnum() else "_" for ch in sizes)
        ends = (flow.source, flow.target, flow.residual)
        name = f"plain_flow_{sizes}_{'_'.join(map(_tag, ends))}_{'_'.join(steps)}"
        name += f"_{int(flow.floats)}_{most[0]}x{most[1]}"
        return Kernel(name, e.function(name, params), tuple(outs))
