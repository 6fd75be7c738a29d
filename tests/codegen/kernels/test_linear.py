"""Linear kernels compute the operator of core/ops.py: exact integers, floats to rounding."""

import ctypes
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from t3c.codegen.kernels.emit import Emitter, activate, buffer, lanes
from t3c.codegen.kernels.family import AbstractLinearKernels, Kernel
from t3c.codegen.kernels.linear_amx import AmxLinear
from t3c.codegen.kernels.linear_avx2 import Avx2Linear
from t3c.codegen.kernels.linear_avx_vnni import AvxVnniLinear
from t3c.codegen.kernels.linear_portable import PortableLinear
from t3c.codegen.kernels.linear_sdot import SdotLinear
from t3c.codegen.kernels.linear_vnni import VnniLinear
from t3c.codegen.kernels.tables import LOOK_UP
from t3c.codegen.tvm_api import compile_source, make_target, parse_function, runner, tvm
from t3c.core import ops
from t3c.core.codes import F32, Matrix, quantize_weight
from t3c.core.errors import LoweringError
from t3c.core.ops import EPILOGUE_STEPS
from tests.codegen.kernels.machine import llvm

Array = NDArray[Any]
FAMILIES: dict[str, tuple[AbstractLinearKernels, str, frozenset[str]]] = {
    "x86-amx": (AmxLinear(), "sapphirerapids", frozenset({"avx512f", "avx512_vnni"})),
    "x86-vnni": (VnniLinear(), "icelake-server", frozenset({"avx512f", "avx512_vnni"})),
    # its 256-bit instruction, in the spelling of AVX-512
    "x86-avx-vnni": (
        AvxVnniLinear(),
        "icelake-server",
        frozenset({"avx512vl", "avx512_vnni"}),
    ),
    "x86-avx2": (Avx2Linear(), "x86-64-v3", frozenset({"avx2", "fma"})),
    "portable": (PortableLinear(), "x86-64", frozenset({"sse2"})),
}
SIZES = (
    (1, 10, 27),
    (1, 1000, 196),
    (7, 15, 63),
    (16, 16, 64),
    (33, 1000, 65),
    (128, 31, 128),
    (197, 33, 129),
)
ARM = {
    "sdot": {"mcpu": "cortex-a76", "mattr": ["+neon", "+dotprod"]},
    "neon": {"mcpu": "cortex-a72", "mattr": ["+neon"]},
}


