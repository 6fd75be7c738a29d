"""The elastic model: one graph, every format."""

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import reduce
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, fx, nn

from t3c.core.codes import Correction, SiteCodes
from t3c.core.formats import Format
from t3c.core.grid import Grid
from t3c.core.report import ConversionReport
from t3c.core.sites import ConvSite, Site
from t3c.elastic.layer import INPUT, ElasticLayer
from t3c.elastic.snap import Snap
from t3c.elastic.table import Table


class Structure(Protocol):
    """How a user's call maps to flat tensors and back; `t3c.passes.capture.Captured` is one."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Flat example inputs."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the flat inputs."""
        ...

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the flat outputs."""
        ...

    @property
    def structure(self) -> dict[str, Any]:
        """Inputs and outputs as plain JSON."""
        ...

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """A call's arguments, flat."""
        ...

    def unflatten(self, outputs: tuple[Tensor, ...]) -> Any:
        """The graph's outputs in the user's structure."""


class ElasticModel:
    """A network whose sites run in any format; called like the user's model.

    Attributes:
        graph: ATen graph with a call of an elastic module per site; not to be changed by users.
        captured: Structure of inputs and outputs.
        report: What became elastic, what did not and why.
        sites: Site name -> site, in graph order.
        layers: Site name -> elastic module.
        tables: Name -> embedding table that profiles read in int8.
        snaps: Name -> place where activations may be rounded to a fixed grid, in graph order.
    """

    def __init__(
        self, graph: fx.GraphModule, captured: Structure, report: ConversionReport
    ) -> None:
        """Wrap a rewritten graph."""
        self.graph = graph
        self.captured = captured
        self.report = report
        layers: dict[str, ElasticLayer] = {}
        snaps: dict[str, Snap] = {}
        tables: dict[str, Table] = {}
        for node in graph.graph.nodes:
            if node.op == "call_module":
                layer = graph.get_submodule(str(node.target))
                if isinstance(layer, ElasticLayer):
                    layers[layer.site.name] = layer
                elif isinstance(layer, Snap):
                    snaps[layer.name] = layer
                elif isinstance(layer, Table):
                    tables[str(node.target)] = layer
        self._corrections: dict[frozenset[tuple[str, Format]], Mapping[str, Correction]] = {}
        self.tables: Mapping[str, Table] = MappingProxyType(tables)
        self.snaps: Mapping[str, Snap] = MappingProxyType(snaps)
        self.layers: Mapping[str, ElasticLayer] = MappingProxyType(layers)
        self.sites: Mapping[str, Site] = MappingProxyType({n: x.site for n, x in layers.items()})

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        """Flat example inputs, as the graph takes them."""
        return self.captured.inputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run in the current formats; same arguments and result as the user's model."""
        return self.captured.unflatten(self.graph(*self.captured.flatten(args, kwargs)))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Everything that training may change."""
        return self.graph.parameters()

    def twin(self) -> "ElasticModel":
        """The same network, with formats of its own; weights, factors and codes are shared.

        For threads that run different formats at the same time. Corrections stay behind.
        """
        shared: list[object] = [*self.graph.parameters(), *self.graph.buffers()]
        for node in self.graph.graph.nodes:
            if node.op == "get_attr":
                shared.append(reduce(getattr, str(node.target).split("."), self.graph))
        shared += (thing for layer in self.layers.values() for thing in layer.held())
        memo = {id(thing): thing for thing in shared if thing is not None}
        return ElasticModel(deepcopy(self.graph, memo), self.captured, self.report)

    @contextmanager
    def using(
        self, formats: Mapping[str, Format] | None, quantize: bool = True
    ) -> Generator["ElasticModel"]:
        """Run in these formats inside the block; the earlier ones return after it, come what may.

        Args:
            formats: Site name -> format; sites left out run dense in float. None: all do.
            quantize: Whether formats of 8 and 4 bits run on integers exactly as kernels do; False:
                the same ranks in float.

        Raises:
            ValueError: A site is unknown, or cannot run its format.
        """
        chosen = {} if formats is None else dict(formats)
        for name, fmt in chosen.items():
            self._layer(name).check(fmt)
        before = {name: layer.state for name, layer in self.layers.items()}
        corrected = {name: layer.correction for name, layer in self.layers.items()}
        corrections = self.corrections(chosen)
        looked_up = {name: table.active for name, table in self.tables.items()}
        active = {name: snap.active for name, snap in self.snaps.items()}
        integer = {name for name, fmt in chosen.items() if quantize and fmt.bits < 32}
        try:
            for name, layer in self.layers.items():
                layer.state = (chosen.get(name), quantize)
                layer.correction = corrections.get(name)
            for snap in self.snaps.values():
                snap.active = integer.issuperset(snap.around)
            for table in self.tables.values():
                table.active = integer.issuperset(self.layers)
            yield self
        finally:
            for name, layer in self.layers.items():
                layer.state = before[name]
                layer.correction = corrected[name]
            for name, snap in self.snaps.items():
                snap.active = active[name]
            for name, table in self.tables.items():
                table.active = looked_up[name]

    def corrections(self, formats: Mapping[str, Format]) -> Mapping[str, Correction]:
        """Site name -> correction of one choice of formats; empty where none was set."""
        return self._corrections.get(frozenset(formats.items()), {})

    def set_corrections(
        self, formats: Mapping[str, Format], corrections: Mapping[str, Correction]
    ) -> None:
        """Correct outputs of convolutions whenever exactly these formats are in force.

        Args:
            formats: Site name -> format.
            corrections: Site name -> gain and bias; empty: as if they were never set.

        Raises:
            ValueError: A site is unknown or no convolution, or has other channels.
        """
        for name, correction in corrections.items():
            site = self._layer(name).site
            if not isinstance(site, ConvSite) or len(correction.gain) != site.out_channels:
                raise ValueError(
                    f"site {name!r} cannot take a correction of {len(correction.gain)} channels; "
                    f"it is {site}, and corrections fit convolutions of as many outputs"
                )
        self._corrections[frozenset(formats.items())] = dict(corrections)

    def forget_corrections(self) -> None:
        """As if none were ever set: factors or grids change."""
        self._corrections.clear()

    def set_grids(self, grids: Mapping[str, Grid]) -> None:
        """Fix the grids of activations; snaps and layers left out round dynamically from now on.

        Args:
            grids: Name of a snap -> grid of its value; ``site:factor`` -> grid of the output of
                an inner step of a site.

        Raises:
            ValueError: There is no such place.
        """
        places = {*self.snaps, *(n for n in grids if n.partition(":")[0] in self.layers)}
        for name in grids:
            if name not in places:
                raise ValueError(f"no place {name!r} for a grid; there are {', '.join(self.snaps)}")
        for layer in self.layers.values():
            layer.grids.clear()
        for snap in self.snaps.values():
            snap.grid = grids.get(snap.name)
            if snap.grid is not None:
                for site in snap.readers:
                    self.layers[site].grids[INPUT] = snap.grid
        for name, grid in grids.items():
            site, colon, factor = name.partition(":")
            if colon:
                self.layers[site].grids[factor] = grid

    def codes(self, site: str, formats: Iterable[Format] | None = None) -> SiteCodes:
        """Integer weights of a site for the formats that profiles use; see `ElasticLayer.codes`."""
        return self._layer(site).codes(formats)

    def set_factors(
        self,
        site: str,
        factors: Mapping[str, Tensor] | None = None,
        *,
        moment: Tensor | None = None,
    ) -> None:
        """Replace the plain factors of a site.

        Args:
            site: Its name.
            factors: Factor name -> tensor, components in order; None: make them from `moment`.
            moment: Second moment [k, k] of the site's inputs (channels for a convolution).
        """
        layer = self._layer(site)
        if factors is None:
            layer.set_moment(moment)
        else:
            layer.set_factors(factors)

    def _layer(self, site: str) -> ElasticLayer:
        if site not in self.layers:
            known = ", ".join(list(self.layers)[:8])
            raise ValueError(f"no site {site!r}; there are {len(self.layers)}, the first: {known}")
        return self.layers[site]
