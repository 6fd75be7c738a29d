"""4-bit kernels compute the operator of core/ops.py: exact group sums, floats to rounding."""

import re

import numpy as np
import pytest

from t3c.codegen.kernels.family import AbstractGroupedKernels, AbstractLinearKernels
from t3c.codegen.kernels.linear_amx import AmxLinear
from t3c.codegen.kernels.linear_avx2 import Avx2Linear
from t3c.codegen.kernels.linear_avx_vnni import AvxVnniLinear
from t3c.codegen.kernels.linear_portable import PortableLinear
from t3c.codegen.kernels.linear_sdot import SdotLinear
from t3c.codegen.kernels.linear_vnni import VnniLinear
from t3c.core import ops
from t3c.core.codes import F32, Grouped, Nested, quantize_groups, quantize_weight
from t3c.core.errors import LoweringError
from tests.codegen.kernels.test_linear import ARM, Bench, bench, machine_code, random_rows, tiles

__all__ = ["bench", "tiles"]  # fixtures

FAMILIES: tuple[AbstractLinearKernels, ...] = (
    AmxLinear(),
    VnniLinear(),
    AvxVnniLinear(),
    Avx2Linear(),
    PortableLinear(),
    SdotLinear(),
)
SIZES = (
    (1, 15, 63),
    (1, 130, 128),
    (2, 16, 64),
    (3, 17, 200),
    (4, 33, 65),
    (64, 40, 128),
)


def four(family: AbstractLinearKernels) -> AbstractGroupedKernels:
    assert family.grouped is not None
    return family.grouped


def random_groups(rng: np.random.Generator, rows: int, cols: int) -> Grouped:
    return quantize_groups(rng.standard_normal((rows, cols)).astype(np.float32))


def random_planes(rng: np.random.Generator, rows: int, cols: int) -> Nested:
    fine = rng.integers(-8, 8, (rows, cols)).astype(np.int8)
    return Nested(random_groups(rng, rows, cols), fine)


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_accumulators_of_both_planes_are_exact(bench: Bench, m: int, n: int, k: int) -> None:
    rng = np.random.default_rng(m * n + k)
    x, w = random_rows(rng, m, k), random_planes(rng, n, k)
    quantized = bench.run(bench.family.quantize(m, k), x)
    grouped = four(bench.family)
    packed = [
        *grouped.pack_dense(w.coarse, np.zeros(n, np.float32)).values(),
        *grouped.pack_fine(w).values(),
    ]
    (y,) = bench.run(grouped.nested(m, n, k, raw=True), *quantized, *packed)
    np.testing.assert_array_equal(y.reshape(-1, m, n), ops.group_accumulators(x, w.whole))


@pytest.mark.parametrize(("coarse", "fine"), [(-8, -8), (7, 7), (-8, 7)])
def test_extreme_planes_do_not_saturate(bench: Bench, coarse: int, fine: int) -> None:
    m, n, k = 2, 18, 130
    x = np.where(np.arange(m * k).reshape(m, k) % 3 == 0, -1, 1).astype(np.float32)
    q = np.full((n, k), coarse, np.int8)
    q[::2] = 7 - q[::2] - 8
    w = Nested(Grouped(q, np.ones((n, 3), np.float32)), np.full((n, k), fine, np.int8))
    quantized = bench.run(bench.family.quantize(m, k), x)
    grouped = four(bench.family)
    packed = [
        *grouped.pack_dense(w.coarse, np.zeros(n, np.float32)).values(),
        *grouped.pack_fine(w).values(),
    ]
    (y,) = bench.run(grouped.nested(m, n, k, raw=True), *quantized, *packed)
    np.testing.assert_array_equal(y.reshape(-1, m, n), ops.group_accumulators(x, w.whole))


