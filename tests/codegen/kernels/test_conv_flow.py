"""Codes that flow between convolutions: exact sums, codes to a tie's breadth, exact halos."""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray

from t3c.codegen.kernels.conv_avx2 import Avx2Conv
from t3c.codegen.kernels.conv_portable import PortableConv
from t3c.codegen.kernels.conv_vnni import AvxVnniConv, VnniConv
from t3c.codegen.kernels.conv_x86 import op_of, shape_of
from t3c.codegen.kernels.family import AbstractConvKernels, ConvShape, Flow, Image, Kernel
from t3c.codegen.kernels.image_codes import Grid
from t3c.codegen.script import read_function
from t3c.core.codes import Matrix
from t3c.core.errors import LoweringError
from t3c.core.grid import ends_of
from t3c.core.ops import activate
from tests.codegen.kernels.test_conv import FAMILIES, PREFIXES, SHAPES, features, host, shape, tiles

Array = NDArray[Any]
__all__ = ["tiles"]
STATIC = [name for name, (family, _, _) in FAMILIES.items() if family.static]


@pytest.fixture(params=STATIC)
def family(request: pytest.FixtureRequest) -> str:
    """The name of each family with static codes that can run here."""
    name = str(request.param)
    if missing := FAMILIES[name][2] - features():
        pytest.skip(f"{name} needs {', '.join(sorted(missing))}, not in /proc/cpuinfo")
    if name == "x86-amx":
        request.getfixturevalue("tiles")
    return name


def call(name: str, kernel: Kernel, *inputs: Array) -> list[Array]:
    """Run one kernel; outputs begin with something that is neither zero nor right."""
    module = _compiled(name, kernel)
    outs = [tvm.runtime.tensor(np.full(size, 77, dtype)) for size, dtype in kernel.outs]
    module[kernel.name](*[tvm.runtime.tensor(np.ascontiguousarray(x)) for x in inputs], *outs)
    return [np.asarray(out.numpy()) for out in outs]


@cache
def _compiled(name: str, kernel: Kernel) -> Any:
    function = read_function(kernel.source)
    return tvm.compile(tvm.IRModule({kernel.name: function}), target=host(name))


def words(image: Image, q: Array) -> Array:
    """The buffer of codes q [batch, channels, h, w], integers of the image."""
    grid, halo = Grid(image), image.halo
    height, width = image.size
    found = np.full(grid.bytes, 99, np.uint8)
    for b in range(image.batch):
        plane = np.full((height + 2 * halo + 1, grid.pitch, grid.depth), grid.zero, np.uint8)
        inner = plane[halo : halo + height, halo : halo + width, : image.channels]
        inner[:] = np.moveaxis(q[b], 0, 2) + grid.zero
        flat = plane.reshape(-1)[: grid.plane]
        found[b * grid.plane : b * grid.plane + len(flat)] = flat
    return found


def integers(image: Image, found: Array) -> Array:
    """Codes [batch, channels, h, w] of a buffer; checks the halo."""
    grid, halo = Grid(image), image.halo
    height, width = image.size
    images = found[: image.batch * grid.plane].reshape(image.batch, grid.plane)
    rows = (height + 2 * halo) * grid.pitch + halo
    for plane in images[:, : rows * grid.depth]:
        pixels = plane.reshape(rows, grid.depth)
        inside = np.zeros(rows, bool)
        for r in range(height):
            start = (r + halo) * grid.pitch + halo
            inside[start : start + width] = True
        assert (pixels[~inside] == grid.zero).all()
    planes = np.zeros((image.batch, height, width, image.channels), np.int32)
    for b, r in np.ndindex(image.batch, height):
        start = grid.origin + r * grid.row
        line = images[b, start : start + width * grid.depth].reshape(width, grid.depth)
        planes[b, r] = line[:, : image.channels].astype(np.int32) - grid.zero
    return np.moveaxis(planes, 3, 1)


def random_codes(rng: Any, image: Image) -> Array:
    low, high = image.ends
    found: Array = rng.integers(low, high + 1, (image.batch, image.channels, *image.size))
    return found


