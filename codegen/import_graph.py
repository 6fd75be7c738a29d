"""ExportedProgram to Relax: TVM's importer for the network, opaque calls where T3C has kernels.

An opaque call is a `call_dps_packed` whose name is a key into `Skeleton.opaque`. It survives
legalization and fusion untouched; `expand.py` replaces it, profile by profile, by kernel calls.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export.graph_signature import InputKind

from t3c.codegen import generic_ops
from t3c.codegen.kernels.attention import attention
from t3c.codegen.kernels.attention_words import word_product
from t3c.codegen.kernels.family import Kernel
from t3c.codegen.tvm_api import from_exported_program, relax
from t3c.core.errors import LoweringError
from t3c.core.grid import Grid
from t3c.targets.base import TargetSpec

PREFIX = "t3c.opaque."


@dataclass(frozen=True, slots=True)
class SiteCall:
    """One elastic layer: arguments are x and, if the epilogue adds one, the residual.

    Attributes:
        site: Name of the site.
        epilogue: Epilogue steps, comma separated.
        out_shape: Shape of the result.
    """

    site: str
    epilogue: str
    out_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SnapCall:
    """Rounding to a fixed grid: the argument is x [batch, channels, height, width].

    Attributes:
        place: Name of the grid.
        grid: The grid.
        shape: Shape of x and of the result.
    """

    place: str
    grid: Grid
    shape: tuple[int, ...]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the result in the graph."""
        return self.shape


