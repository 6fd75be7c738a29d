"""Passes of the canonical form: drop-dropout, canonical-linear, fold-batch-norm, fold-constants."""

import pytest
import torch
from torch import Tensor, fx, nn

from t3c.passes.base import AbstractPass, run_passes
from t3c.passes.canonical_linear import CanonicalLinear
from t3c.passes.dead_code import DeadCode
from t3c.passes.drop_dropout import DropDropout
from t3c.passes.fold_batch_norm import FoldBatchNorm
from t3c.passes.fold_constants import FoldConstants
from tests.passes.conformance import PassConformance, captured_graph, targets


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.fc(x)).detach()
        y = y.transpose(0, 1).contiguous().view(2, 2, 2)
        return nn.functional.pad(y.float(), (0, 0)).view(2, 2, 2)


class TestDropDropout(PassConformance):
    @pytest.fixture(scope="class")
    def step(self) -> AbstractPass:
        return DropDropout()

    @pytest.fixture(scope="class")
    def inputs(self) -> list[Tensor]:
        return [torch.randn(2, 4)]

    @pytest.fixture(scope="class")
    def graph(self, inputs: list[Tensor]) -> fx.GraphModule:
        return captured_graph(Noise(), inputs, ())

    def test_only_work_is_left(self, graph: fx.GraphModule) -> None:
        after, _ = run_passes(graph, [DropDropout()])
        assert targets(after) == ["linear", "transpose.int", "reshape"]


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 4))
        self.v = nn.Parameter(torch.randn(5, 3))
        self.b, self.c = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = torch.addmm(self.b, x, self.w.t())
        return torch.mm(a, self.v), torch.matmul(a, self.v) + self.c, x @ self.w.permute(1, 0)


class TestCanonicalLinear(PassConformance):
    @pytest.fixture(scope="class")
    def step(self) -> AbstractPass:
        return CanonicalLinear()

    @pytest.fixture(scope="class")
    def inputs(self) -> list[Tensor]:
        return [torch.randn(2, 4)]

    @pytest.fixture(scope="class")
    def graph(self, inputs: list[Tensor]) -> fx.GraphModule:
        return captured_graph(Products(), inputs)

    def test_every_product_is_a_linear_and_one_matrix_is_stored_once(
        self, graph: fx.GraphModule
    ) -> None:
        after, _ = run_passes(graph, [CanonicalLinear(), DeadCode()])
        assert set(targets(after)) == {"linear"}
        assert set(after.state_dict()) == {"w", "b", "c", "v_turned"}

    def test_scaled_addmm_stays(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

            def forward(self, x: Tensor) -> Tensor:
                return torch.addmm(self.b, x, self.w, alpha=2.0)

        after, _ = run_passes(captured_graph(Scaled(), [torch.randn(2, 4)]), [CanonicalLinear()])
        assert targets(after) == ["addmm"]


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.pre, self.again = nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 1)
        self.bn2 = nn.BatchNorm2d(4)
        self.fc, self.bn3 = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pre(torch.relu(self.bn1(self.conv(x))))
        y = self.again(y) + self.bn2(self.again(y))
        return torch.relu(self.bn3(self.fc(y.mean((2, 3)))))


class TestFoldBatchNorm(PassConformance):
    @pytest.fixture(scope="class")
    def step(self) -> AbstractPass:
        return FoldBatchNorm()

    @pytest.fixture(scope="class")
    def inputs(self) -> list[Tensor]:
        return [torch.randn(2, 3, 6, 6)]

    @pytest.fixture(scope="class")
    def graph(self, inputs: list[Tensor]) -> fx.GraphModule:
        return captured_graph(Norms(), inputs)

    def test_no_batch_norm_is_left_and_names_stay(self, graph: fx.GraphModule) -> None:
        after, _ = run_passes(graph, [FoldBatchNorm(), DeadCode()])
        assert not [t for t in targets(after) if "norm" in t]
        state = set(after.state_dict())
        assert {"conv.weight", "conv.bias", "again.weight", "again.weight_2"} <= state
        assert {"pre.scale", "pre.shift", "fc.weight"} <= state


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 4))
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(3)[:, None] >= torch.arange(3)[None, :]
        row = self.table[torch.arange(3)] * 2
        wide: Tensor = mask[..., None] * self.fc(x)
        return wide + row + torch.zeros(1).expand(3, 3, 4)


class TestFoldConstants(PassConformance):
    @pytest.fixture(scope="class")
    def step(self) -> AbstractPass:
        return FoldConstants()

    @pytest.fixture(scope="class")
    def inputs(self) -> list[Tensor]:
        return [torch.randn(3, 4)]

    @pytest.fixture(scope="class")
    def graph(self, inputs: list[Tensor]) -> fx.GraphModule:
        return captured_graph(Constants(), inputs)

    def test_what_reads_no_input_is_gone_and_weights_stay(self, graph: fx.GraphModule) -> None:
        after, _ = run_passes(graph, [FoldConstants()])
        assert targets(after) == ["linear", "mul.Tensor", "add.Tensor", "expand", "add.Tensor"]
        assert "fc.weight" in after.state_dict()

    def test_large_growing_constants_stay_computations(self, graph: fx.GraphModule) -> None:
        after, _ = run_passes(graph, [FoldConstants(max_bytes=0)])
        assert "arange" in targets(after)

    def test_random_numbers_are_not_frozen(self) -> None:
        class Random(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x + torch.rand(3)

        graph = captured_graph(Random(), [torch.randn(3)])
        assert "rand" in targets(run_passes(graph, [FoldConstants()])[0])

    def test_parametrized_weight_folds_under_its_layer(self) -> None:
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
        graph = captured_graph(model, [torch.randn(2, 4)])
        after, _ = run_passes(graph, [FoldConstants()])
        assert targets(after) == ["linear"]
        assert "0.weight" in after.state_dict()


def test_dead_code_goes_and_constants_are_read_once() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            x.exp()
            return x * self.w + self.w

    graph = captured_graph(Dead(), [torch.randn(3)])
    assert targets(graph) == ["mul.Tensor", "add.Tensor"]
    assert len([n for n in graph.graph.nodes if n.op == "get_attr"]) == 1
