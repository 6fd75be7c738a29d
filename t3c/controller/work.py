"""What the network does besides its elastic layers: multiply-adds, bytes, calls, live memory."""

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from t3c.cost_models.base import Work

_PRODUCTS = ("matmul", "bmm", "mm", "addmm", "baddbmm", "linear")


def rest_of(graph: fx.GraphModule, values: Mapping[fx.Node, Any]) -> Work:
    """Work of every node that is no elastic site; views cost nothing.

    Args:
        graph: The elastic graph.
        values: Value of every node, from one run.
    """
    macs = moved = calls = 0
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        out = _tensors(values.get(node))
        ins = [t for source in node.all_input_nodes for t in _tensors(values.get(source))]
        if not out or _storages(out) <= _storages(ins):
            continue
        macs += _macs(node, ins, out)
        moved += sum(t.nbytes for t in (*ins, *out))
        calls += 1
    return Work(macs, moved, calls)


def peak_bytes(graph: fx.GraphModule, values: Mapping[fx.Node, Any]) -> int:
    """Most bytes of activations alive at once, views counted with what they look into."""
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    born: dict[int, int] = {}
    dies: dict[int, int] = {}
    size: dict[int, int] = {}
    for node, at in order.items():
        if node.op == "get_attr":
            continue
        last = max((order[user] for user in node.users), default=at)
        for tensor in _tensors(values.get(node)):
            key = tensor.untyped_storage().data_ptr()
            born[key] = min(born.get(key, at), at)
            dies[key] = max(dies.get(key, last), last)
            size[key] = tensor.untyped_storage().nbytes()
    change = [0] * (len(order) + 1)
    for key, at in born.items():
        change[at] += size[key]
        change[dies[key] + 1] -= size[key]
    alive = most = 0
    for delta in change:
        alive += delta
        most = max(most, alive)
    return most


def other_bytes(graph: fx.GraphModule) -> int:
    """Bytes of parameters and constants that are in no elastic module."""
    seen: dict[int, int] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value: Any = graph
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if isinstance(value, Tensor):
                seen[value.untyped_storage().data_ptr()] = value.nbytes
    return sum(seen.values())


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _storages(tensors: list[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def _macs(node: fx.Node, ins: list[Tensor], out: list[Tensor]) -> int:
    """Multiply-adds of products, convolutions and attention; 0 for everything else."""
    name = str(node.target).removeprefix("aten.").split(".")[0]
    if name in _PRODUCTS and ins:
        return out[0].numel() * ins[1 if name in ("addmm", "baddbmm") else 0].shape[-1]
    if name.startswith("conv") and len(ins) > 1:
        return out[0].numel() * prod(ins[1].shape[1:])
    if name.startswith("scaled_dot_product") and len(ins) > 2:
        return ins[0].numel() * ins[1].shape[-2] + out[0].numel() * ins[1].shape[-2]
    return 0
