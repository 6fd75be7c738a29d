"""Remove what nobody reads."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import fx

from t3c.passes.base import AbstractPass, Log


@final
@dataclass(frozen=True, slots=True)
class DeadCode(AbstractPass):
    """Remove nodes without users, checks included, and read each constant once."""

    name: ClassVar[str] = "dead-code"

    def run(self, gm: fx.GraphModule, log: Log) -> None:
        """Remove them."""
        for node in list(reversed(gm.graph.nodes)):
            unused = not node.users and node.op in ("call_function", "get_attr", "call_module")
            if unused:
                gm.graph.erase_node(node)
        seen: dict[str, fx.Node] = {}
        for node in list(gm.graph.nodes):
            if node.op != "get_attr":
                continue
            first = seen.setdefault(str(node.target), node)
            if first is not node:
                node.replace_all_uses_with(first)
                gm.graph.erase_node(node)