@dataclass(frozen=True, slots=True)
class PoolCall:
    """Max pooling of values on a grid: the argument is x [batch, channels, height, width].

    Attributes:
        kernel: (height, width) of the window.
        stride: (height, width).
        padding: (height, width).
        out_shape: Shape of the result.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    out_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One float kernel, the same in every profile.

    Attributes:
        kernel: The kernel; its first inputs are the arguments, reshaped to `shapes`.
        shapes: Shape of each argument as the kernel takes it.
        out_shape: Shape of the result in the graph.
    """

    kernel: Kernel
    shapes: tuple[tuple[int, ...], ...]
    out_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NormCall:
    """A norm over the last axis: arguments x, gamma and, of a layer norm, beta.

    Where a linear layer reads the result, its codes are written in the same pass.

    Attributes:
        shape: Shape of x and of the result.
        eps: Added to the variance, or to the mean square.
        centred: A layer norm; else a root mean square norm.
    """

    shape: tuple[int, ...]
    eps: float
    centred: bool = True

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the result in the graph."""
        return self.shape


Opaque = SiteCall | KernelCall | NormCall | SnapCall | PoolCall


@dataclass(slots=True)
class Skeleton:
    """The network with holes.

    Attributes:
        module: Relax module; ``main`` takes the inputs, then the parameters.
        inputs: Number of user inputs.
        params: Variable name in ``main`` -> (the user's path, value).
        opaque: Name of each opaque call -> what it stands for.
    """

    module: Any
    inputs: int
    params: dict[str, tuple[str, NDArray[np.generic]]]
    opaque: dict[str, Opaque] = field(default_factory=dict)

    def site_calls(self) -> tuple[SiteCall, ...]:
        """Calls of elastic layers, in graph order."""
        return tuple(call for call in self.opaque.values() if isinstance(call, SiteCall))


def import_program(program: torch.export.ExportedProgram, spec: TargetSpec) -> Skeleton:
    """Translate an exported graph with placeholder ops.

    Args:
        program: Result of `torch.export.export` of a lowering graph (passes/pipeline.py).
        spec: Target; its vector width goes into the float kernels.

    Raises:
        LoweringError: The importer does not know an operator; the message names it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own trees
        program = program.run_decompositions({})
    opaque: dict[str, Opaque] = {}
    try:
        module = from_exported_program(
            program,
            keep_params_as_input=True,
            run_ep_decomposition=False,
            no_bind_return_tuple=True,
            custom_convert_map=_converters(opaque, spec),
        )
    # What the importer raises, by operator: unknown ones end in an assertion or a missing key,
    # forms that it does not translate in NotImplementedError.
    except (AssertionError, KeyError, ValueError, NotImplementedError) as error:
        raise LoweringError(
            f"TVM's importer cannot translate this graph: {error}. Exclude the part that holds the "
            "operator, or rewrite it with operators that the importer knows."
        ) from error
    main = module["main"]
    inputs = int(main.attrs["num_input"])
    module["main"] = main.without_attr("params") if "params" in main.attrs else main
    return Skeleton(module, inputs, _parameters(program), opaque)


def _parameters(
    program: torch.export.ExportedProgram,
) -> dict[str, tuple[str, NDArray[np.generic]]]:
    """Everything lifted out of the graph, under the importer's names of the variables."""
    found: dict[str, tuple[str, NDArray[np.generic]]] = {}
    for item in program.graph_signature.input_specs:
        if item.kind is InputKind.USER_INPUT:
            continue
        target = str(item.target)
        fixed = target in program.constants and target not in program.state_dict
        table: Any = program.constants if fixed else program.state_dict
        value = table[target].detach().cpu().contiguous()
        found[str(item.arg.name)] = (target, value.numpy())
    return found


Converter = Callable[[torch.fx.Node, Any], Any]


def _converters(opaque: dict[str, Opaque], spec: TargetSpec) -> dict[str, Converter]:
    """What the importer must not translate itself: TVM's key of the operator -> converter."""

    def emit(importer: Any, name: str, what: Opaque, args: list[Any]) -> Any:
        key = f"{PREFIX}{len(opaque)}.{name}"
        opaque[key] = what
        ty = relax.TensorType(what.out_shape, "float32")
        call = relax.call_dps_packed(key, relax.Tuple(args), out_ty=ty)
        return importer.block_builder.emit(call)

    def site(node: torch.fx.Node, importer: Any) -> Any:
        x, residual, name, epilogue = node.args[:4]
        args = [importer.env[a] for a in (x, residual) if a is not None]
        return emit(importer, "site", SiteCall(str(name), str(epilogue), _shape(node)), args)

    def attend(node: torch.fx.Node, importer: Any) -> Any:
        arguments: Any = node.args
        q, k, v, mask, heads, kv_heads, scale, causal = arguments
        args = [a for a in (q, k, v, mask) if isinstance(a, torch.fx.Node)]
        shapes = tuple(_shape(a) for a in args)
        (batch, q_len, width), (_, kv_len, _) = shapes[0], shapes[1]
        kernel = attention(
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            q_len=q_len,
            kv_len=kv_len,
            head_dim=width // heads,
            value_dim=shapes[2][2] // kv_heads,
            scale=scale,
            mask=shapes[3] if len(shapes) > 3 else None,
            causal=causal,
            lanes=spec.vector,
            words=word_product(spec.features, spec.vector),
        )
        call = KernelCall(kernel, shapes, _shape(node))
        return emit(importer, "attention", call, [importer.env[a] for a in args])

    def generic_attend(node: torch.fx.Node, importer: Any) -> Any:
        args: list[Any] = [
            importer.env[a] if isinstance(a, torch.fx.Node) else a for a in node.args
        ]
        return generic_ops.attention(importer.block_builder, *args)

    def norm(node: torch.fx.Node, importer: Any) -> Any:
        arguments: Any = node.args
        x, normalized, *affine = arguments[:4]
        if len(normalized) != 1 or len(affine) != 2 or None in affine:
            return importer._layer_norm(node)
        eps = float(arguments[4]) if len(arguments) > 4 else 1e-5
        args = [importer.env[a] for a in (x, *affine)]
        return emit(importer, "layer_norm", NormCall(_shape(x), eps), args)

    def rms_norm(node: torch.fx.Node, importer: Any) -> Any:
        arguments: Any = node.args
        x, gain, eps = arguments
        what = NormCall(_shape(x), float(eps), centred=False)
        return emit(importer, "rms_norm", what, [importer.env[a] for a in (x, gain)])

    def generic_norm(node: torch.fx.Node, importer: Any) -> Any:
        arguments: Any = node.args
        x, gain = (importer.env[a] for a in arguments[:2])
        norm = relax.op.nn.rms_norm(x, gain, axes=[-1], epsilon=float(arguments[2]))
        return importer.block_builder.emit(norm)

    def snap(node: torch.fx.Node, importer: Any) -> Any:
        x, place, scale, signed, bits = node.args
        grid = Grid(float(scale), bool(signed), int(bits))  # type: ignore[arg-type]
        return emit(importer, "snap", SnapCall(str(place), grid, _shape(node)), [importer.env[x]])

    def pool(node: torch.fx.Node, importer: Any) -> Any:
        x = node.args[0]
        what = _pooling(node)
        if what is None or not _on_grid(x):
            return importer._max_pool2d(node)
        return emit(importer, "max_pool", what, [importer.env[x]])

    def embed(node: torch.fx.Node, importer: Any) -> Any:
        """Look rows up; an index beyond the table reads its edge, not foreign memory."""
        emit_op = importer.block_builder.emit
        weight, indices = (importer.env[a] for a in node.args[:2])
        flat = emit_op(relax.op.reshape(emit_op(relax.op.astype(indices, "int32")), (-1,)))
        rows = emit_op(relax.op.take(weight, flat, axis=0, mode="clip"))
        return emit_op(relax.op.reshape(rows, _shape(node)))

    known: dict[str, Converter] = {
        "embedding.default": embed,
        "site_linear.default": site,
        "site_conv.default": site,
    }
    if spec.linear == "generic":
        generic = {"attention.default": generic_attend, "rms_norm.default": generic_norm}
        return {**known, **generic}
    return {
        **known,
        "attention.default": attend,
        "layer_norm.default": norm,
        "rms_norm.default": rms_norm,
        "snap.default": snap,
        "max_pool2d.default": pool,
    }


def _on_grid(node: Any) -> bool:
    """Whether a value is rounded to a fixed grid, or the maximum of such values."""
    name = str(getattr(node, "target", ""))
    if name == "aten.max_pool2d.default":
        return _pooling(node) is not None and _on_grid(node.args[0])
    return name == "t3c.snap.default"


def _pooling(node: torch.fx.Node) -> PoolCall | None:
    """Windows without dilation, of whole steps, over images; None: others."""
    defaults: tuple[Any, ...] = ([1, 1], [], [0, 0], [1, 1], False)
    given: list[Any] = [*node.args[1:], *defaults[len(node.args) - 1 :]]
    window, stride, padding = (_pair(v) for v in (given[0], given[1] or given[0], given[2]))
    plain = _pair(given[3]) == (1, 1) and not given[4] and not node.kwargs
    shape = _shape(node)
    return PoolCall(window, stride, padding, shape) if plain and len(shape) == 4 else None


def _pair(value: Any) -> tuple[int, int]:
    both = list(value) if isinstance(value, list | tuple) else [value]
    return int(both[0]), int(both[-1])


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape)
