"""What every pass keeps."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from t3c.core.report import Row
from t3c.elastic.conv import ElasticConv
from t3c.elastic.layer import ElasticLayer
from t3c.elastic.linear import ElasticLinear
from t3c.elastic.snap import Snap
from t3c.passes.base import AbstractPass, run_passes
from t3c.passes.capture import capture
from t3c.passes.dead_code import DeadCode
from t3c.passes.drop_dropout import DropDropout
from t3c.passes.pipeline import elastic_passes
from t3c.passes.reference import Reference
from t3c.passes.sites import EVERYTHING, Choice, Makers

MAKERS = Makers(ElasticLinear, ElasticConv, Snap)
CLEAN: tuple[AbstractPass, ...] = (DropDropout(), DeadCode())


def captured_graph(
    model: nn.Module, inputs: Sequence[Tensor], before: Sequence[AbstractPass] = CLEAN
) -> fx.GraphModule:
    """A captured graph after some passes."""
    torch.manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(part.get_buffer("running_mean"))
            nn.init.uniform_(part.get_buffer("running_var"), 0.5, 2.0)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    return run_passes(capture(model.eval(), tuple(inputs)).graph, before)[0]


def elastic_graph(
    model: nn.Module, inputs: Sequence[Tensor], choice: Choice = EVERYTHING
) -> tuple[fx.GraphModule, tuple[Row, ...]]:
    """Capture and every pass up to elastic sites."""
    return run_passes(captured_graph(model, inputs, ()), elastic_passes(MAKERS, choice))


def layers(gm: fx.GraphModule) -> dict[str, ElasticLayer]:
    """Elastic modules by site name."""
    return {m.site.name: m for m in gm.modules() if isinstance(m, ElasticLayer)}


def run(
    gm: fx.GraphModule, inputs: Sequence[Tensor], sites: dict[str, ElasticLayer]
) -> list[Tensor]:
    """Outputs, placeholders of sites included."""
    with torch.no_grad():
        return list(Reference(gm, sites).run(*inputs))


def targets(gm: fx.GraphModule) -> list[str]:
    """Names of the operators, in order."""
    calls = [n for n in gm.graph.nodes if n.op in ("call_function", "call_module")]
    return [str(n.target).removeprefix("aten.").removesuffix(".default") for n in calls]


class PassConformance:
    """What every pass keeps. Subclass it; give `step`, `graph` (a captured graph) and `inputs`."""

    def test_function_stays(
        self, step: AbstractPass, graph: fx.GraphModule, inputs: list[Tensor]
    ) -> None:
        after, _ = run_passes(graph, [step])
        sites = layers(graph)
        for want, got in zip(
            run(graph, inputs, sites), run(after, inputs, {**sites, **layers(after)}), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_pass_changes_something(self, step: AbstractPass, graph: fx.GraphModule) -> None:
        assert str(run_passes(graph, [step])[0].graph) != str(graph.graph)

    def test_input_is_untouched(self, step: AbstractPass, graph: fx.GraphModule) -> None:
        text = str(graph.graph)
        state = {k: v.clone() for k, v in graph.state_dict().items()}
        run_passes(graph, [step])
        assert str(graph.graph) == text
        assert graph.state_dict().keys() == state.keys()
        assert all(torch.equal(v, state[k]) for k, v in graph.state_dict().items())

    def test_second_run_changes_nothing(self, step: AbstractPass, graph: fx.GraphModule) -> None:
        once, _ = run_passes(graph, [step])
        twice, rows = run_passes(once, [step])
        assert str(twice.graph) == str(once.graph)
        assert not [r for r in rows if r.outcome == "rewritten"]

    def test_shapes_are_right(
        self, step: AbstractPass, graph: fx.GraphModule, inputs: list[Tensor]
    ) -> None:
        after, _ = run_passes(graph, [step])
        seen: dict[fx.Node, object] = {}

        class Spy(Reference):
            def run_node(self, n: fx.Node) -> object:
                seen[n] = super().run_node(n)
                return seen[n]

        with torch.no_grad():
            Spy(after, {**layers(graph), **layers(after)}).run(*inputs)
        for node, value in seen.items():
            if isinstance(value, Tensor):
                assert node.meta["val"].shape == value.shape, node
                assert node.meta["val"].dtype == value.dtype, node
