"""Activations and residual additions move into the placeholder before them."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import fx

from t3c.passes.base import AbstractPass, Log
from t3c.passes.nodes import argument, aten, is_call, replace, shape_of, value_of
from t3c.passes.torch_ops import SITE_CONV, SITE_LINEAR

_STEPS = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
}


@final
@dataclass(frozen=True, slots=True)
class FuseEpilogue(AbstractPass):
    """Fold what follows a placeholder into its epilogue, where nobody else reads the middle.

    Before: y = relu(t3c.site_conv(x, None, "conv", "") + r)
    After:  y = t3c.site_conv(x, r, "conv", "add,relu")

    The placeholder moves down to where the last step stood, so that the residual exists.
    """

    name: ClassVar[str] = "fuse-epilogue"
    most: int = 2  # steps: one activation and one addition is what kernels are written for

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Fuse until nothing changes along the graph."""
        for node in list(gm.graph.nodes):
            if not is_call(node, SITE_LINEAR, SITE_CONV):
                continue
            current: fx.Node | None = node
            while current is not None:
                current = self._absorb(gm, current)

    def _absorb(self, gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
        """The placeholder with one more step; None if there is none to take."""
        if len(node.users) != 1:
            return None
        user = next(iter(node.users))
        x, residual, site, epilogue, out = node.args
        steps = [s for s in str(epilogue).split(",") if s]
        step = _step(user)
        if len(steps) >= self.most or (step != "add" and any(s != "add" for s in steps)):
            return None
        if step == "add":
            other = _other(user, node)
            if other is None or residual is not None:
                return None
            residual = other
        elif step is None:
            return None
        with gm.graph.inserting_before(user):
            args = (x, residual, site, ",".join([*steps, step]), out)
            new = gm.graph.call_function(node.target, args)  # type: ignore[arg-type]
        new.meta = dict(node.meta)
        replace(user, new)
        gm.graph.erase_node(node)
        return new


def _step(user: fx.Node) -> str | None:
    """The epilogue step that a node is; None if it is none."""
    if is_call(user, aten.gelu.default):
        tanh = argument(user, 1, "approximate", "none") == "tanh"
        return "gelu-tanh" if tanh else "gelu"
    if is_call(user, aten.add.Tensor) and user.kwargs.get("alpha", 1) == 1:
        return "add"
    return _STEPS.get(user.target) if user.op == "call_function" else None  # type: ignore[call-overload]


def _other(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """The other summand, if it is another float32 tensor of the same shape."""
    others = [a for a in user.args if a is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    other = others[0]
    fits = shape_of(other) == shape_of(node) and value_of(other).dtype == torch.float32
    return other if fits else None
