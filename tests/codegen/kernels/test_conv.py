"""Convolution kernels compute the operator of core/ops.py: exact integers, floats to rounding."""

import ctypes
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray

from t3c.codegen.kernels.conv_amx import AmxConv
from t3c.codegen.kernels.conv_avx2 import Avx2Conv
from t3c.codegen.kernels.conv_portable import PortableConv
from t3c.codegen.kernels.conv_vnni import AvxVnniConv, VnniConv
from t3c.codegen.kernels.family import AbstractConvKernels, ConvShape, Kernel
from t3c.core.codes import Matrix
from t3c.core.errors import LoweringError
from t3c.core.ops import activate, conv2d, quantize
from tests.codegen.kernels.machine import llvm

Array = NDArray[Any]
FAMILIES: dict[str, tuple[AbstractConvKernels, str, frozenset[str]]] = {
    "x86-vnni": (VnniConv(), "icelake-server", frozenset({"avx512f", "avx512_vnni"})),
    "x86-amx": (AmxConv(), "sapphirerapids", frozenset({"avx512f", "avx512_vnni"})),
    # its 256-bit instruction, in the spelling of AVX-512
    "x86-avx-vnni": (
        AvxVnniConv(),
        "icelake-server",
        frozenset({"avx512vl", "avx512_vnni"}),
    ),
    "x86-avx2": (Avx2Conv(), "x86-64-v3", frozenset({"avx2", "fma"})),
    "portable": (PortableConv(), "", frozenset()),
}


def shape(
    inner: int,
    out: int,
    size: tuple[int, int],
    kernel: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    batch: int = 1,
) -> ConvShape:
    return ConvShape(batch, inner, out, size, kernel, stride, padding, dilation)


SHAPES = {
    "pointwise": shape(64, 64, (14, 14)),
    "one pixel": shape(1, 1, (1, 1)),
    "tiny image": shape(3, 5, (2, 3), (3, 3), padding=(1, 1)),
    "tile plus one": shape(65, 33, (17, 17), (3, 3), padding=(1, 1)),
    "odd channels, batch": shape(10, 20, (9, 11), (3, 3), padding=(1, 1), batch=3),
    "stem": shape(3, 16, (33, 35), (7, 7), (2, 2), (3, 3)),
    "stem, even width": shape(3, 17, (32, 48), (7, 7), (2, 2), (3, 3)),
    "pointwise stride 2": shape(20, 18, (15, 15), stride=(2, 2)),
    "even kernel stride 2": shape(8, 16, (16, 18), (2, 2), (2, 2)),
    "patches": shape(3, 24, (32, 48), (16, 16), (16, 16)),
    "patches of 7": shape(3, 24, (15, 21), (5, 7), (5, 7)),
    "any stride": shape(5, 15, (32, 31), (5, 3), (3, 4), (2, 1), (2, 1)),
    "stride above kernel": shape(6, 9, (20, 20), (2, 1), (3, 3), (1, 1)),
    "dilation": shape(12, 8, (20, 33), (3, 3), padding=(2, 4), dilation=(2, 4)),
    "dilation and stride": shape(12, 8, (21, 34), (3, 3), (2, 2), (2, 3), (2, 3)),
    "padding above width": shape(4, 6, (3, 2), (5, 7), padding=(4, 6)),
    "one row": shape(16, 32, (1, 70), (1, 5), padding=(0, 2)),
    "wide row": shape(4, 8, (3, 224), (3, 3), padding=(1, 1)),
    "many panels": shape(64, 96, (28, 28), (3, 3), padding=(1, 1)),
}
PREFIXES = {
    "half": (shape(32, 48, (7, 7), (3, 3), padding=(1, 1)), (64, 128)),
    "inside the last block": (shape(80, 33, (7, 9), (3, 3), (2, 1), (0, 1)), (70, 112)),
    "whole blocks": (shape(64, 48, (7, 7), (3, 3), padding=(1, 1)), (64, 80)),
    "patches": (shape(16, 16, (8, 8), (4, 4), (4, 4)), (32, 32)),
}


@cache
def features() -> frozenset[str]:
    """What /proc/cpuinfo lists; empty where there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line for line in lines if line.startswith("flags")]
    return frozenset(found[0].split(":")[1].split()) if found else frozenset()


@pytest.fixture(scope="session")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Something to keep alive while AMX instructions run: nothing where the processor has them."""
    if {"amx_tile", "amx_int8"} <= features():
        return None
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no amx_tile in /proc/cpuinfo, and no C compiler for the emulator")
    library = tmp_path_factory.mktemp("amx") / "amx_emulator.so"
    source = Path(__file__).with_name("amx_emulator.c")
    command = [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    emulator = ctypes.CDLL(str(library))
    assert emulator.amx_emulate() == 0
    return emulator


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of each family that can run here."""
    name = str(request.param)
    if missing := FAMILIES[name][2] - features():
        pytest.skip(f"{name} needs {', '.join(sorted(missing))}, not in /proc/cpuinfo")
    if name == "x86-amx":
        request.getfixturevalue("tiles")
    return name


def compiled(kernels: tuple[Kernel, ...], target: Any) -> Any:
    """One module with these kernels."""
    functions = {k.name: tvm.script.from_source(k.source) for k in kernels}
    return tvm.compile(tvm.IRModule(functions), target=target)


def host(name: str) -> Any:
    """The target on which a family's tests run."""
    return tvm.target.Target(llvm(FAMILIES[name][1]))


def tensor(array: Array) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(array))


def empty(kernel: Kernel) -> list[Any]:
    """Outputs filled with something that is neither zero nor right."""
    return [tensor(np.full(size, 77, dtype)) for size, dtype in kernel.outs]


