"""What the two rewrites share: choosing by name, tied weights, makers of elastic modules."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx, nn

from t3c.core.sites import ConvSite, LinearSite
from t3c.passes.nodes import Key, constant, key_of

MakeLinear = Callable[[LinearSite, Tensor, Tensor | None], nn.Module]
MakeConv = Callable[[ConvSite, Tensor, Tensor | None], nn.Module]
MakeSnap = Callable[[str, bool, tuple[str, ...], tuple[str, ...]], nn.Module]
"""(name, signed, sites that read it, sites that must be integer) -> module that rounds its input to
a fixed grid."""

MakeTable = Callable[[Tensor], nn.Module]
"""Weight [rows, features] -> module that looks rows up, with their codes as `table_codes`."""


@dataclass(frozen=True, slots=True)
class Makers:
    """Constructors of elastic modules, handed in from above: passes never import elastic.

    A made module is called with x alone and carries its site as `site`. Without `table`, embedding
    tables stay as they are.
    """

    linear: MakeLinear
    conv: MakeConv
    snap: MakeSnap
    table: MakeTable | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """Which layers the user wants elastic: glob patterns over paths.

    Attributes:
        include: A layer must match one of these.
        exclude: And none of these.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def why_not(self, where: str) -> str | None:
        """Why the user's patterns leave `where` out; None if they do not."""
        for pattern in self.exclude:
            if fnmatchcase(where, pattern):
                return f"exclude pattern {pattern!r} matches"
        if not any(fnmatchcase(where, pattern) for pattern in self.include):
            return f"no include pattern matches; they are {', '.join(map(repr, self.include))}"
        return None


EVERYTHING = Choice()


def readers(gm: fx.GraphModule) -> dict[Key, list[tuple[fx.Node, fx.Node]]]:
    """Storage of each constant -> every (get_attr node, user) that reads it."""
    found: dict[Key, list[tuple[fx.Node, fx.Node]]] = {}
    for node in gm.graph.nodes:
        value = constant(gm, node)
        if value is not None:
            found.setdefault(key_of(value), []).extend((node, user) for user in node.users)
    return found


def refusal(weight: Tensor | None, x: Tensor) -> str | None:
    """Why this weight cannot become elastic whatever the layer; None if it can."""
    if weight is None:
        return "the weight is computed from the inputs"
    if weight.dtype != torch.float32 or x.dtype != torch.float32:
        kind = str(weight.dtype if weight.dtype != torch.float32 else x.dtype)
        return f"the layer computes in {kind.removeprefix('torch.')}; convert the model to float32"
    if weight.numel() == 0:
        return "the weight is empty"
    return None


def install(gm: fx.GraphModule, path: str, module: nn.Module) -> str:
    """Add an elastic module under ``sites`` and give its name in the graph."""
    name = f"sites.{path.replace('.', '_')}"
    if "sites" not in gm._modules:  # pyright: ignore[reportPrivateUsage]
        gm.add_module("sites", nn.Module())
    taken = set(gm.get_submodule("sites")._modules)  # pyright: ignore[reportPrivateUsage]
    base, count = name, 1
    while name.removeprefix("sites.") in taken:
        count += 1
        name = f"{base}_{count}"
    gm.add_submodule(name, module)
    return name


def unique(path: str, used: Sequence[str]) -> str:
    """A site name that no other site has."""
    name, count = path, 1
    while name in used:
        count += 1
        name = f"{path}#{count}"
    return name


def site_names(gm: fx.GraphModule) -> list[str]:
    """Names of the sites that are in the graph already."""
    calls = [n for n in gm.graph.nodes if n.op == "call_module"]
    sites = [getattr(gm.get_submodule(str(n.target)), "site", None) for n in calls]
    return [s.name for s in sites if isinstance(s, LinearSite | ConvSite)]
