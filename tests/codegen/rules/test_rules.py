"""Every float operator is scheduled, computes what torch computes, and calls no scalar libm."""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t3c.codegen.rules import block_by_block, products, rows, schedule, schedule_module
from t3c.codegen.rules.program import Program, read
from t3c.codegen.tvm_api import from_exported_program, make_target, relax, tvm
from t3c.targets.base import TargetSpec
from t3c.targets.x86 import LEVELS

pytestmark = pytest.mark.filterwarnings("ignore")
torch.manual_seed(0)
SPEC = LEVELS[0]
HOST = make_target({"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()})


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def lowered(module: nn.Module, inputs: tuple[Tensor, ...], target: Any = HOST) -> Any:
    """The module as fused functions, not yet scheduled."""
    program = torch.export.export(module.eval(), inputs, strict=False)
    mod = from_exported_program(program, unwrap_unit_return_tuple=True)
    with target:
        return tvm.transform.Sequential(
            [
                relax.transform.DecomposeOpsForInference(),
                relax.transform.CanonicalizeBindings(),
                relax.transform.LegalizeOps(),
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                relax.transform.DeadCodeElimination(),
            ]
        )(mod)


def functions(mod: Any) -> dict[str, Any]:
    """The TIR functions of a module."""
    return {v.name_hint: f for v, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}


def run(mod: Any, inputs: tuple[Tensor, ...]) -> Any:
    """Outputs of the scheduled module."""
    machine = relax.VirtualMachine(relax.build(mod, target=HOST), tvm.cpu())
    return machine["main"](*[tvm.runtime.tensor(x.detach().numpy()) for x in inputs])


def check(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    lanes: int = 16,
    tolerance: float = 2e-5,
) -> Any:
    """Schedule, build, run, compare; the scheduled module."""
    with torch.no_grad():
        want = module.eval()(*inputs)
    mod = schedule_module(lowered(module, inputs), replace(SPEC, vector=lanes))
    for name, func in functions(mod).items():
        assert func.attrs["tirx.is_scheduled"], name
    got = run(mod, inputs)
    np.testing.assert_allclose(
        got.numpy(), want.numpy(), rtol=tolerance, atol=tolerance, equal_nan=True
    )
    return mod


def x(*shape: int) -> Tensor:
    return torch.randn(*shape)


AROUND = (1, 15, 17, 65)
"""One column, and around the width of one vector and of four."""


@pytest.mark.parametrize(("lanes", "sizes"), [(16, AROUND), (8, (7, 33)), (4, (5, 17))])
def test_elementwise_and_row_functions_at_awkward_sizes(lanes: int, sizes: tuple[int, ...]) -> None:
    def chain(a: Tensor, b: Tensor) -> Tensor:
        y = F.gelu(a + b) * torch.sigmoid(a)
        y = torch.softmax(y, -1) + F.layer_norm(y, y.shape[-1:])
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-5) + torch.tanh(b)
        return (torch.cat([y, y.sum(1, keepdim=True)], 1) - y.mean((0, 1))).flatten()

    def chains(*args: Tensor) -> Tensor:
        return torch.cat([chain(a, b) for a, b in zip(args[::2], args[1::2], strict=True)])

    check(Of(chains), tuple(t for n in sizes for t in (x(2, 5, n), x(n))), lanes)


@pytest.mark.parametrize(("n", "k"), [(1, 7), (15, 16), (16, 1), (17, 33), (65, 64), (200, 9)])
def test_matrix_products_at_awkward_sizes(n: int, k: int) -> None:
    def products_of(b: Tensor, c: Tensor, *lefts: Tensor) -> Tensor:
        return torch.cat([F.relu(a @ b + c) for a in lefts])

    check(Of(products_of), (x(k, n), x(n), *[x(m, k) for m in (1, 3, 5, 6, 7, 13)]))


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_batched_products_in_all_forms(lanes: int) -> None:
    check(Of(lambda a, b: a @ b), (x(2, 3, 13, 8), x(2, 3, 8, 19)), lanes)
    check(Of(lambda a, b: a @ b.transpose(-1, -2)), (x(2, 3, 13, 8), x(2, 3, 19, 8)), lanes)
    check(Of(lambda a, b: a @ b), (x(4, 13, 8), x(8, 35)), lanes)
    check(Of(lambda a, b: F.linear(a, b)), (x(4, 13, 24), x(35, 24)), lanes)


@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (9, 9)),
        (nn.Conv2d(3, 70, 7, stride=2, padding=3), (33, 31)),
        (nn.Conv2d(16, 33, 1), (7, 7)),
        (nn.Conv2d(8, 12, 3, groups=4, padding=1, stride=2), (15, 17)),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), (14, 14)),
        (nn.Conv2d(6, 12, 5, groups=6, padding=2, stride=2), (14, 15)),
        (nn.Conv2d(4, 6, 3, dilation=2, bias=False), (12, 20)),
        (nn.Conv2d(3, 24, 4, stride=4), (16, 16)),
    ],
)
def test_convolutions(conv: nn.Conv2d, size: tuple[int, int]) -> None:
    check(nn.Sequential(conv, nn.ReLU()), (x(2, conv.in_channels, *size),))


