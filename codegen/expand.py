"""One Relax function per profile: the skeleton's opaque calls become kernel calls of its formats.

Before: y = call_dps_packed("t3c.opaque.7.site", x)
After:  codes, scale = call_tir(quantize, x)           once per x, shared by all its consumers
        y = call_tir(low_rank_r128, codes, scale, weights[3], weights[4], ...)
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from t3c.codegen.carry import Carrier, range_name, ranges_of
from t3c.codegen.flow import plan_flow
from t3c.codegen.import_graph import (
    KernelCall,
    NormCall,
    PoolCall,
    SiteCall,
    Skeleton,
    SnapCall,
)
from t3c.codegen.kernels.depthwise import grouped_conv
from t3c.codegen.kernels.family import Kernel
from t3c.codegen.kernels.norm import NormOptions, layer_norm, rms_norm
from t3c.codegen.script import read_function
from t3c.codegen.tvm_api import relax, substitute
from t3c.codegen.weights import DepthwiseStep, WeightStore, conv_steps, rank_max
from t3c.core.formats import Format, LowRank
from t3c.core.sites import ConvSite, LinearSite, Site

KernelOf = tuple[str, str | None]
"""A kernel call: name of the kernel, and the site that it belongs to, if any."""


class ProfileBuilder:
    """Writes the functions of all profiles into one module; kernels are shared among them."""

    def __init__(self, skeleton: Skeleton, store: WeightStore) -> None:
        """Start from the skeleton's scheduled functions.

        Args:
            skeleton: The imported, scheduled network; ``main`` is left out of the result.
            store: Weights of all profiles.
        """
        self.skeleton = skeleton
        self.store = store
        self.kernels: dict[str, Any] = {}
        self.builder = relax.BlockBuilder(skeleton.module)
        self.quantized = _read_by_linear(skeleton, store)
        self.flow = plan_flow(skeleton, store.sites)
        self.calls: dict[str, list[KernelOf]] = {}

    def module(self) -> Any:
        """The module with every profile added so far and without the skeleton."""
        module = self.builder.finalize()
        del module["main"]
        return module

    def add(
        self,
        name: str,
        formats: Mapping[str, Format],
        *,
        profile: str = "",
        probe: bool = False,
    ) -> tuple[str, ...]:
        """Add the function of one profile.

        Args:
            name: Name of the function.
            formats: Site name -> format.
            profile: Whose corrections hold; empty: nobody's.
            probe: Return, behind the outputs, also the input of every site call in graph order, so
                that each stretch between two roundings can be compared with a reference alone.

        Returns:
            Names of the tensors of its ``weights`` argument, in order.
        """
        main = self.skeleton.module["main"]
        params = {p: self.skeleton.params[p.name] for p in main.params[self.skeleton.inputs :]}
        used = relax.analysis.free_vars(main.body)
        shared = [p for p in params if any(p.same_as(v) for v in used)]
        names = [self.store.parameter(*params[p]) for p in shared]
        sites = dict.fromkeys(call.site for call in self.skeleton.site_calls())
        names += [n for site in sites for n in self.store.names(site, formats[site], profile)]
        for place, grid in ranges_of(self.flow, self.store, sites, formats).items():
            names.append(self.store.parameter(range_name(place), grid.array()))
        inputs = [relax.Var(p.name, p.ty) for p in main.params[: self.skeleton.inputs]]
        tensors = [self.store.tensors[n] for n in names]
        weights = relax.Var(
            "weights", relax.TupleType([relax.TensorType(t.shape, str(t.dtype)) for t in tensors])
        )
        with self.builder.function(name, [*inputs, weights]):
            with self.builder.dataflow():
                body = self.body(names, weights, formats)
                body.probe = probe
                body.profile = profile
                for old, new in zip(main.params, inputs, strict=False):
                    body.bind(old, new)
                for param in shared:
                    body.bind(param, body.weight(params[param][0]))
                for block in main.body.blocks:
                    for binding in block.bindings:
                        body.translate(binding)
                body.carrier.demand(main.body.body)
                out = body.value(main.body.body)
                if probe:
                    flat = list(out.fields) if isinstance(out, relax.Tuple) else [out]
                    out = relax.Tuple([*flat, *body.taps])
                result = self.builder.emit_output(out)
            self.builder.emit_func_output(result)
        self.calls[name] = body.calls
        return tuple(names)

    def body(self, names: list[str], weights: Any, formats: Mapping[str, Format]) -> "Body":
        """What writes the dataflow block of a function.

        Args:
            names: Tensors of `weights`, in order.
            weights: The function's last parameter.
            formats: Site name -> format.
        """
        return Body(self, names, weights, formats)

    def kernel(self, kernel: Kernel) -> Any:
        """The kernel's global variable; parsed and added on first use."""
        if kernel.name not in self.kernels:
            function = read_function(kernel.source).with_attr("tirx.is_scheduled", True)
            self.kernels[kernel.name] = self.builder.add_func(function, kernel.name)
        return self.kernels[kernel.name]