@pytest.mark.parametrize(("m", "epilogue"), [(1, ""), (4, "add,relu"), (13, "silu")])
def test_nested_floats_agree_with_epilogues(bench: Bench, m: int, epilogue: str) -> None:
    n, k = 43, 150
    rng = np.random.default_rng(m)
    x = rng.standard_normal((m, k)).astype(np.float32)
    w, bias = random_planes(rng, n, k), rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(np.float32)
    quantized = bench.run(bench.family.quantize(m, k), x)
    grouped = four(bench.family)
    packed = [*grouped.pack_dense(w.coarse, bias).values(), *grouped.pack_fine(w).values()]
    extra = (residual,) if "add" in epilogue.split(",") else ()
    (y,) = bench.run(grouped.nested(m, n, k, epilogue), *quantized, *packed, *extra)
    expected = ops.activate(ops.linear(x, w.whole, bias), epilogue, residual)
    np.testing.assert_allclose(y, expected, rtol=4e-6, atol=4e-5)


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_group_accumulators_are_exact(bench: Bench, m: int, n: int, k: int) -> None:
    rng = np.random.default_rng(m * n + k)
    x, w = random_rows(rng, m, k), random_groups(rng, n, k)
    quantized = bench.run(bench.family.quantize(m, k), x)
    packed = four(bench.family).pack_dense(w, np.zeros(n, np.float32)).values()
    (y,) = bench.run(four(bench.family).dense(m, n, k, raw=True), *quantized, *packed)
    np.testing.assert_array_equal(y.reshape(-1, m, n), ops.group_accumulators(x, w))


def test_extreme_codes_do_not_saturate(bench: Bench) -> None:
    m, n, k = 2, 18, 130
    x = np.where(np.arange(m * k).reshape(m, k) % 3 == 0, -1, 1).astype(np.float32)
    w = Grouped(np.full((n, k), -8, np.int8), np.ones((n, 3), np.float32))
    w.q[::2] = 7
    quantized = bench.run(bench.family.quantize(m, k), x)
    packed = four(bench.family).pack_dense(w, np.zeros(n, np.float32)).values()
    (y,) = bench.run(four(bench.family).dense(m, n, k, raw=True), *quantized, *packed)
    np.testing.assert_array_equal(y.reshape(-1, m, n), ops.group_accumulators(x, w))


@pytest.mark.parametrize(
    ("m", "n", "epilogue"),
    [(1, 23, ""), (1, 150, "gelu,add"), (4, 23, "add,relu"), (13, 43, "silu"), (3, 48, "tanh")],
)
def test_floats_agree_with_epilogues(bench: Bench, m: int, n: int, epilogue: str) -> None:
    k = 150
    rng = np.random.default_rng(len(epilogue) + m)
    x = rng.standard_normal((m, k)).astype(np.float32)
    w, bias = random_groups(rng, n, k), rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(np.float32)
    quantized = bench.run(bench.family.quantize(m, k), x)
    packed = four(bench.family).pack_dense(w, bias).values()
    extra = (residual,) if "add" in epilogue.split(",") else ()
    kernel = four(bench.family).dense(m, n, k, epilogue)
    (y,) = bench.run(kernel, *quantized, *packed, *extra)
    expected = ops.activate(ops.linear(x, w, bias), epilogue, residual)
    np.testing.assert_allclose(y, expected, rtol=4e-6, atol=4e-5)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 100), (4, 33, 70), (24, 43, 70)])
def test_one_low_rank_buffer_serves_every_rank(bench: Bench, m: int, n: int, k: int) -> None:
    rank_max = 160
    rng = np.random.default_rng(n)
    x = random_rows(rng, m, k)
    low, high = random_groups(rng, rank_max, k), random_groups(rng, n, rank_max)
    bias = rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(np.float32)
    quantized = bench.run(bench.family.quantize(m, k), x)
    packed = four(bench.family).pack_low_rank(low, high, bias).values()
    for rank in (bench.family.rank_step, 128, rank_max):  # 1 to 3 groups
        kernel = four(bench.family).low_rank(m, n, k, rank, rank_max, "add")
        (y,) = bench.run(kernel, *quantized, *packed, residual)
        expected = ops.low_rank(x, low.prefix(rank), high.prefix(None, rank), bias) + residual
        np.testing.assert_allclose(y, expected, rtol=4e-6, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("m", "rank"), [(1, 512), (1, 1088), (2, 640), (4, 192)])
