"""Which tensors travel as int8 codes between convolutions, and in which layout.

The plan depends on the graph alone, not on formats: all profiles agree on it. A tensor that is
rounded to a fixed grid (`SnapCall`) lies in memory as codes in the layout of an `Image`; so does
what max pooling makes of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from t3c.codegen.import_graph import PoolCall, SiteCall, Skeleton, SnapCall
from t3c.codegen.kernels.family import Image
from t3c.codegen.tvm_api import relax
from t3c.core.grid import Grid
from t3c.core.sites import ConvSite, Site


@dataclass(frozen=True, slots=True)
class Carried:
    """A tensor that exists as codes.

    Attributes:
        image: Its layout.
        grid: What the codes stand for.
        place: Name of the grid.
    """

    image: Image
    grid: Grid
    place: str


@dataclass(slots=True)
class FlowPlan:
    """The tensors of ``main`` that travel as codes.

    Attributes:
        carried: Variable -> how it travels.
        targets: Result of a convolution -> the variable that holds it on a grid, if nobody reads
            it otherwise: the convolution writes codes.
    """

    carried: dict[Any, Carried] = field(default_factory=dict)
    targets: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Binding:
    var: Any
    what: object
    args: tuple[Any, ...]


def plan_flow(skeleton: Skeleton, sites: Mapping[str, Site]) -> FlowPlan:
    """Choose layouts.

    Args:
        skeleton: The imported network.
        sites: Site name -> site.
    """
    bindings = list(_opaque(skeleton))
    made = {b.var: b for b in bindings}
    uses = _uses(skeleton)
    plan = FlowPlan()
    halo: dict[Any, int] = {}
    for b in bindings:
        site = _conv(b, sites)
        if site is not None:
            halo[b.args[0]] = max(halo.get(b.args[0], 0), *site.padding)
    for b in bindings:
        if isinstance(b.what, SnapCall):
            shape, grid, place = b.what.shape, b.what.grid, b.what.place
            source = made.get(b.args[0])
            if uses[b.args[0]] == 1 and source is not None and _conv(source, sites) is not None:
                plan.targets[source.var] = b.var
        elif isinstance(b.what, PoolCall) and b.args[0] in plan.carried:
            shape, below = b.what.out_shape, plan.carried[b.args[0]]
            grid, place = below.grid, below.place
        else:
            continue
        batch, channels, height, width = shape
        image = Image(batch, channels, (height, width), halo.get(b.var, 0), grid.signed, grid.bits)
        plan.carried[b.var] = Carried(image, grid, place)
    return plan


def _conv(b: _Binding, sites: Mapping[str, Site]) -> ConvSite | None:
    if not isinstance(b.what, SiteCall):
        return None
    site = sites[b.what.site]
    return site if isinstance(site, ConvSite) else None


def _opaque(skeleton: Skeleton) -> Iterator[_Binding]:
    for block in skeleton.module["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Call) and getattr(call.op, "name", "") == (
                "relax.call_dps_packed"
            ):
                what = skeleton.opaque.get(str(call.args[0].global_symbol))
                yield _Binding(binding.var, what, tuple(call.args[1].fields))


def _uses(skeleton: Skeleton) -> "_Counter":
    """How many bindings or outputs read each variable."""
    found = _Counter()
    body = skeleton.module["main"].body
    for block in body.blocks:
        for binding in block.bindings:
            for var in relax.analysis.free_vars(binding.value):
                found.add(var)
    for var in relax.analysis.free_vars(body.body):
        found.add(var)
    return found


class _Counter(dict[Any, int]):
    def add(self, var: Any) -> None:
        self[var] = self.get(var, 0) + 1