class Body:
    """The dataflow block of one profile's function while it is written."""

    def __init__(
        self, owner: ProfileBuilder, names: list[str], weights: Any, formats: Mapping[str, Format]
    ) -> None:
        """See `ProfileBuilder.body`."""
        self.owner = owner
        self.builder = owner.builder
        self.index = {name: i for i, name in enumerate(names)}
        self.weights = weights
        self.formats = formats
        self.values: dict[Any, Any] = {}
        self.loaded: dict[str, Any] = {}
        self.quantized: dict[tuple[Any, str], tuple[Any, ...]] = {}
        self.taps: list[Any] = []
        self.probe = False
        self.profile = ""
        self.site: str | None = None
        self.calls: list[KernelOf] = []
        self.carrier = Carrier(self, owner.flow)

    def bind(self, old: Any, new: Any) -> None:
        """Let a variable of the skeleton stand for a new expression."""
        self.values[old] = new

    def value(self, expr: Any) -> Any:
        """An expression of the skeleton, in new variables."""
        return substitute(expr, self.values)

    def weight(self, name: str) -> Any:
        """A tensor of the weight file."""
        if name not in self.loaded:
            item = relax.TupleGetItem(self.weights, self.index[name])
            self.loaded[name] = self.builder.emit(item)
        return self.loaded[name]

    def names(self, site: Site, fmt: Format) -> tuple[str, ...]:
        """Tensors that a format of a site reads in this profile."""
        return self.owner.store.names(site.name, fmt, self.profile)

    def translate(self, binding: Any) -> None:
        """Copy one binding, or replace it if it is an opaque call."""
        call = binding.value
        key = _opaque_key(call)
        what = None if key is None else self.owner.skeleton.opaque[key]
        self.site = what.site if isinstance(what, SiteCall) else None
        if what is None:
            self.carrier.demand(call)
            self.bind(binding.var, self.builder.emit(self.value(call)))
            return
        fields = tuple(call.args[1].fields)
        carried = self.owner.flow.carried
        if isinstance(what, PoolCall):
            self.carrier.pool(binding.var, fields[0], what)
            return
        if isinstance(what, SnapCall):
            if not self.carrier.has(binding.var):
                self.carrier.snap(binding.var, self.value(fields[0]))
            return
        if isinstance(what, SiteCall) and fields[0] in carried:
            site = self.owner.store.sites[what.site]
            assert isinstance(site, ConvSite)
            if self.probe:
                self.carrier.demand(fields[0])
                self.taps.append(self.value(fields[0]))
            fmt = self.formats[what.site]
            result = self.carrier.conv(
                called(site, fields[0], what), fmt, what, binding.var, fields
            )
            if result is not None:
                self.bind(binding.var, result)
            return
        for field in fields:
            self.carrier.demand(field)
        args = [self.value(a) for a in fields]
        if isinstance(what, KernelCall):
            result = self._kernel_call(what, args)
        elif isinstance(what, NormCall):
            result = self._norm(what, args, binding.var in self.owner.quantized)
        else:
            site = self.owner.store.sites[what.site]
            fmt = self.formats[what.site]
            self.taps.append(args[0])
            if isinstance(site, LinearSite):
                result = self.linear(site, fmt, what, args)
            else:
                result = self.conv(site, fmt, what, args)
        self.bind(binding.var, result)

    def call(self, kernel: Kernel, args: list[Any]) -> Any:
        """One kernel call; the result is a tensor, or a tuple where the kernel has several."""
        self.calls.append((kernel.name, self.site))
        types = [relax.TensorType(shape, dtype) for shape, dtype in kernel.outs]
        out = types[0] if len(types) == 1 else types
        return self.builder.emit(relax.call_tir(self.owner.kernel(kernel), args, out))

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        """The tensor in another shape."""
        if tuple(int(n) for n in x.ty.shape.values) == shape:
            return x
        return self.builder.emit(relax.op.reshape(x, shape))

    def quantize(self, x: Any, kernel: Kernel, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """Codes and scales of x, made once for each layout that a consumer asks for."""
        key = (x, kernel.name)
        if key not in self.quantized:
            pair = self.call(kernel, [self.reshape(x, shape)])
            self.quantized[key] = tuple(
                self.builder.emit(relax.TupleGetItem(pair, i)) for i in range(2)
            )
        return self.quantized[key]

    def _kernel_call(self, what: KernelCall, args: list[Any]) -> Any:
        shaped = [self.reshape(a, s) for a, s in zip(args, what.shapes, strict=True)]
        return self.reshape(self.call(what.kernel, shaped), what.out_shape)

    def _norm(self, what: NormCall, args: list[Any], quantized: bool) -> Any:
        """A norm; with the codes of its rows where a linear layer reads them."""
        family = self.owner.store.families.linear
        rows, cols = prod(what.shape[:-1]), what.shape[-1]
        layout = family.rows_layout(rows) if quantized else None
        norm = layer_norm if what.centred else rms_norm
        options = NormOptions(shifted=what.centred, layout=layout)
        kernel = norm(rows, cols, what.eps, options)
        result = self.call(kernel, [self.reshape(args[0], (rows, cols)), *args[1:]])
        if layout is None:
            return self.reshape(result, what.shape)
        y, *codes = (self.builder.emit(relax.TupleGetItem(result, i)) for i in range(3))
        y = self.reshape(y, what.shape)
        self.quantized[y, family.quantize(rows, cols).name] = tuple(codes)
        return y

    def linear(self, site: LinearSite, fmt: Format, what: SiteCall, args: list[Any]) -> Any:
        """One call of an elastic linear layer: x and, if the epilogue adds one, the residual."""
        family = self.owner.store.families.linear
        m = prod(what.out_shape[:-1])
        codes = self.quantize(args[0], family.quantize(m, site.k), (m, site.k))
        weights = [self.weight(n) for n in self.names(site, fmt)]
        extra = [self.reshape(a, (m, site.n)) for a in args[1:]]
        product = self.owner.store.families.grouped() if fmt.bits == 4 else family
        owned = self.owner.store.codes[site.name]
        if isinstance(fmt, LowRank):
            most = rank_max(site, owned, fmt)
            kernel = product.low_rank(m, site.n, site.k, fmt.rank, most, what.epilogue)
        elif fmt.bits != 4 and owned.nested is not None:
            four = self.owner.store.families.grouped()
            kernel = four.nested(m, site.n, site.k, what.epilogue)
        else:
            kernel = product.dense(m, site.n, site.k, what.epilogue)
        y = self.call(kernel, [*codes, *weights, *extra])
        return self.reshape(y, what.out_shape)

    def conv(self, site: ConvSite, fmt: Format, what: SiteCall, args: list[Any]) -> Any:
        """One call of an elastic convolution: x and, if the epilogue adds one, the residual."""
        store = self.owner.store
        family = store.families.conv
        names = self.names(site, fmt)
        y = args[0]
        for step in conv_steps(called(site, y, what), store.codes[site.name], fmt):
            shape = (step.shape.batch, step.shape.in_channels, *step.shape.in_size)
            weights = [self.weight(n) for n in names if n.startswith(f"{site.name}:{step.part}.")]
            if isinstance(step, DepthwiseStep):
                kernel = grouped_conv(step.shape, step.shape.in_channels, stored=step.stored)
                y = self.call(kernel, [self.reshape(y, shape), *weights])
                continue
            codes = self.quantize(y, family.quantize(step.shape), shape)
            extra, epilogue = (args[1:], what.epilogue) if step.last else ([], "")
            kernel = family.conv(step.shape, step.channels_max, epilogue)
            y = self.call(kernel, [*codes, *weights, *extra])
        return self.reshape(y, what.out_shape)


def _read_by_linear(skeleton: Skeleton, store: WeightStore) -> set[Any]:
    """Variables of ``main`` that an elastic linear layer takes as x."""
    found = set()
    for block in skeleton.module["main"].body.blocks:
        for binding in block.bindings:
            what = skeleton.opaque.get(_opaque_key(binding.value) or "")
            if isinstance(what, SiteCall) and isinstance(store.sites[what.site], LinearSite):
                found.add(binding.value.args[1].fields[0])
    return found


def called(site: ConvSite, x: Any, what: SiteCall) -> ConvSite:
    """The site with the sizes of one call."""
    batch, _, *size = (int(n) for n in x.ty.shape.values)
    out = (what.out_shape[2], what.out_shape[3])
    return replace(site, batch=batch, in_size=(size[0], size[1]), out_size=out)


def _opaque_key(call: Any) -> str | None:
    """The key into `Skeleton.opaque` if `call` is an opaque call."""
    if isinstance(call, relax.Call) and getattr(call.op, "name", "") == "relax.call_dps_packed":
        return str(call.args[0].global_symbol)
    return None