def run(
    name: str,
    s: ConvShape,
    most: tuple[int, int] | None = None,
    epilogue: str = "",
    *,
    raw: bool = False,
    zero: bool = False,
) -> tuple[Array, Array]:
    """(what the kernels compute, what core/ops.py computes) for random data."""
    kernels = FAMILIES[name][0]
    rng = np.random.default_rng(0)
    out_max, in_max = most or (s.out_channels, s.in_channels)
    x = rng.standard_normal((s.batch, s.in_channels, *s.in_size)).astype(np.float32)
    x *= np.float32(0 if zero else 1)
    q = rng.integers(-127, 128, (out_max, in_max, *s.kernel)).astype(np.int8)
    w = Matrix(q, (rng.random(out_max) * 0.01 + 0.001).astype(np.float32))
    bias = rng.standard_normal(out_max).astype(np.float32)
    first, second = kernels.quantize(s), kernels.conv(s, most, epilogue, raw=raw)
    module = compiled((first, second), host(name))
    codes, scales = empty(first)
    module[first.name](tensor(x), codes, scales)
    np.testing.assert_array_equal(
        scales.numpy(), quantize(x, (1, 2, 3))[1].reshape(-1), err_msg="scales"
    )
    packed = kernels.pack(w, bias, s).values()
    assert all(array.nbytes % 64 == 0 for array in packed)
    residual = rng.standard_normal(second.outs[0][0]).astype(np.float32)
    more = [tensor(residual)] if "add" in epilogue.split(",") else []
    (y,) = empty(second)
    module[second.name](codes, scales, *map(tensor, packed), *more, y)
    inner = np.ascontiguousarray(q[: s.out_channels, : s.in_channels])
    used = Matrix(inner, w.scale[: s.out_channels])
    if raw:
        return np.asarray(y.numpy()), accumulators(x, used, s)
    want = conv2d(x, used, bias[: s.out_channels], s.stride, s.padding, s.dilation)
    return np.asarray(y.numpy()), activate(want, epilogue, residual)


def accumulators(x: NDArray[np.float32], w: Matrix, s: ConvShape) -> Array:
    """Exact integers: integral inputs whose scale is 1 pass conv2d unchanged."""
    q = quantize(x, (1, 2, 3))[0].astype(np.float32)
    if not q.any():
        return np.zeros((s.batch, s.out_channels, *s.out_size), np.int32)
    unit = Matrix(w.q, np.ones(len(w.q), np.float32))
    y = conv2d(q, unit, None, s.stride, s.padding, s.dilation)
    exact: Array = np.rint(y / np.float32(127 * np.float32(1 / 127))).astype(np.int32)
    return exact


@pytest.mark.parametrize("case", SHAPES)
def test_accumulators_are_exact(family: str, case: str) -> None:
    if family == "portable" and case in ("stem, even width", "many panels", "patches of 7"):
        pytest.skip("no path of its own in the portable kernels")
    got, want = run(family, SHAPES[case], raw=True)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("case", PREFIXES)
def test_a_prefix_of_the_channels_reads_the_same_buffer(family: str, case: str) -> None:
    s, most = PREFIXES[case]
    got, want = run(family, s, most, raw=True)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("case", "epilogue"),
    [
        ("odd channels, batch", ""),
        ("tile plus one", "add,relu"),
        ("pointwise", "relu,add"),
        ("one row", "silu"),
        ("stride above kernel", "gelu"),
    ],
)
def test_floats_agree_to_rounding(family: str, case: str, epilogue: str) -> None:
    got, want = run(family, SHAPES[case], epilogue=epilogue)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_a_zero_image_gives_the_bias(family: str) -> None:
    got, want = run(family, SHAPES["tiny image"], zero=True)
    np.testing.assert_array_equal(got, want)


def test_names_tell_kernels_apart_and_unknown_steps_are_refused(family: str) -> None:
    kernels, s = FAMILIES[family][0], SHAPES["pointwise"]
    made = [
        kernels.quantize(s),
        kernels.conv(s),
        kernels.conv(s, raw=True),
        kernels.conv(s, (128, 64)),
        kernels.conv(s, epilogue="add,relu"),
        kernels.conv(s, epilogue="relu,add"),
        kernels.conv(SHAPES["one pixel"]),
    ]
    assert len({k.name for k in made}) == len(made)
    assert all(f"def {k.name}(" in k.source for k in made)
    assert kernels.conv(s) == kernels.conv(s)
    with pytest.raises(LoweringError, match="unknown step 'swish'"):
        kernels.conv(s, epilogue="swish")


def test_an_image_smaller_than_the_kernel_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match="empty output"):
        FAMILIES[family][0].quantize(shape(3, 4, (2, 2), (3, 3)))


def test_threads_change_nothing(family: str) -> None:
    """Kernels with parallel loops run the same when the loops have several tasks."""
    if family == "x86-amx":
        pytest.skip("emulated tiles are too slow for a layer worth several threads")
    got, want = run(family, shape(128, 128, (28, 28), (3, 3), padding=(1, 1)), raw=True)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("features", [("+neon", "+dotprod"), ("+neon",)], ids=["dotprod", "neon"])
def test_portable_kernels_compile_for_arm(features: tuple[str, ...]) -> None:
    target = tvm.target.Target(
        {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": list(features)}
    )
    kernels, s = FAMILIES["portable"][0], SHAPES["many panels"]
    module = compiled((kernels.quantize(s), kernels.conv(s, epilogue="add,relu")), target)
    assembly = module.mod.inspect_source("asm")
    assert ("sdot" in assembly) == ("+dotprod" in features)
    assert platform.machine() == "aarch64" or "zmm" not in assembly
