"""Sliding-window float kernels compute what torch computes."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm

from t3c.codegen.kernels.depthwise import avg_pool, grouped_conv, max_pool
from t3c.codegen.kernels.family import ConvShape, Kernel

CASES = {  # (in, out, groups, size, kernel, stride, padding, dilation)
    "depthwise": (20, 20, 20, (14, 14), (3, 3), (1, 1), (1, 1), (1, 1)),
    "grouped stride 2": (8, 16, 4, (17, 33), (3, 3), (2, 2), (1, 1), (1, 1)),
    "all awkward": (12, 24, 3, (9, 40), (5, 3), (2, 3), (2, 1), (1, 2)),
    "one row": (4, 4, 4, (1, 50), (1, 7), (1, 1), (0, 3), (1, 1)),
}


def run(kernel: Kernel, *arguments: torch.Tensor) -> torch.Tensor:
    """Compile and call."""
    module = tvm.compile(
        tvm.IRModule({kernel.name: tvm.script.from_source(kernel.source)}),
        target=tvm.target.Target({"kind": "llvm"}),
    )
    ((size, kind),) = kernel.outs
    y: Any = tvm.runtime.tensor(np.full(size, 77, kind))
    module[kernel.name](*(tvm.runtime.tensor(a.numpy()) for a in arguments), y)
    return torch.from_numpy(y.numpy())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("epilogue", ["", "add,relu"])
def test_grouped_convolution(case: str, epilogue: str) -> None:
    inner, out, groups, size, kernel, stride, padding, dilation = CASES[case]
    torch.manual_seed(0)
    x, bias = torch.randn(2, inner, *size), torch.randn(out)
    weight = torch.randn(out, inner // groups, *kernel)
    want = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    residual = torch.randn_like(want)
    shape = ConvShape(2, inner, out, size, kernel, stride, padding, dilation)
    more = (residual,) if epilogue else ()
    got = run(grouped_conv(shape, groups, epilogue), x, weight, bias, *more)
    torch.testing.assert_close(got, torch.relu(want + residual) if epilogue else want)


def test_a_smaller_convolution_reads_the_first_channels_of_stored_weights() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 20, 9, 9), torch.randn(32, 1, 3, 1), torch.randn(32)
    shape = ConvShape(1, 20, 20, (9, 9), (3, 1), (2, 1), (1, 0), (1, 1))
    got = run(grouped_conv(shape, 20, stored=32), x, weight, bias)
    torch.testing.assert_close(got, F.conv2d(x, weight[:20], bias[:20], (2, 1), (1, 0), 1, 20))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_pooling(case: str, ceil_mode: bool) -> None:
    inner, _, _, size, kernel, stride, padding, dilation = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(2, inner, *size)
    shape = ConvShape(2, inner, inner, size, kernel, stride, padding, dilation)
    want = F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    torch.testing.assert_close(run(max_pool(shape, ceil_mode=ceil_mode), x), want)
    flat = ConvShape(2, inner, inner, size, kernel, stride, padding, (1, 1))
    for inside in (True, False):
        want = F.avg_pool2d(x, kernel, stride, padding, ceil_mode, inside)
        got = run(avg_pool(flat, ceil_mode=ceil_mode, count_include_pad=inside), x)
        torch.testing.assert_close(got, want)


def test_mean_of_every_plane() -> None:
    x = torch.randn(2, 30, 7, 9)
    kernel = avg_pool(ConvShape(2, 30, 30, (7, 9), (7, 9), (1, 1), (0, 0), (1, 1)))
    torch.testing.assert_close(run(kernel, x), x.mean((2, 3), keepdim=True))


def test_what_has_no_meaning_is_refused() -> None:
    shape = ConvShape(1, 6, 4, (8, 8), (2, 2), (2, 2), (0, 0), (1, 1))
    with pytest.raises(ValueError, match="4 groups do not divide 6"):
        grouped_conv(shape, 4)
    with pytest.raises(ValueError, match="pooling keeps channels"):
        max_pool(shape)
    dilated = ConvShape(1, 4, 4, (8, 8), (2, 2), (2, 2), (0, 0), (2, 2))
    with pytest.raises(ValueError, match="no dilation"):
        avg_pool(dilated)