def sums(q: Array, w: Array, s: ConvShape) -> Array:
    """Exact accumulators."""
    (ph, pw), (sh, sw), (dh, dw), (oh, ow) = s.padding, s.stride, s.dilation, s.out_size
    p = np.pad(q.astype(np.int64), ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    found = np.zeros((s.batch, w.shape[0], oh, ow), np.int64)
    for i in range(s.kernel[0]):
        for j in range(s.kernel[1]):
            rows = slice(i * dh, i * dh + sh * (oh - 1) + 1, sh)
            columns = slice(j * dw, j * dw + sw * (ow - 1) + 1, sw)
            found += np.einsum(
                "bchw,oc->bohw", p[:, :, rows, columns], w[:, :, i, j].astype(np.int64)
            )
    return found.astype(np.int32)


def span(scale: float) -> Array:
    """A range."""
    return np.array([scale, 1 / np.float32(scale)] + [7] * 14, np.float32)


def run(
    name: str,
    s: ConvShape,
    *,
    source_signed: bool = False,
    target_signed: bool = False,
    target: bool = True,
    floats: bool = False,
    residual: bool | None = None,
    most: tuple[int, int] | None = None,
    epilogue: str = "",
    raw: bool = False,
    halo: int = 0,
    kernels: AbstractConvKernels | None = None,
    bits: int = 8,
    extreme: bool = False,
) -> None:
    """Compare one flow with numpy."""
    kernels = kernels or FAMILIES[name][0]
    rng = np.random.default_rng(1)
    out_max, in_max = most or (s.out_channels, s.in_channels)
    source = Image(s.batch, s.in_channels, s.in_size, max(s.padding), source_signed, bits)
    goal = Image(s.batch, s.out_channels, s.out_size, halo, target_signed, bits) if target else None
    more = None
    if residual is not None:
        more = Image(s.batch, s.out_channels, s.out_size, 2, residual, bits)
    q = random_codes(rng, source)
    w = Matrix(
        rng.integers(-127, 128, (out_max, in_max, *s.kernel)).astype(np.int8),
        (rng.random(out_max) * 0.01 + 0.001).astype(np.float32),
    )
    if extreme:
        q = np.full_like(q, source.ends[1])
        w.q[:] = np.where(np.arange(out_max) % 2, 127, -127)[:, None, None, None]
    bias = rng.standard_normal(out_max).astype(np.float32)
    inner = w.q[: s.out_channels, : s.in_channels]
    acc = sums(q, inner, s)
    scale = w.scale[: s.out_channels, None, None] * np.float32(0.02)
    value = acc.astype(np.float32) * scale + bias[: s.out_channels, None, None]
    packed = list(kernels.pack(w, bias, s).values())
    assert all(array.nbytes % 64 == 0 and array.ndim == 1 for array in packed)
    flow = Flow(s, source, goal, more, floats)
    kernel = kernels.flow(flow, most, epilogue, raw=raw)
    inputs = [words(source, q), span(0.02), *packed]
    if raw:
        (got,) = call(name, kernel, *inputs)
        np.testing.assert_array_equal(got, acc)
        return
    added = None
    if "add" in epilogue.split(","):
        if more is None:
            added = rng.standard_normal(value.shape).astype(np.float32) * np.abs(value).max()
            inputs.append(added)
        else:
            codes = random_codes(rng, more)
            unit = np.float32(np.abs(value).max() / 100)
            added = codes.astype(np.float32) * unit
            inputs += [words(more, codes), span(float(unit))]
    want = activate(value.astype(np.float32), epilogue, added)
    step = np.float32(
        max(np.abs(want).max(), 1e-3) / (0.94 * ends_of(bits, signed=target_signed)[1])
    )
    if goal is not None:
        inputs.append(span(float(step)))
    outs = call(name, kernel, *inputs)
    if goal is not None:
        got = integers(goal, outs.pop(0))
        real = want.astype(np.float64) / step
        low, high = goal.ends
        exact = np.clip(np.rint(real), low, high).astype(np.int32)
        tie = np.abs(np.abs(real - np.floor(real)) - 0.5) < 1e-3
        assert (np.abs(got - exact) <= tie).all()
    if goal is None or floats:
        (y,) = outs
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("case", SHAPES)
def test_sums_of_codes_are_exact(family: str, case: str, signed: bool) -> None:
    run(family, SHAPES[case], source_signed=signed, raw=True)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("case", SHAPES)
def test_sums_of_codes_of_7_bits_are_exact_up_to_the_largest_ones(
    family: str, case: str, signed: bool
) -> None:
    run(family, SHAPES[case], source_signed=signed, raw=True, bits=7)
    run(family, SHAPES[case], source_signed=signed, raw=True, bits=7, extreme=True)


@pytest.mark.parametrize("case", ["odd channels, batch", "pointwise stride 2", "tiny image"])
def test_codes_of_7_bits_are_cut_off_at_their_own_ends(family: str, case: str) -> None:
    s = SHAPES[case]
    run(family, s, epilogue="relu", halo=1, bits=7)
    run(family, s, source_signed=True, target_signed=True, bits=7)
    run(family, s, epilogue="add,relu", residual=True, halo=2, bits=7)
    run(family, s, epilogue="gelu", floats=True, target_signed=True, source_signed=True, bits=7)


@pytest.mark.parametrize("case", PREFIXES)
def test_a_prefix_of_the_channels_reads_the_same_buffer(family: str, case: str) -> None:
    s, most = PREFIXES[case]
    run(family, s, most=most, epilogue="relu")
    run(family, s, most=most, source_signed=True, raw=True)
    run(family, s, most=most, source_signed=True, raw=True, bits=7)


@pytest.mark.parametrize("case", SHAPES)
def test_codes_and_their_halo(family: str, case: str) -> None:
    run(family, SHAPES[case], epilogue="relu", halo=1)
    run(family, SHAPES[case], source_signed=True, target_signed=True)


@pytest.mark.parametrize("residual", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("epilogue", ["add,relu", "relu,add", "add", "silu,add"])
def test_residual_codes(family: str, epilogue: str, residual: bool) -> None:
    signed = not epilogue.endswith("relu")
    for case in ("odd channels, batch", "pointwise stride 2", "tiny image"):
        run(
            family,
            SHAPES[case],
            epilogue=epilogue,
            residual=residual,
            target_signed=signed,
            halo=2,
        )


@pytest.mark.parametrize("epilogue", ["", "relu", "gelu", "add,relu", "add,tanh"])
def test_floats_with_and_without_codes(family: str, epilogue: str) -> None:
    for case in ("odd channels, batch", "pointwise stride 2", "tiny image"):
        s = SHAPES[case]
        run(family, s, epilogue=epilogue, target=False, floats=True)
        run(family, s, epilogue=epilogue, floats=True, target_signed=True, source_signed=True)
        if "add" in epilogue:
            run(family, s, epilogue=epilogue, floats=True, target=False, residual=True)
            run(family, s, epilogue=epilogue, target_signed=True)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize(("channels", "bits"), [*((n, 8) for n in (1, 3, 4, 7, 16, 64)), (21, 7)])
def test_encode_and_decode(family: str, channels: int, bits: int, signed: bool) -> None:
    kernels, rng = FAMILIES[family][0], np.random.default_rng(0)
    for batch, size in ((3, (5, 7)), (1, (9, 40))):
        image = Image(batch, channels, size, 3, signed, bits)
        x = rng.standard_normal((batch, channels, *size)).astype(np.float32)
        (found,) = call(family, kernels.encode(image), x, span(0.02))
        inverse = span(0.02)[1]
        limits = image.ends
        want = np.clip(np.rint(x * inverse), *limits).astype(np.int32)
        np.testing.assert_array_equal(integers(image, found), want)
        assert (tuple(found.shape), "uint8") == kernels.buffer(image)
        (back,) = call(family, kernels.decode(image), found, span(0.02))
        np.testing.assert_array_equal(back, want.astype(np.float32) * np.float32(0.02))


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("channels", [3, 16, 80])
def test_pools(family: str, channels: int, signed: bool) -> None:
    kernels, rng = FAMILIES[family][0], np.random.default_rng(0)
    source = Image(2, channels, (11, 9), 1, signed)
    target = Image(2, channels, (6, 5), 2, signed)
    q = random_codes(rng, source)
    pool = kernels.max_pool(source, target, (3, 3), (2, 2), (1, 1))
    (found,) = call(family, pool, words(source, q))
    padded = np.pad(q, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-128)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    want = windows[:, :, ::2, ::2].max((4, 5))
    np.testing.assert_array_equal(integers(target, found), want)
    (means,) = call(family, kernels.average(source), words(source, q), span(0.5))
    np.testing.assert_allclose(means, q.mean((2, 3), keepdims=True) * 0.5, rtol=1e-6)


def test_every_schedule_computes_the_same() -> None:
    if FAMILIES["x86-vnni"][2] - features():
        pytest.skip("needs AVX-512 VNNI")
    s = shape(40, 72, (3, 30), (3, 3), (1, 1), (1, 1))
    op = op_of(s, "relu")
    assert VnniConv().default(op) in VnniConv().schedules(op)
    assert shape_of(op) == s
    planes = op_of(s, "relu", "planes")
    for schedule in VnniConv().schedules(op):
        kernels = VnniConv({op.key: schedule, planes.key: schedule})
        run("x86-vnni", s, epilogue="relu", kernels=kernels)
        run("x86-vnni", s, epilogue="relu", kernels=kernels, target=False, floats=True)
    assert "dynamic" in VnniConv().kernel(planes).name
    add = op_of(s, "add,relu")
    assert VnniConv().kernel(add).name != VnniConv().kernel(op).name
    with pytest.raises(LoweringError, match="no schedules for operator"):
        VnniConv().default(replace(op, kind="pool"))
    with pytest.raises(LoweringError, match="no schedules for operator"):
        VnniConv().schedules(replace(op, kind="pool"))


@pytest.mark.parametrize("kernels", [AvxVnniConv(), Avx2Conv()], ids=["avx-vnni", "avx2"])
@pytest.mark.parametrize("floats", [False, True])
def test_half_vectors_need_no_wide_registers(kernels: AbstractConvKernels, floats: bool) -> None:
    s = shape(16, 40, (5, 9), (3, 3), (1, 1), (1, 1))
    bits = kernels.activation_bits
    source, target = Image(1, 16, (5, 9), 1, False, bits), Image(1, 40, (5, 9), 0, False, bits)
    kernel = kernels.flow(Flow(s, source, target, floats=floats), None, "relu")
    level = {"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ["+avxvnni"]}
    module = tvm.compile(
        tvm.IRModule({kernel.name: read_function(kernel.source)}), target=tvm.target.Target(level)
    )
    code = module.mod.inspect_source("asm")
    assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b", code)
    assert re.search(r"vpmaddubsw.*%ymm" if kernels.name == "x86-avx2" else r"vpdpbusd.*%ymm", code)


def test_every_schedule_of_avx2_computes_the_same() -> None:
    if FAMILIES["x86-avx2"][2] - features():
        pytest.skip("needs AVX2")
    s = shape(40, 24, (40, 30), (3, 3), (1, 1), (1, 1))
    op = op_of(s, "relu")
    assert Avx2Conv().default(op) in Avx2Conv().schedules(op)
    for schedule in Avx2Conv().schedules(op):
        run("x86-avx2", s, epilogue="relu", kernels=Avx2Conv({op.key: schedule}), bits=7)
        run("x86-avx2", s, epilogue="relu", kernels=Avx2Conv({op.key: schedule}))
    assert Avx2Conv().kernel(op).name != Avx2Conv().kernel(op_of(s, "add,relu")).name
    assert "dynamic" in Avx2Conv().kernel(op_of(s, "relu", "planes")).name
    with pytest.raises(LoweringError, match="no schedules for operator"):
        Avx2Conv().schedules(replace(op, kind="pool"))


def test_images_that_do_not_fit_are_refused(family: str) -> None:
    kernels, s = FAMILIES[family][0], SHAPES["tiny image"]
    source = Image(1, 3, (2, 3), 1, False)
    flow = Flow(s, source, Image(1, 5, (2, 3), 0, False))
    with pytest.raises(ValueError, match="source halo 0 is below the padding"):
        kernels.flow(replace(flow, source=replace(source, halo=0)))
    with pytest.raises(ValueError, match=r"target .* does not fit"):
        kernels.flow(replace(flow, target=source))
    with pytest.raises(ValueError, match="gives size"):
        kernels.max_pool(source, source, (2, 2), (2, 2), (0, 0))
    with pytest.raises(ValueError, match="above half"):
        kernels.max_pool(source, replace(source, size=(5, 6)), (2, 2), (1, 1), (2, 2))


def test_families_without_static_codes_say_so() -> None:
    kernels, image = PortableConv(), Image(1, 3, (2, 3), 1, False)
    flow = Flow(SHAPES["tiny image"], image, None, floats=True)
    assert not kernels.static
    for ask in (
        lambda: kernels.buffer(image),
        lambda: kernels.encode(image),
        lambda: kernels.decode(image),
        lambda: kernels.flow(flow),
        lambda: kernels.max_pool(image, image, (1, 1), (1, 1), (0, 0)),
        lambda: kernels.average(image),
    ):
        with pytest.raises(LoweringError, match="'portable' has no static codes"):
            ask()
