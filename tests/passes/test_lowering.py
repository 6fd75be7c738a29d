"""Lowering graphs: place-sites, fuse-epilogue, fuse-attention, fuse-rms-norm, spell-views."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from t3c.core.errors import PassError
from t3c.passes.base import AbstractPass, copy_graph, run_passes
from t3c.passes.fuse_attention import FuseAttention
from t3c.passes.fuse_epilogue import FuseEpilogue
from t3c.passes.fuse_rms_norm import FuseRmsNorm
from t3c.passes.pipeline import lowering_graph
from t3c.passes.place_sites import PlaceSites
from t3c.passes.spell_views import SpellViews
from tests.passes.conformance import (
    PassConformance,
    captured_graph,
    elastic_graph,
    layers,
    run,
    targets,
)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.conv, self.short = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(gelu(self.a(x), approximate="tanh")) + x
        z = torch.relu(self.conv(y) + self.short(y))
        w = torch.tanh(self.c(z))
        last: Tensor = w * torch.sigmoid(z) + self.c(z)
        return last


class TestPlaceSites(PassConformance):
    @pytest.fixture(scope="class")
    def step(self) -> AbstractPass:
        return PlaceSites()

    @pytest.fixture(scope="class")
    def inputs(self) -> list[Tensor]:
        return [torch.randn(1, 2, 4, 4)]

    @pytest.fixture(scope="class")
    def graph(self, inputs: list[Tensor]) -> fx.GraphModule:
        return elastic_graph(Residual(), inputs)[0]

    def test_foreign_module_is_refused(self, graph: fx.GraphModule) -> None:
        graph = copy_graph(graph)
        node = next(n for n in graph.graph.nodes if n.op == "call_module")
        graph.add_submodule("foreign", nn.ReLU())
        node.target = "foreign"
        with pytest.raises(PassError, match="'foreign' is no elastic site"):
            run_passes(graph, [PlaceSites()])


class TestFuseEpilogue(PassConformance):
    @pytest.fixture(scope="class")
    def step(self) -> AbstractPass:
        return FuseEpilogue()

    @pytest.fixture(scope="class")
    def inputs(self) -> list[Tensor]:
        return [torch.randn(1, 2, 4, 4)]

    @pytest.fixture(scope="class")
    def graph(self, inputs: list[Tensor]) -> fx.GraphModule:
        return run_passes(elastic_graph(Residual(), inputs)[0], [PlaceSites()])[0]

    def test_function_stays(
        self, step: AbstractPass, graph: fx.GraphModule, inputs: list[Tensor]
    ) -> None:
        torch.manual_seed(0)
        model = Residual().eval()
        elastic, _ = elastic_graph(model, inputs)
        low = lowering_graph(elastic)
        got = run(low, inputs, layers(elastic))[0]
        torch.testing.assert_close(got, model(*inputs), rtol=1e-4, atol=1e-5)

    def test_shapes_are_right(
        self, step: AbstractPass, graph: fx.GraphModule, inputs: list[Tensor]
    ) -> None:
        after, _ = run_passes(graph, [step])
        assert all("val" in n.meta for n in after.graph.nodes if n.op == "call_function")

    def test_epilogues(self, graph: fx.GraphModule) -> None:
        after, _ = run_passes(graph, [FuseEpilogue()])
        found = [(n.args[2], n.args[3]) for n in after.graph.nodes if "site" in str(n.target)]
        assert (
            sorted(found)
            == [
                ("a", "gelu-tanh"),
                ("b", "add"),
                ("c", "add"),
                ("c", "tanh"),
                ("conv", "add,relu"),
                ("short", ""),
            ]
            or ("short", "add,relu") in found
        )
        assert not [t for t in targets(after) if t in ("relu", "gelu", "tanh")]


def heads(x: Tensor, count: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merged(scaled_dot_product_attention(heads(q, 4), heads(k, 4), heads(v, 4)))


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    h = [heads(t, 2) for t in (q, k, v)]
    return merged(scaled_dot_product_attention(h[0], h[1], h[2], is_causal=True, scale=0.3))


def rectangular_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    h = [heads(t, 2) for t in (q[:, :3], k, v)]
    return merged(scaled_dot_product_attention(h[0], h[1], h[2], is_causal=True))


def constant_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None].expand(2, 1, 5, 5)
    h = [heads(t, 2) for t in (q, k, v)]
    return merged(scaled_dot_product_attention(h[0], h[1], h[2], attn_mask=mask))


def constant_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.arange(25.0).reshape(5, 5) / 9
    h = [heads(t, 2) for t in (q, k, v)]
    return merged(scaled_dot_product_attention(h[0], h[1], h[2], attn_mask=mask))


def all_true(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(1, 1, 5, 1, dtype=torch.bool).expand(2, 1, 5, 5)
    h = [heads(t, 2) for t in (q, k, v)]
    return merged(scaled_dot_product_attention(h[0], h[1], h[2], attn_mask=mask))


def given_bool(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = (q[:, :1, :5] > 0) | torch.eye(5, dtype=torch.bool)
    h = [heads(t, 2) for t in (q, k, v)]
    return merged(scaled_dot_product_attention(h[0], h[1], h[2], attn_mask=mask[:, None]))


def given_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    h = [heads(t, 2) for t in (q, k, v)]
    return merged(scaled_dot_product_attention(h[0], h[1], h[2], attn_mask=q[0, :, :5]))


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    h = [heads(q, 4), heads(k[..., :4], 2), heads(v[..., :4], 2)]
    return merged(scaled_dot_product_attention(h[0], h[1], h[2], enable_gqa=True))


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def repeat(t: Tensor) -> Tensor:
        b, h, s, d = t.shape
        return t[:, :, None].expand(b, h, 2, s, d).reshape(b, 2 * h, s, d)

    k2, v2 = repeat(heads(k[..., :4], 2)), repeat(heads(v[..., :4], 2))
    return merged(scaled_dot_product_attention(heads(q, 4), k2, v2))


def rotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    h = [heads(q, 2) * 1.5 + heads(q, 2).flip(-1), heads(k, 2).roll(1, -1), heads(v, 2)]
    return merged(scaled_dot_product_attention(h[0], h[1], h[2]))


def unmerged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(heads(q, 2), heads(k, 2), heads(v, 2)).exp()


class Attention(nn.Module):
    def __init__(self, what: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.what = what

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.what(q, k, v)


CASES = (
    plain,
    causal,
    rectangular_causal,
    constant_causal,
    constant_float,
    all_true,
    given_bool,
    given_float,
    grouped,
    repeated,
    rotated,
    unmerged,
)


@pytest.mark.parametrize("what", CASES, scope="class")
class TestFuseAttention(PassConformance):
    @pytest.fixture(scope="class")
    def step(self) -> AbstractPass:
        return FuseAttention()

    @pytest.fixture(scope="class")
    def inputs(self) -> list[Tensor]:
        return [torch.randn(2, 5, 8) for _ in range(3)]

    @pytest.fixture(scope="class")
    def graph(
        self, what: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]
    ) -> fx.GraphModule:
        return elastic_graph(Attention(what), inputs)[0]

    def test_one_operator_is_left(
        self, graph: fx.GraphModule, what: Callable[..., Tensor], inputs: list[Tensor]
    ) -> None:
        after = lowering_graph(graph)
        (node,) = (n for n in after.graph.nodes if "t3c.attention" in str(n.target))
        mask, count, kv, _, is_causal = node.args[3:]
        assert is_causal is (what in (causal, constant_causal))
        assert (mask is None) is (
            what not in (constant_float, given_bool, given_float, rectangular_causal)
        )
        assert kv == (2 if what in (grouped, repeated) else count)
        if what in (plain, causal, constant_causal, constant_float, all_true, repeated):
            assert not [t for t in targets(after) if "transpose" in t or "clone" in t]
        program = torch.export.export(after, tuple(inputs), strict=False).run_decompositions({})
        assert "_unsafe_view" not in str(program.graph)


def test_what_does_not_fit_stays() -> None:
    inputs = [torch.randn(2, 5, 8) for _ in range(3)]
    model = Attention(lambda q, k, v: scaled_dot_product_attention(q, k, v))
    after = lowering_graph(elastic_graph(model, inputs)[0])
    assert "scaled_dot_product_attention" in targets(after)


class Spelled(nn.Module):
    """The norm as transformers writes it."""

    def __init__(self, axis: int = -1) -> None:
        super().__init__()
        self.axis, self.weight = axis, nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        root = torch.rsqrt(x.pow(2).mean(self.axis, keepdim=True) + 1e-5)
        return self.weight * (x * root)


@pytest.mark.parametrize("norm", [Spelled(), nn.RMSNorm(8, 1e-5)], ids=["spelled", "whole"])
class TestFuseRmsNorm(PassConformance):
    @pytest.fixture(scope="class")
    def step(self) -> AbstractPass:
        return FuseRmsNorm()

    @pytest.fixture(scope="class")
    def inputs(self) -> list[Tensor]:
        return [torch.randn(2, 5, 8)]

    @pytest.fixture
    def graph(self, norm: nn.Module, inputs: list[Tensor]) -> fx.GraphModule:
        return elastic_graph(norm, inputs)[0]

    def test_one_operator_is_left(self, graph: fx.GraphModule) -> None:
        assert targets(lowering_graph(graph)) == ["t3c.rms_norm"]


def test_a_norm_over_another_axis_stays() -> None:
    graph = elastic_graph(Spelled(1), [torch.randn(2, 5, 8)])[0]
    assert "t3c.rms_norm" not in targets(lowering_graph(graph))


class TestSpellViews(PassConformance):
    @pytest.fixture(scope="class")
    def step(self) -> AbstractPass:
        return SpellViews()

    @pytest.fixture(scope="class")
    def inputs(self) -> list[Tensor]:
        return [torch.randn(2, 3, 4)]

    @pytest.fixture(scope="class")
    def graph(self, inputs: list[Tensor]) -> fx.GraphModule:
        class Reshapes(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.transpose(1, 2).reshape(2, 12).reshape(4, 6)

        return captured_graph(Reshapes(), inputs)

    def test_copies_are_said(self, graph: fx.GraphModule) -> None:
        after, _ = run_passes(graph, [SpellViews()])
        assert targets(after) == ["transpose.int", "clone", "view", "view"]


def test_site_cannot_run_outside_a_library() -> None:
    x = torch.randn(2, 4)
    low = lowering_graph(elastic_graph(nn.Linear(4, 3), [x])[0])
    with pytest.raises(RuntimeError, match="site 'weight' has no weights in a lowering graph"):
        low(x)
