"""From a cell of inputs to a form of the output difference, along the graph."""

import math
import operator
from collections.abc import Callable
from typing import Any

import networkx
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from t3c.certificate.sound import normed, pair
from t3c.certificate.sound.attention import attention, weighted
from t3c.certificate.sound.domain import Ball, Cell
from t3c.certificate.sound.form import Form, Mode, NoRule, Space, constant
from t3c.certificate.sound.pair import Pair
from t3c.certificate.sound.product import elementwise, multiplied
from t3c.certificate.sound.sites import site
from t3c.certificate.sound.slopes import CURVES
from t3c.elastic.layer import ElasticLayer
from t3c.elastic.model import ElasticModel
from t3c.elastic.snap import Snap
from t3c.elastic.table import Table
from t3c.passes.base import run_passes
from t3c.passes.fuse_rms_norm import FuseRmsNorm
from t3c.passes.torch_ops import RMS_NORM

aten = torch.ops.aten
_VIEWS = (
    aten.reshape.default,
    aten.view.default,
    aten.flatten.using_ints,
    aten.transpose.int,
    aten.permute.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten._unsafe_view.default,
    aten.clone.default,
    aten.contiguous.default,
)
_REPEATS = (aten.expand.default,)
_PARTS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
_AVERAGES = (aten.mean.dim, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default)


def spread(elastic: ElasticModel, cell: Cell, mode: Mode, cap: int) -> tuple[list[Pair], Space]:
    """Every output of the graph in the formats in force, beside the original.

    Raises:
        NoRule: A node has no rule.
    """
    space = Space(mode, cap)
    graph, _ = run_passes(elastic.graph, (FuseRmsNorm(),))
    known = _inputs(elastic, graph, cell, space)
    outputs: list[Pair] = []
    for node in networkx.lexicographical_topological_sort(*_dag(graph)):
        if node.op == "output":
            outputs = [known[n].settled() for n in node.args[0] if isinstance(known.get(n), Pair)]
        elif node.op == "get_attr":
            known[node] = _attribute(graph, str(node.target))
        elif node not in known:
            known[node] = _step(graph, node, known, space)
    return outputs, space


def _dag(graph: fx.GraphModule) -> tuple[Any, Callable[[fx.Node], int]]:
    """The nodes that outputs depend on, and their order in the program."""
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    dag = networkx.DiGraph()
    dag.add_nodes_from(order)
    dag.add_edges_from((source, node) for node in order for source in node.all_input_nodes)
    end = next(node for node in order if node.op == "output")
    return dag.subgraph({end, *networkx.ancestors(dag, end)}), lambda node: order[node]


def _inputs(
    elastic: ElasticModel, graph: fx.GraphModule, cell: Cell, space: Space
) -> dict[fx.Node, Any]:
    places = [n for n in graph.graph.nodes if n.op == "placeholder"]
    if len(places) != len(cell):
        raise ValueError(f"the domain has {len(cell)} inputs, the model {len(places)}")
    known: dict[fx.Node, Any] = {}
    for node, region, example in zip(places, cell, elastic.example_inputs, strict=True):
        shape = region.center.shape if isinstance(region, Ball) else region.low.shape
        if shape != example.shape:
            raise ValueError(f"the domain's {node} is {tuple(shape)}, not {tuple(example.shape)}")
        if isinstance(region, Ball):
            if len(cell) > 1 and space.values:
                raise ValueError("a ball is for models of one input; give boxes")
            x = constant(space, region.center)
            if space.mode == "symbols":
                n = x.c.numel()
                eye = torch.eye(n, dtype=torch.float64) * region.radius
                space.ball, space.values = n, n
                x = Form(space, x.c, eye.reshape(n, *shape), x.h, x.e, 0.0)
            else:
                x = x.remainder(torch.full_like(x.c, region.radius), region.radius)
        elif region.low.is_floating_point():
            low, high = region.low.double(), region.high.double()
            x = constant(space, (low + high) / 2).widened((high - low) / 2, symbol="value")
            x = x.widened(1e-15 * torch.maximum(low.abs(), high.abs()))  # float64's own rounding
        else:
            known[node] = (region.low.long(), region.high.long())
            continue
        known[node] = Pair(x, constant(space, torch.zeros_like(x.c)))
    return known


def _attribute(graph: fx.GraphModule, target: str) -> Any:
    value: Any = graph
    for part in target.split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, Tensor) else value