@pytest.mark.parametrize(
    "function",
    [
        lambda a: F.max_pool2d(a, 3, 2, 1),
        lambda a: F.avg_pool2d(a, 2),
        lambda a: F.adaptive_avg_pool2d(a, 1),
        lambda a: a.mean((2, 3)),
        lambda a: a.sum(1),
        lambda a: a.permute(0, 2, 3, 1).contiguous() * 2,
        lambda a: a.permute(3, 2, 1, 0).contiguous(),
        lambda a: a.flatten(2).transpose(1, 2).contiguous(),
        lambda a: torch.roll(a, (2, 3), (2, 3)),
        lambda a: F.pad(a, (1, 2, 3, 4)),
        lambda a: a[:, 1:, ::2, 3:-1] + 1,
        lambda a: torch.where(a > 0, a, a.exp()),
        lambda a: torch.cat([-a[..., 9:], a[..., :9]], -1) * a.cos(),
        lambda a: a.max(-1).values,
        lambda a: a.pow(3) + a.abs().sqrt() + (a * a + 1).pow(-0.5),
        lambda a: (a.erf() + a.log1p().nan_to_num()).clamp(-1, 1),
        lambda a: a.to(torch.int64).to(torch.float32) + a.floor(),
        lambda a: F.interpolate(a, scale_factor=2.0, mode="nearest"),
    ],
)
def test_operators_of_networks(function: Callable[[Tensor], Tensor]) -> None:
    check(Of(function), (x(2, 5, 17, 33),))


@pytest.mark.parametrize("columns", [16, 33, 50])
@pytest.mark.parametrize("rows_", [16, 31, 48])
def test_transposes_by_squares(rows_: int, columns: int) -> None:
    check(Of(lambda a, b: a.transpose(1, 2) + b), (x(3, columns, rows_), x(columns)))


def test_gathers() -> None:
    ids = torch.tensor([[1, 5, 0], [2, 2, 4]])
    check(nn.Embedding(7, 37), (ids,))
    table = nn.Parameter(x(9, 3))
    index = torch.randint(0, 9, (25,))
    check(Of(lambda a: a + table[index].view(5, 5, 3).permute(2, 0, 1)), (x(3, 5, 5),))


def test_booleans() -> None:
    check(Of(lambda a, b: ((a > 0) == (b > 0)).float()), (x(3, 40), x(3, 40)))


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min])
def test_fully_masked_rows_behave_as_in_torch(fill: float) -> None:
    a = x(4, 21)
    a[2] = fill
    a[1, 5:] = fill
    check(Of(lambda a: torch.softmax(a, -1)), (a,))


def test_exp_keeps_special_values() -> None:
    a = torch.tensor([float("-inf"), -200, -103, -90, -0.0, 1, 88, 89, float("inf"), float("nan")])
    check(Of(torch.exp), (a.repeat(3),), tolerance=1e-6)


