"""How much a change of a layer's output moves the model's outputs: norms of Jacobians.

One forward run of the original keeps its autograd graph, which gives J^T u for any layer; J v is
the forward derivative of what depends on the layer. Both together are a step of power iteration.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from t3c.certificate.outputs import Batch, samples_in
from t3c.elastic.layer import ElasticLayer
from t3c.elastic.model import ElasticModel
from t3c.passes.nodes import dependents

ITERATIONS = 20
"""Most steps of power iteration for one layer and batch."""
SETTLED = 0.005
"""Relative growth in one step below which a gain counts as found; it stays a lower estimate."""
DIFFERENCE = 1e-3
"""Step of a difference quotient, as a share of the norm of the layer's output."""
PROBES = 4
"""Random projections of the outputs whose gradients describe what reaches them."""


_make_dual: Callable[[Tensor, Tensor], Tensor] = vars(forward_ad)["make_dual"]
_unpack_dual: Callable[[Tensor], Any] = vars(forward_ad)["unpack_dual"]


@dataclass(frozen=True, slots=True)
class Gains:
    """What reaches the outputs from every layer's output.

    Attributes:
        norm: Site -> Jacobian norm from its output to the model's outputs, mean over the inputs.
        slopes: Site -> mean over inputs and random projections of sum over rows of g g^T, [n, n].
        rows: Site -> rows of one input.
        measured: Sites with an iteration of their own; the others lie between their neighbours.
        inputs: Inputs behind the norms of the first site.
        seconds: Time it took.
    """

    norm: Mapping[str, float]
    slopes: Mapping[str, Tensor]
    rows: Mapping[str, float]
    measured: frozenset[str]
    inputs: int
    seconds: float


def calls_of(elastic: ElasticModel) -> dict[fx.Node, ElasticLayer]:
    """Every call of a site in graph order, with its layer."""
    found = {}
    for node in elastic.graph.graph.nodes:
        if node.op == "call_module":
            layer = elastic.graph.get_submodule(str(node.target))
            if isinstance(layer, ElasticLayer):
                found[node] = layer
    return found


def rows_of(layer: ElasticLayer, value: Tensor) -> Tensor:
    """Outputs of a layer as rows: [positions or pixels, features or channels]."""
    value = value if layer.weight.dim() == 2 else value.movedim(1, -1)
    return value.reshape(-1, value.shape[-1])


def gains(elastic: ElasticModel, batches: Sequence[Batch], *, seconds: float = math.inf) -> Gains:
    """Jacobian norms and gradients of every site.

    Args:
        elastic: The model; the original is differentiated.
        batches: Flat inputs, at least one.
        seconds: Time for the iterations, overrun by one of them; gradients come on top. Sites come
            in strides, so that what is cut short covers the whole depth.
    """
    start = time.monotonic()
    calls = calls_of(elastic)
    names = list(elastic.sites)
    stride = max(1, math.isqrt(len(names)))
    spread = [name for first in range(stride) for name in names[first::stride]]
    norms: dict[str, list[float]] = {name: [] for name in names}
    slopes: dict[str, Tensor] = {}
    rows: dict[str, float] = {}
    count = 0
    for number, batch in enumerate(batches):
        if number and time.monotonic() - start > seconds:
            break
        run = _Run(elastic, calls, batch)
        count += run.samples
        for name, (gram, length) in run.grams().items():
            slopes[name] = slopes.get(name, 0) + gram
            rows[name] = length
        for name in spread:
            if time.monotonic() - start > seconds and any(norms.values()):
                break
            norms[name] += run.norms(name)
    measured = frozenset(name for name, found in norms.items() if found)
    return Gains(
        _between(names, {n: math.fsum(norms[n]) / len(norms[n]) for n in measured}),
        {name: gram / count for name, gram in slopes.items()},
        rows,
        measured,
        max((len(found) for found in norms.values()), default=0),
        time.monotonic() - start,
    )


def _between(names: Sequence[str], known: Mapping[str, float]) -> dict[str, float]:
    """Values of all names, in order; a missing one is the geometric mean of its neighbours'."""
    at = {i: known[n] for i, n in enumerate(names) if n in known}
    found = {}
    for i, name in enumerate(names):
        before = max((j for j in at if j <= i), default=None)
        after = min((j for j in at if j >= i), default=None)
        ends = [at[j] for j in (before, after) if j is not None]
        found[name] = math.sqrt(ends[0] * ends[-1]) if ends else math.inf
    return found


