"""Convolutions on tensors that travel as int8 codes: what one profile's function calls for them.

Before: r = snap(relu_of_conv1);  y = site("conv2", r)
After:  words = flow_conv1(..., range_in, ..., range_r)       the producer writes codes
        words2 = flow_conv2(words, range_r, weights, ..., range_out)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from t3c.codegen.flow import Carried, FlowPlan
from t3c.codegen.import_graph import PoolCall, SiteCall
from t3c.codegen.kernels.depthwise import grouped_conv
from t3c.codegen.kernels.family import ConvShape, Flow, Image
from t3c.codegen.tvm_api import relax
from t3c.codegen.weights import ConvStep, DepthwiseStep, WeightStore, conv_steps
from t3c.core.formats import Format
from t3c.core.grid import Grid
from t3c.core.sites import ConvSite

if TYPE_CHECKING:
    from t3c.codegen.expand import Body


def inner_place(site: str, factor: str) -> str:
    """Name of the grid that rounds the output of a factor's step."""
    return f"{site}:{factor}"


def ranges_of(
    plan: FlowPlan, store: WeightStore, sites: Iterable[str], formats: Mapping[str, Format]
) -> dict[str, Grid]:
    """Name -> grid of everything that a profile rounds to a fixed grid."""
    found = {c.place: c.grid for c in plan.carried.values()}
    if found:
        for name in sites:
            site, codes = store.sites[name], store.codes[name]
            if isinstance(site, ConvSite):
                for step in conv_steps(site, codes, formats[name]):
                    if step.part in codes.grids:
                        found[inner_place(name, step.part)] = codes.grids[step.part]
    return found


@dataclass(frozen=True, slots=True)
class _At:
    """Where the input of a step is: as codes (`words`), as float32, or both."""

    image: Image
    place: str
    words: Any = None
    value: Any = None