@cache
def features() -> frozenset[str]:
    """What /proc/cpuinfo lists; empty where there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [line for line in lines if line.startswith("flags")]
    return frozenset(found[0].split(":")[1].split()) if found else frozenset()


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What must live while AMX instructions run: an emulator where the processor lacks them."""
    if {"amx_tile", "amx_int8"} <= features():
        return None
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no amx_int8 in /proc/cpuinfo, and no C compiler for the emulator")
    library = tmp_path_factory.mktemp("amx") / "amx_emulator.so"
    source = Path(__file__).with_name("amx_emulator.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    emulator = ctypes.CDLL(str(library))
    assert emulator.amx_emulate() == 0
    return emulator


@cache
def compiled(kernel: Kernel, mcpu: str) -> Callable[..., tuple[Array, ...]]:
    """Parsing is slow: equal kernels are compiled once."""
    return runner(kernel, make_target(llvm(mcpu)))


class Bench:
    """One family with its processor: runs kernels on numpy arrays."""

    def __init__(self, family: AbstractLinearKernels, mcpu: str) -> None:
        self.family = family
        self.mcpu = mcpu

    def run(self, kernel: Kernel, *inputs: Array) -> tuple[Array, ...]:
        return compiled(kernel, self.mcpu)(*inputs)


@pytest.fixture(params=FAMILIES)
def bench(request: pytest.FixtureRequest) -> Bench:
    family, mcpu, needs = FAMILIES[str(request.param)]
    if missing := needs - features():
        pytest.skip(f"needs {', '.join(sorted(missing))}, not in /proc/cpuinfo")
    if family.name == "x86-amx":
        request.getfixturevalue("tiles")
    return Bench(family, mcpu)


def random_matrix(rng: np.random.Generator, rows: int, cols: int) -> Matrix:
    return quantize_weight(rng.standard_normal((rows, cols)).astype(np.float32))


def random_rows(rng: np.random.Generator, m: int, k: int) -> F32:
    """Rows of very different size; the first is zero."""
    x = rng.standard_normal((m, k)).astype(np.float32)
    x *= np.float32(10) ** rng.integers(-3, 4, (m, 1)).astype(np.float32)
    if m > 1:
        x[0] = 0
    return x


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_accumulators_are_exact(bench: Bench, m: int, n: int, k: int) -> None:
    rng = np.random.default_rng(m * n + k)
    x, w = random_rows(rng, m, k), random_matrix(rng, n, k)
    bias = np.zeros(n, np.float32)
    codes, scales = bench.run(bench.family.quantize(m, k), x)
    np.testing.assert_array_equal(scales[:m], ops.quantize(x, (1,))[1][:, 0])
    packed = bench.family.pack_dense(w, bias).values()
    (y,) = bench.run(bench.family.dense(m, n, k, raw=True), codes, scales, *packed)
    np.testing.assert_array_equal(y, ops.linear_accumulators(x, w))


def test_extreme_codes_do_not_saturate(bench: Bench) -> None:
    m, n, k = 3, 18, 1030
    x = np.where(np.arange(m * k).reshape(m, k) % 3 == 0, -1, 1).astype(np.float32)
    w = Matrix(np.full((n, k), -127, np.int8), np.ones(n, np.float32))
    w.q[::2] = 127
    quantized = bench.run(bench.family.quantize(m, k), x)
    packed = bench.family.pack_dense(w, np.zeros(n, np.float32)).values()
    (y,) = bench.run(bench.family.dense(m, n, k, raw=True), *quantized, *packed)
    np.testing.assert_array_equal(y, ops.linear_accumulators(x, w))


EPILOGUES = ("", *(s for s in EPILOGUE_STEPS if s not in ("gelu", "add")), "gelu,add", "add,relu")


@pytest.mark.parametrize(
    ("m", "n", "epilogue"),
    [*((6, 23, e) for e in EPILOGUES), (1, 43, "gelu,add"), (17, 43, "silu")],
)
def test_floats_agree_with_every_epilogue(bench: Bench, m: int, n: int, epilogue: str) -> None:
    k = 70
    rng = np.random.default_rng(len(epilogue) + m)
    x = rng.standard_normal((m, k)).astype(np.float32)
    w, bias = random_matrix(rng, n, k), rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(np.float32)
    quantized = bench.run(bench.family.quantize(m, k), x)
    packed = bench.family.pack_dense(w, bias).values()
    extra = (residual,) if "add" in epilogue.split(",") else ()
    kernel = bench.family.dense(m, n, k, epilogue)
    (y,) = bench.run(kernel, *quantized, *packed, *extra)
    expected = ops.activate(ops.linear(x, w, bias), epilogue, residual)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 100), (24, 43, 70)])
def test_one_low_rank_buffer_serves_every_rank(bench: Bench, m: int, n: int, k: int) -> None:
    rank_max = 160
    rng = np.random.default_rng(n)
    x = random_rows(rng, m, k)
    low, high = random_matrix(rng, rank_max, k), random_matrix(rng, n, rank_max)
    bias = rng.standard_normal(n).astype(np.float32)
    quantized = bench.run(bench.family.quantize(m, k), x)
    packed = bench.family.pack_low_rank(low, high, bias).values()
    for rank in (bench.family.rank_step, 96 if m == 1 else rank_max):
        kernel = bench.family.low_rank(m, n, k, rank, rank_max)
        (y,) = bench.run(kernel, *quantized, *packed)
        expected = ops.low_rank(x, low.prefix(rank), high.prefix(None, rank), bias)
        np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-5 * np.abs(expected).max())