class _Run:
    """The original on one batch, ready to be differentiated."""

    def __init__(
        self, elastic: ElasticModel, calls: Mapping[fx.Node, ElasticLayer], batch: Batch
    ) -> None:
        self.elastic, self.calls = elastic, calls
        self.order = {node: i for i, node in enumerate(elastic.graph.graph.nodes)}
        recorder = _Recorder(elastic.graph, set(calls))
        with torch.enable_grad(), elastic.using(None):
            result = recorder.run(*batch)
        self.env = recorder.env
        self.values = {node: recorder.values[node] for node in calls if node in recorder.values}
        leaves = [y for y in pytree.tree_leaves(result) if _is_float(y)]
        self.samples = samples_in(batch, leaves)
        self.outputs = [y for y in leaves if y.requires_grad]
        self.slots = [i for i, y in enumerate(leaves) if y.requires_grad]

    def grams(self) -> dict[str, tuple[Tensor, float]]:
        """Site -> sum over inputs and rows of the mean of g g^T over projections; rows an input."""
        found: dict[str, tuple[Tensor, float]] = {}
        nodes = list(self.values)
        if not nodes:
            return found
        for seed in range(PROBES):
            draw = torch.Generator().manual_seed(seed)
            probes = [torch.randn(y.shape, generator=draw).to(y) for y in self.outputs]
            slopes = self._pull([self.values[node] for node in nodes], probes)
            for node, slope in zip(nodes, slopes, strict=True):
                layer = self.calls[node]
                g = rows_of(layer, slope)
                gram, length = g.T @ g / PROBES, len(g) / self.samples
                name = layer.site.name
                if name in found:
                    before = found[name]
                    gram, length = before[0] + gram, before[1] + (0 if seed else length)
                found[name] = gram, length
        return found

    def norms(self, site: str) -> list[float]:
        """Jacobian norm of each input (one for all where the layer mixes inputs' axes)."""
        nodes = [n for n in self.values if self.calls[n].site.name == site]
        if not nodes or not self.outputs:
            return [0.0]
        values = [self.values[n] for n in nodes]
        split = self.samples if all(v.shape[:1] == (self.samples,) for v in values) else 1
        after = self._after(nodes)
        draw = torch.Generator().manual_seed(len(site))
        u = [torch.randn(y.shape, generator=draw).to(y) for y in self.outputs]
        best = torch.zeros(split)
        for _ in range(ITERATIONS):
            v = _unit(self._pull(values, u), split)
            u = self._push(dict(zip(nodes, v, strict=True)), after)
            size = _norms(u, split)
            grown, best = bool((size > best * (1 + SETTLED)).any()), torch.maximum(best, size)
            if not grown:
                break
        return [float(x) for x in best]

    def _pull(self, values: Sequence[Tensor], u: Sequence[Tensor]) -> list[Tensor]:
        """J^T u for each value."""
        if not self.outputs:
            return [torch.zeros_like(v) for v in values]
        found = torch.autograd.grad(
            self.outputs, values, u, allow_unused=True, retain_graph=True, materialize_grads=True
        )
        return list(found)

    def _push(self, tangents: Mapping[fx.Node, Tensor], after: Sequence[fx.Node]) -> list[Tensor]:
        """J v: forward derivatives, or a difference quotient where an operator has none."""
        try:
            return self._derivative(tangents, after)
        except NotImplementedError:  # torch's own, of an operator without a forward derivative
            return self._quotient(tangents, after)

    @torch.no_grad()
    def _derivative(
        self, tangents: Mapping[fx.Node, Tensor], after: Sequence[fx.Node]
    ) -> list[Tensor]:
        exact = sdpa_kernel(SDPBackend.MATH)  # the fused one has no forward derivative
        with exact, forward_ad.dual_level():
            moved = {node: _make_dual(torch.zeros_like(v), v) for node, v in tangents.items()}
            leaves = self._replay(moved, after)
            found = [_unpack_dual(leaves[i]) for i in self.slots]
        return [
            torch.zeros_like(y.primal) if y.tangent is None else y.tangent.detach() for y in found
        ]

    @torch.no_grad()
    def _quotient(
        self, tangents: Mapping[fx.Node, Tensor], after: Sequence[fx.Node]
    ) -> list[Tensor]:
        size = sum(float(self.values[node].detach().norm()) for node in tangents)
        step = DIFFERENCE * max(size, 1e-6)
        ends = [
            self._replay({node: sign * step * v for node, v in tangents.items()}, after)
            for sign in (1, -1)
        ]
        return [(ends[0][i] - ends[1][i]) / (2 * step) for i in self.slots]

    def _replay(self, moved: Mapping[fx.Node, Tensor], after: Sequence[fx.Node]) -> list[Tensor]:
        """Float outputs with something added to the outputs of calls."""
        runner = fx.Interpreter(self.elastic.graph, garbage_collect_values=False)
        runner.env = {
            node: value.detach() if isinstance(value, Tensor) else value
            for node, value in self.env.items()
        }
        result: Any = None
        with self.elastic.using(None):
            for node in after:
                result = runner.run_node(node)
                result = result + moved[node] if node in moved else result
                runner.env[node] = result
        return [y for y in pytree.tree_leaves(result) if _is_float(y)]

    def _after(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """The calls and everything that depends on them, in order."""
        return sorted(dependents(nodes), key=self.order.__getitem__)


class _Recorder(fx.Interpreter):
    """Keeps every value, and site outputs as places where gradients arrive."""

    def __init__(self, graph: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.wanted = wanted
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run the node; keep it if it is a site."""
        result = super().run_node(n)
        if n in self.wanted:
            if not result.requires_grad:  # frozen parameters: gradients start here
                result.requires_grad_()
            self.values[n] = result
        return result


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _norms(tensors: Sequence[Tensor], split: int) -> Tensor:
    flat = torch.cat([t.reshape(split, -1) for t in tensors], 1)
    norms: Tensor = flat.norm(dim=1)
    return norms


def _unit(tensors: Sequence[Tensor], split: int) -> list[Tensor]:
    size = _norms(tensors, split).clamp_min(1e-30)
    return [(t.reshape(split, -1) / size[:, None]).reshape(t.shape) for t in tensors]