class Carrier:
    """Calls on codes within one function; see `Body`."""

    def __init__(self, body: "Body", plan: FlowPlan) -> None:
        """Start with no tensor carried yet."""
        self.body = body
        self.plan = plan
        self.family = body.owner.store.families.conv
        self._at: dict[Any, _At] = {}

    def has(self, var: Any) -> bool:
        """Whether the tensor is there already, because its producer wrote codes."""
        return var in self._at

    def snap(self, var: Any, x: Any) -> None:
        """The float32 value `x` is rounded to the grid of the skeleton's `var`."""
        carried = self.plan.carried[var]
        self._at[var] = _At(carried.image, carried.place, value=x)

    def pool(self, var: Any, source: Any, what: PoolCall) -> None:
        """Max pooling of carried codes."""
        image, place = self.plan.carried[var].image, self.plan.carried[var].place
        kernel = self.family.max_pool(
            self._at[source].image, image, what.kernel, what.stride, what.padding
        )
        self._at[var] = _At(image, place, words=self.body.call(kernel, [self._words(source)]))

    def demand(self, expr: Any) -> None:
        """Make float32 values of the carried tensors that an expression of the skeleton reads."""
        for var in relax.analysis.free_vars(expr):
            if var in self._at and var not in self.body.values:
                self.body.bind(var, self.value(var))

    def value(self, var: Any) -> Any:
        """A carried tensor in float32, rounded."""
        at = self._at[var]
        words = self._words(var)
        return self.body.call(self.family.decode(at.image), [words, self._range(at.place)])

    def conv(
        self, site: ConvSite, fmt: Format, what: SiteCall, var: Any, fields: tuple[Any, ...]
    ) -> Any:
        """One call of a site whose input is carried; None if its result is carried too.

        Args:
            site: With the sizes of this call.
            fmt: Its format.
            what: The call.
            var: The skeleton's variable of the result.
            fields: The skeleton's variables of x and, if the epilogue adds one, the residual.
        """
        store = self.body.owner.store
        names = self.body.names(site, fmt)
        codes = store.codes[site.name]
        steps = conv_steps(site, codes, fmt)
        target = self.plan.targets.get(var)
        goal = None if target is None else self.plan.carried[target]
        self._words(fields[0])
        at = self._at[fields[0]]
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            weights = [
                self.body.weight(n) for n in names if n.startswith(f"{site.name}:{step.part}.")
            ]
            if isinstance(step, DepthwiseStep):
                kernel = grouped_conv(step.shape, step.shape.in_channels, stored=step.stored)
                at = replace(at, value=self.body.call(kernel, [at.value, *weights]))
            elif following is not None:
                halo = max(following.shape.padding)
                at = self._inner(site.name, step, at, weights, codes.grids.get(step.part), halo)
            elif at.words is None:
                return self._dynamic(step, at, weights, what, fields)
            else:
                return self._last(step, at, weights, what, var, goal, fields)
        raise AssertionError(f"{site.name}: {fmt} has no steps")

    def _inner(
        self,
        site: str,
        step: ConvStep,
        at: _At,
        weights: list[Any],
        grid: Grid | None,
        halo: int,
    ) -> _At:
        """A step that is not the last: codes where the next step is an integer one."""
        if grid is None:
            flow = Flow(step.shape, at.image, None, floats=True)
            return _At(at.image, "", value=self._call(flow, step, at, weights, "", [], []))
        s = step.shape
        image = Image(s.batch, s.out_channels, s.out_size, halo, True, grid.bits)
        place = inner_place(site, step.part)
        flow = Flow(step.shape, at.image, image)
        words = self._call(flow, step, at, weights, "", [], [self._range(place)])
        return _At(image, place, words=words)

    def _last(
        self,
        step: ConvStep,
        at: _At,
        weights: list[Any],
        what: SiteCall,
        var: Any,
        goal: Carried | None,
        fields: tuple[Any, ...],
    ) -> Any:
        """The step that ends the site, with the epilogue."""
        image = goal.image if goal is not None else None
        residual, extra = None, []
        for other in fields[1:]:
            known = self._at.get(other)
            if known is None:
                extra = [self.body.value(other)]
            else:
                residual = known.image
                extra = [self._words(other), self._range(known.place)]
        flow = Flow(step.shape, at.image, image, residual, floats=image is None)
        outs = [] if goal is None else [self._range(goal.place)]
        result = self._call(flow, step, at, weights, what.epilogue, extra, outs)
        if goal is None:
            return result
        self._at[self.plan.targets[var]] = _At(goal.image, goal.place, words=result)
        return None

    def _dynamic(
        self, step: ConvStep, at: _At, weights: list[Any], what: SiteCall, fields: tuple[Any, ...]
    ) -> Any:
        """The last step of CP: its input comes from float32 steps and has no grid."""
        for other in fields[1:]:
            self.demand(other)
        pair = self.body.quantize(at.value, self.family.quantize(step.shape), _nchw(step.shape))
        kernel = self.family.conv(step.shape, step.channels_max, what.epilogue)
        extra = [self.body.value(other) for other in fields[1:]]
        return self.body.call(kernel, [*pair, *weights, *extra])

    def _call(
        self,
        flow: Flow,
        step: ConvStep,
        at: _At,
        weights: list[Any],
        epilogue: str,
        extra: list[Any],
        outs: list[Any],
    ) -> Any:
        kernel = self.family.flow(flow, step.channels_max, epilogue)
        return self.body.call(kernel, [at.words, self._range(at.place), *weights, *extra, *outs])

    def _words(self, var: Any) -> Any:
        """The codes of a carried tensor, made from its float32 value on first use."""
        at = self._at[var]
        if at.words is None:
            words = self.body.call(self.family.encode(at.image), [at.value, self._range(at.place)])
            self._at[var] = at = replace(at, words=words)
        return at.words

    def _range(self, place: str) -> Any:
        return self.body.weight(range_name(place))


def range_name(place: str) -> str:
    """Name of a grid in the weight file."""
    return f"grid/{place.replace(':', '/')}"


def _nchw(shape: ConvShape) -> tuple[int, ...]:
    return (shape.batch, shape.in_channels, *shape.in_size)