def _step(graph: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any], space: Space) -> Any:
    weights = node.args[0] if node.target in _MEANS else None

    def value(n: fx.Node) -> Any:
        found = known[n]
        return found.settled() if isinstance(found, Pair) and n is not weights else found

    args = map_arg(node.args, value)
    if node.target in _MEANS and isinstance(args[1], Pair):
        args = args[0], args[1].settled()  # shares that are averaged by themselves
    kwargs = map_arg(node.kwargs, value)
    name = f"node {node.name!r} ({node.target})"
    try:
        if node.op == "call_module":
            found = _module(graph.get_submodule(str(node.target)), args[0], space)
        else:
            found = _function(node, args, dict(kwargs), space)
    except NoRule as error:
        raise NoRule(f"{name} has no rule: {error}") from error
    if isinstance(found, Pair) and not (found.x.finite and found.d.finite):
        raise NoRule(f"{name}: no finite bound")
    return found


def _module(module: Any, p: Any, space: Space) -> Pair:
    match module:
        case ElasticLayer() if isinstance(p, Pair):
            return site(module, p)
        case Snap() if isinstance(p, Pair):
            if module.grid is None or not module.active:
                return p
            return pair.snapped(p, module.grid)
        case Table():
            codes, scale = module.table_codes()
            after = codes.double() * scale.double() if module.active else module.weight.detach()
            return _rows(module.weight.detach(), after, p, space)
        case _:
            raise NoRule(type(module).__name__)


def _rows(table: Tensor, after: Tensor, ids: Any, space: Space) -> Pair:
    """An embedding: at each position the hull of the rows that may be read."""
    if not isinstance(ids, tuple):
        raise NoRule("indices that are no input")
    table, error = table.double(), after.double() - table.double()
    low, high = ids
    if int(low.min()) < 0 or int(high.max()) >= len(table):
        raise ValueError(f"token inputs must lie in [0, {len(table) - 1}]")

    def hull(rows: Tensor, symbol: str) -> Form:
        parts = [
            (rows[int(a) : int(b) + 1].amin(0), rows[int(a) : int(b) + 1].amax(0))
            for a, b in zip(low.flatten(), high.flatten(), strict=True)
        ]
        least = torch.stack([p[0] for p in parts]).reshape(*low.shape, -1)
        most = torch.stack([p[1] for p in parts]).reshape(*low.shape, -1)
        return constant(space, (least + most) / 2).widened((most - least) / 2, symbol=symbol)

    found = Pair(hull(table, "value"), hull(error, "error"))
    return Pair(found.x, found.d.widened(2 * pair.U * found.changed.peak))


def _function(node: fx.Node, args: Any, kwargs: dict[str, Any], space: Space) -> Any:
    target: Any = node.target
    p = args[0]
    if target is aten.embedding.default:
        return _rows(args[0], args[0], args[1], space)
    if target is operator.getitem:
        return p[args[1]]
    if target in _PRODUCTS and isinstance(p, Tensor) and isinstance(args[1], Pair):
        p, args = args[1], (args[1], p)  # a constant comes second
    if not isinstance(p, Pair):
        raise NoRule("its first argument is no float of the model")
    if target in _VIEWS or target in _REPEATS:
        norm = 1.0 if target in _VIEWS else None
        return _same(p, lambda t: target(t, *args[1:], **kwargs), norm, 0)
    if target in _PARTS:
        return _parts(p, lambda t: target(t, *args[1:], **kwargs))
    mixing = _mixing(target, args, kwargs)
    if mixing is not None:
        return mixing
    if target in _AVERAGES:
        terms = averaged(target, args, p.x.c.shape) + 2
        return _same(p, lambda t: target(t, *args[1:], **kwargs), None, terms)
    if target is aten.relu.default:
        return pair.relu(p)
    if target in _SMOOTH:
        return pair.curve(p, CURVES[_SMOOTH[target]])
    if target is aten.gelu.default:
        kind = kwargs.get("approximate", "none")
        return pair.curve(p, CURVES["gelu" if kind == "none" else "gelu-tanh"])
    if target is aten.max_pool2d.default:
        return _max_pool(p, lambda t: target(t, *args[1:], **kwargs))
    if target is aten.add.Tensor and kwargs.get("alpha", 1) == 1:
        return _added(p, args[1], space)
    if target is aten.sub.Tensor and kwargs.get("alpha", 1) == 1:
        b = args[1]
        return _added(p, Pair(-b.x, -b.d) if isinstance(b, Pair) else -b, space)
    if target is aten.mul.Tensor and isinstance(args[1], Pair):
        return elementwise(p, args[1])
    if target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(args[1], int | float | Tensor):
        factor = torch.as_tensor(args[1], dtype=torch.float64)
        if (factor * p.x.c).shape != p.x.c.shape:
            raise NoRule("a constant factor larger than its value")
        by = factor if target is aten.mul.Tensor else 1 / factor
        return Pair(p.x.scaled(by), p.d.scaled(by)).rounded(3)
    raise NoRule("unknown operator")


_SMOOTH = {
    aten.silu.default: "silu",
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
    aten.erf.default: "erf",
}
_PRODUCTS = (aten.add.Tensor, aten.mul.Tensor)
_MEANS = (aten.matmul.default, aten.bmm.default)