def test_low_rank_takes_an_epilogue_and_a_residual(bench: Bench) -> None:
    m, n, k, rank = 6, 20, 40, 32
    rng = np.random.default_rng(1)
    x = rng.standard_normal((m, k)).astype(np.float32)
    low, high = random_matrix(rng, rank, k), random_matrix(rng, n, rank)
    bias = rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(np.float32)
    quantized = bench.run(bench.family.quantize(m, k), x)
    packed = bench.family.pack_low_rank(low, high, bias).values()
    kernel = bench.family.low_rank(m, n, k, rank, rank, "add,relu")
    (y,) = bench.run(kernel, *quantized, *packed, residual)
    expected = ops.activate(ops.low_rank(x, low, high, bias), "add,relu", residual)
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-5)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """TVM's thread pool with two workers."""
    configure = tvm.get_global_func("runtime.config_threadpool")
    configure(1, 2)
    yield
    configure(1, 1)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("name", "m", "n", "k"),
    [
        ("x86-amx", 256, 2016, 256),
        ("x86-amx", 2100, 48, 1300),
        ("x86-vnni", 200, 1000, 200),
        ("x86-vnni", 1, 1500, 1500),
        ("x86-avx2", 1000, 70, 100),
        ("portable", 70, 200, 200),
    ],
)
def test_threads_do_not_change_the_result(
    request: pytest.FixtureRequest, name: str, m: int, n: int, k: int
) -> None:
    family, mcpu, needs = FAMILIES[name]
    if missing := needs - features():
        pytest.skip(f"needs {', '.join(sorted(missing))}, not in /proc/cpuinfo")
    if name == "x86-amx":
        request.getfixturevalue("tiles")
    bench = Bench(family, mcpu)
    rng = np.random.default_rng(m)
    x, w = random_rows(rng, m, k), random_matrix(rng, n, k)
    kernel = family.dense(m, n, k, raw=True)
    if name != "x86-amx" or m < 2000:
        assert "T.parallel" in kernel.source
    quantized = bench.run(family.quantize(m, k), x)
    packed = family.pack_dense(w, np.zeros(n, np.float32)).values()
    (y,) = bench.run(kernel, *quantized, *packed)
    expected = ops.quantize(x, (1,))[0].astype(np.float64) @ w.q.T.astype(np.float64)
    np.testing.assert_array_equal(y, expected.astype(np.int32))


def vector_function(step: str, count: int, *, tables: bool = False) -> str:
    """Source of y = step(x) over `count` values."""
    e = Emitter()
    with e.loop("i", count // 16) as i:
        at = lanes(f"{i} * 16")
        look_up = LOOK_UP if tables else None
        value = activate(e, (step,), e.let("v", f"x[{at}]"), look_up=look_up)
        e(f"y[{at}] = {value}")
    return e.function("f", [buffer("x", (count,), "float32"), buffer("y", (count,), "float32")])


def exact(step: str) -> Callable[[float], float]:
    """The activation in double precision."""

    def logistic(v: float) -> float:
        return 1 / (1 + math.exp(-v)) if v > -700 else 0.0

    return {
        "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
        "gelu-tanh": lambda v: v * logistic(2 * math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)),
        "silu": lambda v: v * logistic(v),
        "tanh": math.tanh,
        "sigmoid": logistic,
    }[step]


