"""Linear layers become elastic sites."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar, final

import torch
from torch import Tensor, fx

from t3c.core.sites import LinearSite
from t3c.passes.base import AbstractPass, Log
from t3c.passes.nodes import (
    argument,
    aten,
    constant,
    emit,
    is_call,
    key_of,
    path_of,
    shape_of,
    value_of,
)
from t3c.passes.sites import (
    EVERYTHING,
    Choice,
    MakeLinear,
    install,
    readers,
    refusal,
    site_names,
    unique,
)

_OTHERS = (aten.addmm.default, aten.bilinear.default)


@final
@dataclass(frozen=True, slots=True)
class RewriteLinear(AbstractPass):
    """Replace every aten.linear with a constant weight by a call of an elastic module.

    Before: y = linear(x, w, b)
    After:  y = sites.fc1(x)

    Layers that share a weight share a module and a site; where their biases differ the module has
    none and each layer adds its own.
    """

    name: ClassVar[str] = "rewrite-linear"
    make: MakeLinear
    choice: Choice = EVERYTHING

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Rewrite what can be; log all of them."""
        reads = readers(gm)
        done: set[fx.Node] = set()
        for node in list(gm.graph.nodes):
            if is_call(node, *_OTHERS):
                log.kept(
                    str(node.meta.get("path") or node.name), _op(node), "no constant [n, k] weight"
                )
            if not is_call(node, aten.linear.default) or node in done:
                continue
            weight = constant(gm, node.args[1])
            if weight is None:
                where = str(node.meta.get("path") or node.name)
                log.kept(where, "linear", "the weight is computed from the inputs")
                continue
            group = [user for _, user in reads[key_of(weight)]]
            done.update(user for user in group if is_call(user, aten.linear.default))
            self._group(gm, log, node, group, weight)

    def _group(
        self, gm: fx.GraphModule, log: Log, first: fx.Node, group: list[fx.Node], weight: Tensor
    ) -> None:
        """All readers of one weight: rewritten together or not at all."""
        where = path_of(gm, first, first.args[1])  # type: ignore[arg-type]
        ours = [u for u in group if is_call(u, aten.linear.default)]
        others = [u for u in group if u not in ours or constant(gm, u.args[0]) is not None]
        biases = [argument(u, 2, "bias") for u in ours]
        reason = refusal(weight, value_of(first.args[0]))
        if reason is None and others:
            reason = f"the weight is tied: {_op(others[0])} reads it too"
        if reason is None and any(b is not None and constant(gm, b) is None for b in biases):
            reason = "the bias is computed from the inputs"
        if reason is not None:
            for _ in ours:
                log.kept(where, "linear", reason)
            return
        left_out = self.choice.why_not(where)
        if left_out is not None:
            for _ in ours:
                log.skipped(where, "linear", left_out)
            return
        values = [constant(gm, b) for b in biases]
        shared = all(_equal(values[0], v) for v in values)
        bias = values[0] if shared else None
        n, k = weight.shape
        rows = sum(prod(shape_of(u)[:-1]) for u in ours)
        site = LinearSite(unique(where, site_names(gm)), n, k, rows, bias is not None)
        target = install(gm, site.name, self.make(site, weight, bias))
        for user, own in zip(ours, biases, strict=True):
            with gm.graph.inserting_before(user):
                new = gm.graph.call_module(target, (user.args[0],))
                new.meta = dict(user.meta)
                if not shared and own is not None:
                    new = emit(gm.graph, aten.add.Tensor, new, own)
            user.replace_all_uses_with(new)
            gm.graph.erase_node(user)
            tied = f", shared by {len(ours)} calls" if len(ours) > 1 else ""
            log.did(where, "linear", f"{n}x{k}, ranks up to {site.full_rank}{tied}")


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return key_of(a) == key_of(b) or torch.equal(a, b)


def _op(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]