def _mixing(target: Any, args: Any, kwargs: dict[str, Any]) -> Pair | None:
    """Norms, softmax, attention, products; None: none of them."""
    p: Pair = args[0]
    if target is aten.layer_norm.default:
        given: tuple[Any, ...] = (*args, *(None, None, 1e-5)[len(args) - 2 :])[:5]
        x, shape, gain, bias, eps = given
        _last(shape, x)
        return normed.norm(x, gain, bias, eps, centred=True)
    if target is aten.rms_norm.default:
        given = (*args, *(None, None)[len(args) - 2 :])[:4]
        x, shape, gain, least = given
        _last(shape, x)
        eps = torch.finfo(torch.float32).eps if least is None else least
        return normed.norm(x, gain, None, eps, centred=False)
    if target is RMS_NORM:
        return normed.norm(p, args[1], None, args[2], centred=False)
    if target in (aten.softmax.int, aten._softmax.default):
        if args[1] % p.x.c.dim() != p.x.c.dim() - 1:
            raise NoRule("a softmax along another than the last axis")
        made = normed.softmax(p)
        return Pair(made.x, made.d, shares=normed.roundings(p))
    if target is aten.scaled_dot_product_attention.default:
        return _attend(args, kwargs)
    if target in _MEANS:
        b = args[1]
        if not isinstance(b, Pair) or p.x.c.shape[:-2] != b.x.c.shape[:-2]:
            raise NoRule("a product with a constant, or of batches that differ")
        if min(p.x.c.dim(), b.x.c.dim()) < 2:
            raise NoRule("a product with a vector")
        if p.shares is not None:
            return weighted(p, b, p.shares)
        return multiplied(p, b, p.x.c.shape[-1] + 8)
    return None


def _parts(p: Pair, split: Callable[[Tensor], Any]) -> list[Pair]:
    def part(i: int) -> Pair:
        return _same(p, lambda t: split(t)[i], 1.0, 0)

    return [part(i) for i in range(len(split(p.x.c)))]


def _last(shape: Any, p: Pair) -> None:
    if len(shape) != 1 or int(shape[0]) != p.x.c.shape[-1]:
        raise NoRule(f"a norm over {list(shape)}, not over the last axis")


def _attend(args: Any, kwargs: dict[str, Any]) -> Pair:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    if given.get("dropout_p") or not all(isinstance(t, Pair) for t in (q, k, v)):
        raise NoRule("attention with dropout, or of constants")
    if mask is not None and not isinstance(mask, Tensor):
        raise NoRule("a mask that depends on the inputs")
    if q.x.c.shape[:-2] != k.x.c.shape[:-2] or k.x.c.shape[:-1] != v.x.c.shape[:-1]:
        raise NoRule("heads that share keys and values")
    scale = given.get("scale")
    factor = 1 / math.sqrt(q.x.c.shape[-1]) if scale is None else float(scale)
    return attention(q, k, v, mask, bool(given.get("is_causal", False)), factor)


def averaged(target: Any, args: Any, shape: torch.Size) -> int:
    """Most terms that one average adds."""
    if target is aten.mean.dim:
        axes = range(len(shape)) if not args[1] else args[1]
        return math.prod(shape[a] for a in axes)
    sizes = [args[1]] * 2 if isinstance(args[1], int) else list(args[1]) * (3 - len(args[1]))
    if target is aten.avg_pool2d.default:
        return math.prod(sizes)
    return math.prod(math.ceil(n / out) + 1 for n, out in zip(shape[-2:], sizes, strict=True))


def _same(p: Pair, op: Callable[[Tensor], Tensor], norm: float | None, roundings: int) -> Pair:
    stacked = torch.vmap(op)
    return pair.linear(p, stacked, stacked, norm, roundings)


def _added(a: Pair, b: Any, space: Space) -> Pair:
    if isinstance(b, Pair):
        return Pair(a.x + b.x, a.d + b.d).rounded(1)
    if not isinstance(b, int | float | Tensor):
        raise NoRule("its second argument is no float of the model")
    other = constant(space, torch.as_tensor(b, dtype=torch.float32))  # as the operator reads it
    return Pair(a.x + other, a.d + constant(space, torch.zeros_like(other.c))).rounded(1)


def _max_pool(p: Pair, op: Callable[[Tensor], Tensor]) -> Pair:
    """Each output between the largest of the window's ends; windows may drop their symbols."""
    space = p.x.space

    def boxed(low: Tensor, high: Tensor, norm: float, symbol: str) -> Form:
        return constant(space, (low + high) / 2).widened((high - low) / 2, symbol=symbol)

    x = boxed(op(p.x.low), op(p.x.high), p.x.norm, "value")
    d = boxed(-op(-p.d.low), op(p.d.high), p.d.norm, "error")
    return Pair(x, d, p.grid)