def test_int8_factors_are_read_from_front_to_back(bench: Bench, m: int, rank: int) -> None:
    n, k = 72, 96
    rng = np.random.default_rng(rank)
    x = random_rows(rng, m, k)

    def codes(rows: int, cols: int) -> F32:
        return rng.standard_normal((rows, cols)).astype(np.float32)

    low, high = quantize_weight(codes(rank, k)), quantize_weight(codes(n, rank))
    bias = codes(1, n)[0]
    quantized = bench.run(bench.family.quantize(m, k), x)
    packed = bench.family.pack_low_rank(low, high, bias).values()
    kernel = bench.family.low_rank(m, n, k, rank, rank, "relu")
    (y,) = bench.run(kernel, *quantized, *packed)
    expected = ops.activate(ops.low_rank(x, low, high, bias), "relu")
    np.testing.assert_allclose(y, expected, rtol=4e-6, atol=1e-5 * np.abs(expected).max())


def test_large_weights_are_shared_among_threads(bench: Bench) -> None:
    n, k = 2064, 2048
    rng = np.random.default_rng(0)
    x, w = random_rows(rng, 1, k), random_groups(rng, n, k)
    kernel = four(bench.family).dense(1, n, k, raw=True)
    assert "T.parallel" in kernel.source
    quantized = bench.run(bench.family.quantize(1, k), x)
    packed = four(bench.family).pack_dense(w, np.zeros(n, np.float32)).values()
    (y,) = bench.run(kernel, *quantized, *packed)
    np.testing.assert_array_equal(y.reshape(-1, 1, n), ops.group_accumulators(x, w))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_kernels_are_named_apart_and_arrays_aligned(family: AbstractLinearKernels) -> None:
    grouped, rng = four(family), np.random.default_rng(0)
    kernels = [
        grouped.dense(2, 13, 70),
        grouped.dense(2, 13, 70, "gelu"),
        grouped.dense(2, 13, 70, raw=True),
        grouped.nested(2, 13, 70),
        grouped.nested(2, 13, 70, raw=True),
        grouped.low_rank(2, 13, 70, 32, 64),
        grouped.low_rank(2, 13, 70, 64, 96, "relu"),
        family.dense(2, 13, 70),
        family.low_rank(2, 13, 70, 32, 64),
    ]
    assert len({k.name for k in kernels}) == len(kernels)
    for n, k in ((1, 1), (10, 27), (17, 65)):
        bias = np.zeros(n, np.float32)
        packed = grouped.pack_dense(random_groups(rng, n, k), bias)
        low, high = random_groups(rng, 96, k), random_groups(rng, n, 96)
        for array in (*packed.values(), *grouped.pack_low_rank(low, high, bias).values()):
            assert array.nbytes % 64 == 0
            assert array.flags.c_contiguous


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_bad_sizes_are_refused(family: AbstractLinearKernels) -> None:
    with pytest.raises(LoweringError, match="n = 0"):
        four(family).dense(4, 0, 4)
    with pytest.raises(LoweringError, match="rank 20 is not a positive multiple"):
        four(family).low_rank(4, 4, 4, 20, 64)


@pytest.mark.parametrize(
    ("family", "level"),
    [(PortableLinear(), "sdot"), (PortableLinear(), "neon"), (SdotLinear(), "sdot")],
    ids=["portable-sdot", "portable-neon", "sdot"],
)
def test_arm_code_is_vector_code(family: AbstractLinearKernels, level: str) -> None:
    target: dict[str, object] = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", **ARM[level]}
    code = machine_code(four(family).dense(2, 16, 640, "gelu"), target)
    sdot = isinstance(family, SdotLinear)
    assert re.search(r"\bsdot\b" if sdot else r"\b[su](mull|mlal)2?\b", code)
