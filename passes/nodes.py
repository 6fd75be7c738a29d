"""Small helpers on FX graphs at ATen level: constants, shapes, new nodes."""

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from t3c.core.errors import PassError

aten = torch.ops.aten

Key = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def is_call(node: object, *targets: object) -> bool:
    """Whether `node` calls one of these functions."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or keyword, or its default."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def constant(gm: fx.GraphModule, node: object) -> Tensor | None:
    """The tensor that a get_attr node reads; None for any other node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: object = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, Tensor) else None


def key_of(value: Tensor) -> Key:
    """Identity of a tensor's storage and view: equal for tied weights."""
    return value.data_ptr(), int(value.storage_offset()), tuple(value.shape), tuple(value.stride())


def value_of(node: object) -> Tensor:
    """The meta tensor (shape and dtype) that a node produces."""
    if isinstance(node, fx.Node):
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            return val
    raise PassError(f"node {node} has no known shape; capture the model again")


def as_node(arg: object) -> fx.Node:
    """An argument that must be a node."""
    if isinstance(arg, fx.Node):
        return arg
    raise PassError(f"argument {arg!r} is no node of the graph")


def shape_of(node: object) -> tuple[int, ...]:
    """The static shape that a node produces."""
    return tuple(int(n) for n in value_of(node).shape)


def on_meta(value: Tensor) -> Tensor:
    """Shape, strides and dtype of a tensor without its data."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _meta(arg: Any) -> Any:
    if isinstance(arg, fx.Node):
        several = arg.meta.get("val")  # of unbind, split and the like
        return several if isinstance(several, list | tuple) else value_of(arg)
    if isinstance(arg, list | tuple):
        return type(arg)(_meta(a) for a in arg)
    return arg


def emit(graph: fx.Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call at the graph's insertion point, with its shape worked out."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*_meta(args), **{k: _meta(v) for k, v in kwargs.items()})
    return node


def recompute(node: fx.Node) -> None:
    """Work out the shape and strides of a call again from its arguments."""
    if isinstance(node.target, str):
        return
    kwargs = {k: _meta(v) for k, v in node.kwargs.items()}
    if "device" in kwargs:
        kwargs["device"] = torch.device("meta")
    node.meta["val"] = node.target(*_meta(node.args), **kwargs)


def _exists(gm: fx.GraphModule, target: str) -> bool:
    value: object = gm
    for part in target.split("."):
        if not isinstance(value, torch.nn.Module):
            raise PassError(f"cannot store {target!r}: a tensor has the name of its module")
        known = vars(value)
        found = next(
            (known[k][part] for k in ("_modules", "_parameters", "_buffers") if part in known[k]),
            None,
        )
        if found is None:
            return part in value.__dict__
        value = found
    return True


def add_constant(gm: fx.GraphModule, target: str, value: Tensor, *, parameter: bool) -> fx.Node:
    """Store a tensor under `target` (numbered if taken) and read it at the insertion point."""
    name, count = target, 1
    while _exists(gm, name):
        count += 1
        name = f"{target}_{count}"
    *path, leaf = name.split(".")
    owner: torch.nn.Module = gm
    for part in path:
        if part not in owner._modules:  # pyright: ignore[reportPrivateUsage]
            owner.add_module(part, torch.nn.Module())
        owner = owner.get_submodule(part)
    if parameter and value.is_floating_point():
        owner.register_parameter(leaf, torch.nn.Parameter(value))
    else:
        owner.register_buffer(leaf, value)
    node = gm.graph.get_attr(name)
    node.meta["val"] = on_meta(value)
    return node


def at_top(gm: fx.GraphModule) -> Any:
    """Insertion point before the first node that is not a constant."""
    first = next(n for n in gm.graph.nodes if n.op != "get_attr")
    return gm.graph.inserting_before(first)


def replace(old: fx.Node, new: fx.Node) -> None:
    """Give all uses of `old` to `new` and remove `old`."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def path_of(gm: fx.GraphModule, node: fx.Node, weight: fx.Node) -> str:
    """The user's path of a layer: its weight's name without ``.weight``."""
    name = str(weight.meta.get("owner", weight.target))
    return re.sub(r"\.weight(_\d+)?$", "", name)


def positions(graph: fx.Graph) -> dict[fx.Node, int]:
    """Place of every node in the graph's order."""
    return {node: i for i, node in enumerate(graph.nodes)}


def result_of(node: fx.Node) -> fx.Node | None:
    """Output 0 of a node with several; None where another output is used."""
    users = list(node.users)
    if len(users) == 1 and is_call(users[0], operator.getitem) and users[0].args[1] == 0:
        return users[0]
    return None


def dependents(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes and everything that uses them, directly or not."""
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.users)
    return seen
