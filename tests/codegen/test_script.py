"""The reader of kernel text gives what TVM's own parser gives."""

import pytest

from t3c.codegen.kernels.attention import attention
from t3c.codegen.kernels.conv_vnni import VnniConv
from t3c.codegen.kernels.depthwise import max_pool
from t3c.codegen.kernels.family import ConvShape, Kernel
from t3c.codegen.kernels.linear_amx import AmxLinear
from t3c.codegen.kernels.linear_portable import PortableLinear
from t3c.codegen.script import read_function
from t3c.codegen.tvm_api import tvm
from t3c.core.errors import LoweringError

SHAPE = ConvShape(1, 16, 16, (7, 7), (3, 3), (2, 2), (1, 1), (1, 1))
KERNELS = [
    AmxLinear().quantize(17, 65),
    AmxLinear().dense(33, 33, 64, "gelu,add"),
    AmxLinear().low_rank(16, 32, 64, 32, 64, "silu"),
    PortableLinear().dense(5, 10, 27, "relu"),
    VnniConv().quantize(SHAPE),
    VnniConv().conv(SHAPE, None, "add,relu"),
    attention(1, 2, 1, 9, 9, 8, 8, 0.5, (1, 1, 1, 9), False, 16),
    max_pool(ConvShape(1, 4, 4, (8, 8), (3, 3), (2, 2), (1, 1), (1, 1))),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_reads_what_tvms_parser_reads(kernel: Kernel) -> None:
    parsed = tvm.script.from_source(kernel.source)
    tvm.ir.assert_structural_equal(read_function(kernel.source), parsed)


HEAD = '@T.prim_func(s_tir=True)\ndef f(\n    a: T.Buffer((4,), "float32"),\n):\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "one function"),
        (HEAD.replace(': T.Buffer((4,), "float32")', "") + "    a[0] = 1.0\n", "'a' has no type"),
        (HEAD + "    for a[0] in range(4):\n        a[1] = 1.0\n", "is not simple"),
        (HEAD + "    (b, c) = a[0]\n", "cannot assign"),
        (HEAD + "    a[0]: T.let = 1.0\n", "cannot bind"),
    ],
)
def test_refuses_what_kernels_must_not_use(text: str, message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        read_function(text)