@pytest.mark.parametrize("mcpu", ["x86-64", "x86-64-v3"])
@pytest.mark.parametrize("step", ["gelu", "gelu-tanh", "silu", "tanh", "sigmoid"])
def test_activations_are_accurate(step: str, mcpu: str) -> None:
    if missing := ({"sse2"} if mcpu == "x86-64" else {"avx2", "fma"}) - features():
        pytest.skip(f"needs {', '.join(sorted(missing))}, not in /proc/cpuinfo")
    x = np.concatenate(
        [np.linspace(-12, 12, 9600), np.linspace(-1e-3, 1e-3, 160), [-1e4, 1e4, -95, 95] * 4]
    ).astype(np.float32)
    target = make_target({"kind": "llvm", "mcpu": mcpu})
    function = compile_source("f", vector_function(step, len(x)), target)["f"]
    y = tvm.runtime.tensor(np.zeros_like(x))
    function(tvm.runtime.tensor(x), y)
    expected = np.array([exact(step)(float(v)) for v in x])
    error = np.abs(y.numpy() - expected)
    # gelu: 1e-6 of erf times |x| / 2; the others: a few float32 roundings
    bound = 1e-6 * np.abs(x) / 2 + 2e-7 if step == "gelu" else 1e-6 * np.abs(expected) + 3e-7
    assert (error <= bound).all(), (x[error.argmax()], error.max())


@pytest.mark.parametrize("step", LOOK_UP)
def test_looked_up_activations_are_accurate(step: str) -> None:
    if "avx512f" not in features():
        pytest.skip("needs avx512f, not in /proc/cpuinfo")
    edges = np.arange(17) * 5 / 16
    x = np.concatenate([np.linspace(-12, 12, 9600), edges, -edges, [-1e9, 1e9], np.zeros(12)])
    x = x.astype(np.float32)
    target = make_target({"kind": "llvm", "mcpu": "icelake-server"})
    function = compile_source("f", vector_function(step, len(x), tables=True), target)["f"]
    y = tvm.runtime.tensor(np.zeros_like(x))
    function(tvm.runtime.tensor(x), y)
    expected = np.array([exact(step)(float(v)) for v in x])
    assert np.abs(y.numpy() - expected).max() < 1e-5
    function(tvm.runtime.tensor(np.full_like(x, np.nan)), y)
    assert np.isnan(y.numpy()).all()


def machine_code(kernel: Kernel, target: dict[str, object]) -> str:
    """Assembly of a kernel; nothing is run."""
    module = compile_source(kernel.name, kernel.source, make_target(target))
    for part in (module, *module.imports):
        if part.kind == "llvm":
            return str(part.inspect_source("asm"))
    raise AssertionError("no LLVM module")


def test_vnni_needs_no_newer_instructions() -> None:
    target: dict[str, object] = {"kind": "llvm", "mcpu": "icelake-server"}
    code = machine_code(VnniLinear().low_rank(3, 23, 70, 32, 64, "gelu"), target)
    assert "vpdpbusd" in code
    assert not re.search(r"\b(tdp\w+|tileload\w+|ldtilecfg|v\w+ph)\b", code)


