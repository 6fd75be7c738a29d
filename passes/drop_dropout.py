"""Remove what does nothing in eval mode: dropout, copies, no-op views and casts."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import fx

from t3c.passes.base import AbstractPass, Log
from t3c.passes.nodes import aten, is_call, replace, result_of, value_of

_DROPOUT = (
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)
_COPIES = (
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
)
_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.slice.Tensor,
    aten.squeeze.dim,
)
_PADS = (aten.pad.default, aten.constant_pad_nd.default)


@final
@dataclass(frozen=True, slots=True)
class DropDropout(AbstractPass):
    """Remove dropout, identities, copies, views to the same shape and empty padding.

    Before: z = f(view(dropout(contiguous(y)), [2, 8]))
    After:  z = f(reshape(y, [2, 8]))

    Views become reshapes, which do not depend on strides: those change when copies go.

    The graph is functional (capture sees to it), so a copy is never told apart from its source. A
    graph exported in train mode loses its dropout here: T3C compiles inference.
    """

    name: ClassVar[str] = "drop-dropout"

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Remove them."""
        for node in list(gm.graph.nodes):
            if is_call(node, aten.native_dropout.default):
                out = result_of(node)
                if out is not None:
                    replace(out, node.args[0])
                    gm.graph.erase_node(node)
            elif is_call(node, *_DROPOUT) or _same(node):
                source = node.args[0]
                node.replace_all_uses_with(source)
                gm.graph.erase_node(node)
            elif is_call(node, aten._unsafe_view.default, aten.view.default):
                node.target = aten.reshape.default


def _same(node: fx.Node) -> bool:
    """Whether a copy, view or padding gives the tensor it takes."""
    if not is_call(node, *_COPIES, *_VIEWS, *_PADS):
        return False
    before, after = value_of(node.args[0]), value_of(node)
    return before.shape == after.shape and before.dtype == after.dtype
