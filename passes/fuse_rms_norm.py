"""The norm of Llama and its kin, spelled out by the exporter, becomes one operator."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import fx

from t3c.passes.base import AbstractPass, Log
from t3c.passes.nodes import argument, aten, emit, is_call, replace, shape_of, value_of
from t3c.passes.torch_ops import RMS_NORM


@final
@dataclass(frozen=True, slots=True)
class FuseRmsNorm(AbstractPass):
    """Replace a root mean square norm over the last axis with a gain.

    Before: y = gain * (x * rsqrt(mean(x ** 2, -1) + eps))
    After:  y = t3c.rms_norm(x, gain, eps)
    """

    name: ClassVar[str] = "fuse-rms-norm"

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Fuse every norm that fits; what is left of it is dead code."""
        for node in list(gm.graph.nodes):
            found = _spelled_out(node) or _whole(node)
            if found is None:
                continue
            x, gain, eps = found
            with gm.graph.inserting_before(node):
                new = emit(gm.graph, RMS_NORM, x, gain, eps)
            new.meta["path"] = node.meta.get("path", "")
            replace(node, new)


Found = tuple[fx.Node, fx.Node, float]


def _spelled_out(node: fx.Node) -> Found | None:
    """(x, gain, eps) of the last product of a norm."""
    for gain, scaled in _factors(node):
        for x, root in _factors(scaled):
            eps = _eps(root, x)
            if eps is not None and _fits(x, gain):
                return x, gain, eps
    return None


def _whole(node: fx.Node) -> Found | None:
    """(x, gain, eps) of torch's own operator."""
    if not is_call(node, aten.rms_norm.default):
        return None
    x, gain, eps = node.args[0], argument(node, 2, "weight"), argument(node, 3, "eps")
    if not (isinstance(x, fx.Node) and isinstance(gain, fx.Node) and _fits(x, gain)):
        return None
    return x, gain, torch.finfo(torch.float32).eps if eps is None else float(eps)


def _factors(node: object) -> list[tuple[Any, Any]]:
    """Both orders of the factors of a product of two tensors."""
    if not isinstance(node, fx.Node) or not is_call(node, aten.mul.Tensor):
        return []
    a, b = node.args[:2]
    return [(a, b), (b, a)] if isinstance(a, fx.Node) and isinstance(b, fx.Node) else []


def _eps(root: Any, x: fx.Node) -> float | None:
    """Eps, if `root` is rsqrt(mean(x ** 2, -1) + eps)."""
    if not is_call(root, aten.rsqrt.default):
        return None
    total: Any = root.args[0]
    if not is_call(total, aten.add.Tensor) or not isinstance(total.args[1], float):
        return None
    mean: Any = total.args[0]
    if not is_call(mean, aten.mean.dim) or not argument(mean, 2, "keepdim", False):
        return None
    axes = [int(a) % len(shape_of(x)) for a in mean.args[1]]
    return total.args[1] if axes == [len(shape_of(x)) - 1] and _square(mean.args[0], x) else None


def _square(node: Any, x: fx.Node) -> bool:
    if is_call(node, aten.pow.Tensor_Scalar):
        return node.args[0] is x and node.args[1] == 2
    return is_call(node, aten.mul.Tensor) and node.args[0] is x and node.args[1] is x


def _fits(x: fx.Node, gain: fx.Node) -> bool:
    """Whether the gain is one float32 for each element of the last axis."""
    kinds = {value_of(x).dtype, value_of(gain).dtype}
    return kinds == {torch.float32} and shape_of(gain) == shape_of(x)[-1:]