def test_avx_vnni_needs_no_wide_registers() -> None:
    target: dict[str, object] = {"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ["+avxvnni"]}
    code = machine_code(AvxVnniLinear().low_rank(3, 23, 70, 32, 64, "gelu"), target)
    assert re.search(r"vpdpbusd.*%ymm", code)
    assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b", code)


def test_amx_asks_for_the_tiles_itself() -> None:
    kernel = AmxLinear().dense(33, 40, 70)
    code = machine_code(kernel, {"kind": "llvm", "mcpu": "sapphirerapids"})
    assert re.search(r"tdpbssd", code)
    assert re.search(r"call\w*\s+\*?.*syscall|syscall@", code)
    assert code.count("ldtilecfg") == code.count("tilerelease") == 1


def test_amx_runs_one_row_on_vnni() -> None:
    assert "vpdpbusd" in AmxLinear().dense(1, 40, 70).source
    assert "tdpbssd" not in AmxLinear().dense(1, 40, 70).source


@pytest.mark.parametrize(
    ("family", "level"),
    [(PortableLinear(), "sdot"), (PortableLinear(), "neon"), (SdotLinear(), "sdot")],
    ids=["portable-sdot", "portable-neon", "sdot"],
)
def test_arm_code_is_vector_code_without_libm(family: AbstractLinearKernels, level: str) -> None:
    target: dict[str, object] = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", **ARM[level]}
    kernels = (
        family.quantize(3, 70),
        family.dense(2, 16, 600, "gelu,tanh"),
    )
    for kernel in kernels:
        code = machine_code(kernel, target)
        assert not re.search(r"\bbl\s+(exp|erf|tanh|rint|nearbyint|roundeven|fmin|fmax)", code)
        if "quantize" not in kernel.name:
            assert re.search(r"\bsdot\b" if level == "sdot" else r"\bs(mull|mlal)2?\b", code)


@pytest.mark.parametrize(
    "family", [*(f for f, _, _ in FAMILIES.values()), SdotLinear()], ids=lambda f: f.name
)
def test_packed_arrays_keep_the_weight_file_aligned(family: AbstractLinearKernels) -> None:
    rng = np.random.default_rng(0)
    for n, k in ((1, 1), (10, 27), (17, 65)):
        bias = np.zeros(n, np.float32)
        packed = family.pack_dense(random_matrix(rng, n, k), bias)
        low, high = random_matrix(rng, 96, k), random_matrix(rng, n, 96)
        for array in (*packed.values(), *family.pack_low_rank(low, high, bias).values()):
            assert array.nbytes % 64 == 0
            assert array.flags.c_contiguous


@pytest.mark.parametrize(
    "family", [*(f for f, _, _ in FAMILIES.values()), SdotLinear()], ids=lambda f: f.name
)
def test_kernels_are_deterministic_and_named_apart(family: AbstractLinearKernels) -> None:
    def kernels() -> list[Kernel]:
        return [
            family.quantize(2, 70),
            family.dense(2, 13, 70),
            family.dense(2, 13, 70, "gelu"),
            family.dense(2, 13, 70, "gelu-tanh,add"),
            family.dense(2, 13, 70, raw=True),
            family.low_rank(2, 13, 70, 32, 64),
            family.low_rank(2, 13, 70, 64, 64),
            family.low_rank(2, 13, 70, 64, 96, "relu"),
        ]

    assert kernels() == kernels()
    assert len({k.name for k in kernels()}) == 8
    for kernel in kernels()[:2]:
        attrs = parse_function(kernel.source).attrs
        assert attrs["global_symbol"] == kernel.name
        assert attrs["tirx.noalias"]
        assert attrs["tirx.is_scheduled"]


@pytest.mark.parametrize(
    "family", [AmxLinear(), VnniLinear(), PortableLinear()], ids=lambda f: f.name
)
def test_bad_sizes_are_refused(family: AbstractLinearKernels) -> None:
    with pytest.raises(LoweringError, match="m = 0; need at least 1"):
        family.quantize(0, 4)
    with pytest.raises(LoweringError, match="n = 0"):
        family.dense(4, 0, 4)
    with pytest.raises(LoweringError, match="rank 20 is not a positive multiple"):
        family.low_rank(4, 4, 4, 20, 64)
    with pytest.raises(LoweringError, match="rank_max 0 is not"):
        family.low_rank(4, 4, 4, 32, 0)
    with pytest.raises(LoweringError, match="above rank_max 32"):
        family.low_rank(4, 4, 4, 64, 32)


def test_bad_epilogues_are_refused() -> None:
    with pytest.raises(LoweringError, match="unknown step 'swish'; allowed are relu"):
        VnniLinear().dense(4, 4, 4, "swish")
    with pytest.raises(LoweringError, match="adds 2 residuals"):
        PortableLinear().dense(4, 4, 4, "add,add")
    with pytest.raises(LoweringError, match="no vector code"):
        activate(Emitter(), ("swish",), "x")


def test_text_that_does_not_parse_is_a_lowering_error() -> None:
    with pytest.raises(LoweringError, match="does not parse"):
        parse_function(
            "@T.prim_func(s_tir=True)\ndef f(x: T.Buffer((1,), 'float32')):\n    y[0] = 1"
        )