def test_exp_error_is_below_a_millionth() -> None:
    a = torch.linspace(-87, 88, 200_001)
    mod = schedule_module(lowered(Of(torch.exp), (a,)), SPEC)
    got = run(mod, (a,)).numpy().astype(np.float64)
    want = np.exp(a.numpy().astype(np.float64))
    assert np.abs(got / want - 1).max() < 1e-6


@pytest.mark.parametrize("function", [torch.exp, torch.erf, torch.tanh, torch.sigmoid, F.gelu])
def test_no_call_of_the_mathematics_library_is_left(function: Callable[[Tensor], Tensor]) -> None:
    mod = schedule_module(lowered(Of(function), (x(64, 100),)), SPEC)
    for name, func in functions(mod).items():
        built = tvm.compile(
            tvm.IRModule({name: func.with_attr("global_symbol", name)}), target=HOST
        )
        assembly = built.mod.inspect_source("asm")
        assert not re.search(r"call\w*\s+(exp|erf|tanh|pow|log)f?@", assembly)


@pytest.mark.parametrize(
    ("module", "inputs", "owner"),
    [
        (Of(lambda a: torch.softmax(a, -1)), (x(8, 40),), rows),
        (nn.LayerNorm(40), (x(8, 40),), rows),
        (Of(lambda a, b: F.relu(a @ b)), (x(8, 40), x(40, 32)), products),
        (nn.Conv2d(4, 8, 3, padding=1), (x(1, 4, 16, 16),), products),
        (Of(lambda a: a + 1), (x(8, 40),), block_by_block),
    ],
)
def test_the_first_rule_that_answers_wins(
    module: nn.Module, inputs: tuple[Tensor, ...], owner: Any
) -> None:
    funcs = functions(lowered(module, inputs))
    programs = [p for f in funcs.values() if (p := read(f)) is not None]
    order = (products, rows, block_by_block)
    for rule in order[: order.index(owner)]:
        assert all(rule.schedule(p, SPEC) is None for p in programs)
    assert any(owner.schedule(p, SPEC) is not None for p in programs)


def test_a_rule_that_fails_is_logged_and_the_next_one_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(program: Program, spec: TargetSpec) -> Any:
        raise ValueError("no such loop")

    (func,) = functions(lowered(Of(lambda a: a + 1), (x(8, 40),))).values()
    with caplog.at_level(logging.WARNING):
        made = schedule(func, SPEC, "add", (broken, block_by_block.schedule))
    assert made.attrs["tirx.is_scheduled"]
    assert "no such loop" in caplog.text
    assert "add" in caplog.text


def test_what_is_no_list_of_assignments_stays_as_it_is() -> None:
    module = Of(lambda a: a.argmax(-1))
    inputs = (x(6, 33),)
    mod = lowered(module, inputs)
    scheduled = schedule_module(mod, SPEC)
    assert all(f.attrs["tirx.is_scheduled"] for f in functions(scheduled).values())
    assert (run(scheduled, inputs).numpy() == inputs[0].argmax(-1).numpy()).all()


def test_scheduled_functions_are_left_alone() -> None:
    mod = schedule_module(lowered(Of(lambda a: a + 1), (x(8, 40),)), SPEC)
    again = schedule_module(mod, SPEC)
    for name, func in functions(mod).items():
        assert functions(again)[name].same_as(func)


def test_elementwise_becomes_vectors_and_threads() -> None:
    (func,) = functions(lowered(Of(lambda a: a + 1), (x(64, 1024),))).values()
    text = schedule(func, SPEC).script()
    assert "T.parallel" in text
    assert "T.vectorized(T.int64(16))" in text


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "llvm", "mcpu": "x86-64-v3", "mtriple": "x86_64-linux-gnu"},
        {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]},
    ],
)
def test_foreign_targets_compile(config: dict[str, Any]) -> None:
    target = make_target(config)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.LayerNorm(14))
    mod = schedule_module(lowered(module, (x(1, 3, 16, 16),), target), replace(SPEC, vector=4))
    relax.build(mod, target=target)
