"""Norm kernels equal torch; their codes equal those of the separate quantization."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from t3c.codegen.kernels.family import Kernel
from t3c.codegen.kernels.linear_amx import AmxLinear
from t3c.codegen.kernels.linear_tiles import CodeLayout
from t3c.codegen.kernels.linear_vnni import VnniLinear
from t3c.codegen.kernels.norm import NormOptions, layer_norm, rms_norm
from t3c.codegen.script import read_function
from t3c.codegen.tvm_api import make_target, tvm
from t3c.core import ops

Array = NDArray[Any]
HOST = make_target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})
rng = np.random.default_rng(0)
TILED = CodeLayout(tiled=True, sums=False)


def normal(*shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def run(kernel: Kernel, *inputs: Array) -> list[Array]:
    module = tvm.IRModule({kernel.name: read_function(kernel.source)})
    outs = [tvm.runtime.tensor(np.full(shape, 77).astype(dtype)) for shape, dtype in kernel.outs]
    tvm.compile(module, target=HOST)[kernel.name](*map(tvm.runtime.tensor, inputs), *outs)
    return [out.numpy() for out in outs]


def close(got: Array, want: torch.Tensor) -> None:
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=2e-6)


SIZES = ((1, 1), (3, 15), (5, 16), (17, 65), (16, 128), (33, 333), (197, 768))


@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_layer_norm(rows: int, cols: int) -> None:
    x, gamma, beta = normal(rows, cols) + 3, normal(cols), normal(cols)
    (y,) = run(layer_norm(rows, cols, 1e-5), x, gamma, beta)
    xt, gt, bt = map(torch.tensor, (x, gamma, beta))
    close(y, torch.nn.functional.layer_norm(xt, (cols,), gt, bt, 1e-5))


@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_rms_norm_of_a_residual_sum(rows: int, cols: int) -> None:
    x, r, gamma = normal(rows, cols), normal(rows, cols), normal(cols)
    options = NormOptions(shifted=False, residual=True, keep_sum=True)
    total, y = run(rms_norm(rows, cols, 1e-6, options), x, r, gamma)
    assert (total == x + r).all()
    xt, gt = torch.tensor(x + r), torch.tensor(gamma)
    close(y, torch.nn.functional.rms_norm(xt, (cols,), gt, 1e-6))


def test_plain_norms() -> None:
    x = torch.tensor(normal(4, 50))
    bare = NormOptions(scaled=False, shifted=False)
    close(
        run(layer_norm(4, 50, 1e-5, bare), x.numpy())[0], torch.nn.functional.layer_norm(x, (50,))
    )
    close(
        run(rms_norm(4, 50, 1e-5, bare), x.numpy())[0],
        torch.nn.functional.rms_norm(x, (50,), eps=1e-5),
    )


@pytest.mark.parametrize(("rows", "cols"), SIZES[1:])
@pytest.mark.parametrize(
    ("layout", "family"),
    [(TILED, AmxLinear()), (CodeLayout(tiled=False, sums=True), VnniLinear())],
)
def test_codes_equal_the_separate_quantization(
    rows: int, cols: int, layout: CodeLayout, family: Any
) -> None:
    x, gamma, beta = normal(rows, cols), normal(cols), normal(cols)
    options = NormOptions(layout=layout)
    y, codes, scales = run(layer_norm(rows, cols, 1e-5, options), x, gamma, beta)
    quantize = family.quantize(rows, cols)
    assert [out[0] for out in quantize.outs] == [codes.shape, scales.shape]
    want_codes, want_scales = run(quantize, y)
    assert (codes == want_codes).all()
    assert (scales == want_scales).all()
    alone = NormOptions(layout=layout, keep_output=False)
    only = run(layer_norm(rows, cols, 1e-5, alone), x, gamma, beta)
    assert all((a == b).all() for a, b in zip(only, (codes, scales), strict=True))
    q, scale = ops.quantize(y, (1,))
    if not layout.tiled:
        assert (codes[:, :cols].astype(int) == q).all()
    assert (scales[:rows] == scale[:, 0]).all()


def test_zero_rows_have_finite_codes() -> None:
    x = np.zeros((3, 20), np.float32)
    one, none = np.ones(20, np.float32), np.zeros(20, np.float32)
    y, codes, scales = run(layer_norm(3, 20, 1e-5, NormOptions(layout=TILED)), x, one, none)
    assert not y.any()
    assert not codes.any()
    assert np.isfinite(scales).all()


def test_refuses_contradictions() -> None:
    with pytest.raises(ValueError, match="give gamma"):
        NormOptions(scaled=False)
    with pytest.raises(ValueError, match="keep_sum without residual"):
        NormOptions(keep_sum=True)
    with pytest.raises(ValueError, match="keep one of them"):
        NormOptions(keep_output=False)
    with pytest.raises(ValueError, match="cols = 0"):
        layer_norm(3, 0, 1e-5)


def test_names_tell_all_parameters_apart() -> None:
    kernels = [
        layer_norm(3, 20, 1e-5),
        layer_norm(3, 20, 1e-6),
        rms_norm(3, 20, 1e-5),
        layer_norm(3, 20, 1e-5, NormOptions(residual=True)),
        layer_norm(3, 20, 1e-5, NormOptions(residual=True, keep_sum=True)),
        layer_norm(3, 20, 1e-5, NormOptions(layout=TILED)),
        layer_norm(3, 20, 1e-5, NormOptions(layout=TILED, keep_output=False)),
        layer_norm(3, 20, 1e-5, NormOptions(layout=CodeLayout(tiled=False, sums=False))),
    ]
    assert len({k.name for k in kernels}) == len(kernels)
    assert all(k.name.isidentifier() for k in kernels)
