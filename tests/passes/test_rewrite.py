"""Rewrites to elastic sites: rewrite-linear and rewrite-conv."""

import pytest
import torch
from torch import Tensor, fx, nn

from t3c.core.formats import LowRank, Tucker2
from t3c.core.sites import ConvSite, LinearSite
from t3c.passes.base import AbstractPass
from t3c.passes.rewrite_conv import RewriteConv
from t3c.passes.rewrite_linear import RewriteLinear
from t3c.passes.sites import Choice
from tests.passes.conformance import (
    MAKERS,
    PassConformance,
    captured_graph,
    elastic_graph,
    layers,
    run,
)


class TestRewriteLinear(PassConformance):
    @pytest.fixture(scope="class")
    def step(self) -> AbstractPass:
        return RewriteLinear(MAKERS.linear)

    @pytest.fixture(scope="class")
    def inputs(self) -> list[Tensor]:
        return [torch.randn(2, 3, 4)]

    @pytest.fixture(scope="class")
    def graph(self, inputs: list[Tensor]) -> fx.GraphModule:
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2, bias=False))
        return captured_graph(model, inputs)


class TestRewriteConv(PassConformance):
    @pytest.fixture(scope="class")
    def step(self) -> AbstractPass:
        return RewriteConv(MAKERS.conv)

    @pytest.fixture(scope="class")
    def inputs(self) -> list[Tensor]:
        return [torch.randn(2, 3, 9, 8)]

    @pytest.fixture(scope="class")
    def graph(self, inputs: list[Tensor]) -> fx.GraphModule:
        model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 5, 1, bias=False))
        return captured_graph(model, inputs)


class Tied(nn.Module):
    def __init__(self, other_bias: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        if not other_bias:
            self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize("other_bias", [False, True])
def test_tied_weights_share_one_site(other_bias: bool) -> None:
    model, x = Tied(other_bias).eval(), torch.randn(3, 4)
    gm, rows = elastic_graph(model, [x])
    (layer,) = layers(gm).values()
    assert isinstance(layer.site, LinearSite)
    assert layer.site.name in ("a", "b")
    assert layer.site.rows == 6
    assert layer.site.bias is not other_bias
    assert [r.outcome for r in rows] == ["rewritten", "rewritten"]
    torch.testing.assert_close(run(gm, [x], layers(gm))[0], model(x))


def test_weight_of_an_embedding_is_kept() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.head(self.table(x)))

    _, rows = elastic_graph(Language(), [torch.tensor([1, 2])])
    assert [(r.outcome, r.reason) for r in rows] == [
        ("kept", "the weight is tied: embedding reads it too")
    ]


def test_transposed_functional_and_doubled_weights() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))
            self.low = nn.Linear(6, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.w
            z: Tensor = self.low(y.double()) + nn.functional.linear(y[:, :3], y[:3, :3])
            return z

    model, x = Functional().eval(), torch.randn(3, 4)
    gm, rows = elastic_graph(model, [x])
    found = {r.where: (r.outcome, r.reason) for r in rows}
    assert found["w"][0] == "rewritten"
    assert found["low"] == (
        "kept",
        "the layer computes in float64; convert the model to float32",
    )
    assert ("kept", "the weight is computed from the inputs") in found.values()
    torch.testing.assert_close(run(gm, [x], layers(gm))[0], model(x), rtol=1e-5, atol=1e-4)


def test_include_and_exclude_are_reported() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    choice = Choice(include=("0", "1"), exclude=("1",))
    _, rows = elastic_graph(model, [torch.randn(2, 4)], choice)
    assert [(r.where, r.outcome, r.reason) for r in rows] == [
        ("0", "rewritten", "4x4, ranks up to 4"),
        ("1", "skipped", "exclude pattern '1' matches"),
        ("2", "skipped", "no include pattern matches; they are '0', '1'"),
    ]


@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_convolution_is_exact(bias: bool) -> None:
    x = torch.randn(2, 5, 9, 8)
    for k, s, p, d in ((3, 2, 1, 1), (2, 1, 0, 2), (1, 2, 1, 1)):
        model = nn.Conv2d(5, 6, k, s, p, d, bias=bias).eval()
        gm, _ = elastic_graph(model, [x])
        (layer,) = layers(gm).values()
        want = model(x)
        assert isinstance(layer.site, ConvSite)
        assert layer.site.out_size == tuple(want.shape[2:])
        for fmt in (None, LowRank(5, 32) if k == 1 else Tucker2(5, 6, 32)):
            layer.state = (fmt, True)
            torch.testing.assert_close(
                run(gm, [x], {})[0], want, rtol=1e-4, atol=1e-4, msg=f"{k} {s} {p} {d} {fmt}"
            )


@pytest.mark.parametrize("kernel", [(3,), (3, 1), (2, 3), (4,)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_one_dimensional_and_named_padding(kernel: tuple[int, ...], padding: str) -> None:
    if len(kernel) == 1:
        model: nn.Module = nn.Conv1d(3, 4, kernel[0], padding=padding)
        x = torch.randn(2, 3, 11)
    else:
        model = nn.Conv2d(3, 4, (kernel[0], kernel[1]), padding=padding)
        x = torch.randn(2, 3, 7, 6)
    gm, rows = elastic_graph(model, [x])
    assert [r.outcome for r in rows] == ["rewritten"]
    torch.testing.assert_close(run(gm, [x], {})[0], model(x), rtol=1e-4, atol=1e-5)


def test_input_without_a_batch_axis() -> None:
    model, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(3, 7, 6)
    gm, _ = elastic_graph(model, [x])
    assert layers(gm)["weight"].site.batch == 1  # type: ignore[union-attr]
    torch.testing.assert_close(run(gm, [x], {})[0], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), (1, 4, 5, 5), "groups=2; elastic needs groups=1"),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5), "groups=4 (depthwise)"),
        (nn.Conv1d(4, 4, 3, groups=4), (1, 4, 5), "groups=4 (depthwise)"),
        (nn.ConvTranspose2d(4, 4, 3), (1, 4, 5, 5), "transposed convolution"),
        (nn.ConvTranspose1d(4, 4, 3), (1, 4, 5), "transposed convolution"),
        (nn.Conv3d(2, 2, 2), (1, 2, 4, 4, 4), "3-D convolution"),
    ],
)
def test_kept_convolutions_say_why(model: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    x = torch.randn(shape)
    gm, (row,) = elastic_graph(model, [x])
    assert row.outcome == "kept"
    assert row.reason.startswith(reason)
    torch.testing.assert_close(run(gm, [x], {})[0], model(x))


def test_shared_convolution_at_two_sizes_is_kept() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.conv(self.conv(x)[..., :4, :4]))

    _, rows = elastic_graph(Pyramid(), [torch.randn(1, 3, 6, 6)])
    assert {r.reason for r in rows} == {"calls that share this weight differ in image size"}
