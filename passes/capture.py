"""Capture: a user's model becomes one flat, functional ATen graph."""

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from t3c.core.errors import PassError
from t3c.passes.nodes import constant, on_meta

aten = torch.ops.aten
Json = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Captured:
    """A model as a graph from flat tensors to a tuple of flat tensors.

    Attributes:
        graph: ATen graph in eval mode; its parameters are a copy under the user's names.
        inputs: Example inputs, flat, as the graph takes them.
        names: Name of each input.
        output_names: Name of each output.
        in_tree: Structure of (args, kwargs) at capture.
        out_tree: Structure of the result.
        input_leaves: For each leaf of `in_tree` its place in `inputs`; None: a fixed value.
        fixed: Values of the leaves that are not tensors.
        output_leaves: For each leaf of `out_tree` its place in the graph's outputs; None: fixed.
        fixed_outputs: Values of the output leaves that are not tensors.
        parameters: Names of the model's positional parameters, to bind keyword calls.
        structure: Inputs and outputs as plain JSON: tuple, list, dict and leaf.
        route: Which way of capture worked.
        notes: What the user should know: ways that failed and why, train mode left.
    """

    graph: fx.GraphModule
    inputs: tuple[Tensor, ...]
    names: tuple[str, ...]
    output_names: tuple[str, ...]
    in_tree: pytree.TreeSpec
    out_tree: pytree.TreeSpec
    input_leaves: tuple[int | None, ...]
    fixed: tuple[Any, ...]
    output_leaves: tuple[int | None, ...]
    fixed_outputs: tuple[Any, ...]
    parameters: tuple[str, ...]
    structure: Json
    route: str
    notes: tuple[str, ...]

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """A call's arguments as the graph takes them.

        Raises:
            ValueError: The structure, a shape, a dtype or a fixed value differs from capture.
        """
        leaves, tree = pytree.tree_flatten(self._bind(args, kwargs))
        if tree != self.in_tree:
            if tree.num_leaves != self.in_tree.num_leaves:
                raise ValueError(
                    f"the call has {tree.num_leaves} value(s), captured were "
                    f"{self.in_tree.num_leaves}; give the arguments of the example inputs"
                )
            raise ValueError(f"inputs have the structure {tree}, captured was {self.in_tree}")
        flat: list[Tensor] = [torch.empty(0)] * len(self.inputs)
        for leaf, place, fixed in zip(leaves, self.input_leaves, self.fixed, strict=True):
            if place is None:
                if leaf is not fixed and leaf != fixed:
                    raise ValueError(f"an input is {leaf!r}, but was fixed to {fixed!r} at capture")
                continue
            want = self.inputs[place]
            if not isinstance(leaf, Tensor) or leaf.shape != want.shape or leaf.dtype != want.dtype:
                got = (
                    f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf)
                )
                same = isinstance(leaf, Tensor) and leaf.shape == want.shape
                advice = (
                    f"convert it with .to({want.dtype})"
                    if same
                    else "shapes are static: pad, or capture at this shape"
                )
                raise ValueError(
                    f"input {self.names[place]!r} is {got}; captured was {tuple(want.shape)} "
                    f"{want.dtype}; {advice}"
                )
            flat[place] = leaf
        return tuple(flat)

    def unflatten(self, outputs: tuple[Tensor, ...]) -> Any:
        """The graph's outputs in the structure of the user's model."""
        leaves = [
            fixed if place is None else outputs[place]
            for place, fixed in zip(self.output_leaves, self.fixed_outputs, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.out_tree)

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Positional and keyword arguments split and ordered as at capture."""
        positional, keyword = self.in_tree.children()
        count, keys = positional.num_children, list(keyword.context)
        if len(args) == count and set(kwargs) == set(keys):
            return args, {k: kwargs[k] for k in keys}
        named = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        wanted = [*self.parameters[:count], *keys]
        if len(named) != len(args) + len(kwargs) or set(named) != set(wanted):
            return args, dict(kwargs)
        return tuple(named[n] for n in wanted[:count]), {k: named[k] for k in keys}


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
) -> Captured:
    """Capture a module, an FX graph module or an exported program.

    The model is never changed: parameters are copied, eval mode is taken on the copy.

    Args:
        model: What to capture.
        example_inputs: Positional arguments of one call; shapes become static.
        example_kwargs: Keyword arguments of that call.

    Raises:
        PassError: No way of capture works; the message names each and why.
        TypeError: `model` is none of the three, or the inputs are not a tuple.
    """
    kwargs = dict(example_kwargs or {})
    if not isinstance(example_inputs, tuple):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"example_inputs is a {type(example_inputs).__name__}; write (x,)")
    if isinstance(model, ExportedProgram):
        if not example_inputs and not kwargs:
            if model.example_inputs is None:
                raise TypeError("the exported program stores no example inputs; pass them")
            example_inputs, kwargs = model.example_inputs
        return _finish(copy.deepcopy(model), example_inputs, kwargs, (), "exported-program", [])
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model is a {type(model).__name__}; give a Module or an ExportedProgram")
    if not example_inputs and not kwargs:
        raise TypeError(
            "example_inputs is missing; give the arguments of one call, for example (x,): "
            "their shapes are what the library is compiled for"
        )
    notes = []
    if any(m.training for m in model.modules()):
        notes.append("the model was in train mode; captured in eval mode")
    try:
        frozen = copy.deepcopy(model).eval()
    except Exception as error:
        raise PassError(f"capture: the model cannot be copied: {error}") from error
    parameters = _parameters(model)
    failures: list[str] = []
    for route, attempt in ROUTES.items():
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, about its internals
                program = attempt(frozen, example_inputs, kwargs)
                return _finish(
                    program, example_inputs, kwargs, parameters, route, [*notes, *failures]
                )
        except PassError:
            raise  # the model itself is at fault: another way would only hide it
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0]
            failures.append(f"{route} failed: {type(error).__name__}: {first}")
    raise PassError(
        "capture: no way works for this model. " + "; ".join(failures) + ". "
        "Make the forward traceable (no Python branch on tensor values), or export it yourself."
    )


Attempt = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], ExportedProgram]


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    return torch.export.export(model, args, kwargs, strict=False)


def _strict(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    return torch.export.export(model, args, kwargs, strict=True)


def _symbolic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    fixed = {
        name: value
        for name, value in bound.arguments.items()
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
    }
    traced = fx.symbolic_trace(model, concrete_args=fixed)
    return torch.export.export(traced, args, kwargs, strict=False)


def _make_fx(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    from torch.fx.experimental.proxy_tensor import make_fx

    leaves, tree = pytree.tree_flatten((args, kwargs))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    result: list[pytree.TreeSpec] = []

    def run(values: list[Tensor], tensors: list[Tensor]) -> list[Any]:
        full = list(leaves)
        for i, t in zip(places, tensors, strict=True):
            full[i] = t
        a, k = pytree.tree_unflatten(full, tree)
        named = dict(zip(state, values, strict=True))
        flat, spec = pytree.tree_flatten(torch.func.functional_call(model, named, a, k))
        result[:] = [spec]
        return flat

    traced = make_fx(run, pre_dispatch=True)(list(state.values()), [leaves[i] for i in places])
    slots = [n for n in traced.graph.nodes if n.op == "placeholder"]
    wrapper = _Traced(model, traced, places, result[0], list(state))
    for name, node in zip(state, slots, strict=False):
        with traced.graph.inserting_before(node):
            read = traced.graph.get_attr(f"model.{name}")
        node.replace_all_uses_with(read)
        traced.graph.erase_node(node)
    traced.add_module("model", model)
    traced.graph.set_codegen(CodeGen())
    traced.recompile()
    return torch.export.export(wrapper, args, kwargs, strict=False)


class _Traced(nn.Module):
    """A make_fx graph behind the signature of the model that it was traced from."""

    def __init__(
        self,
        model: nn.Module,
        traced: fx.GraphModule,
        places: list[int],
        out: pytree.TreeSpec,
        names: list[str],
    ) -> None:
        super().__init__()
        self.traced, self.places, self.out = traced, places, out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        flat = self.traced(*[leaves[i] for i in self.places])
        return pytree.tree_unflatten(list(flat), self.out)


ROUTES: Mapping[str, Attempt] = {
    "torch.export": _export,
    "torch.export(strict=True)": _strict,
    "fx.symbolic_trace": _symbolic,
    "make_fx": _make_fx,
}


def _parameters(model: nn.Module) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in found if p.kind in kinds)


def _finish(
    program: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    parameters: tuple[str, ...],
    route: str,
    notes: list[str],
) -> Captured:
    """Make the graph functional and flat, and describe its inputs and outputs."""
    program = program.run_decompositions({})
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        raise PassError(
            f"the forward writes to {', '.join(sorted(set(written)))}; T3C compiles functions "
            "without state. Call model.eval() before exporting, or return the new value instead."
        )
    leaves, in_tree = pytree.tree_flatten((args, kwargs))
    module = program.module(check_guards=False)
    graph = module.graph
    slots = [n for n in graph.nodes if n.op == "placeholder"]
    if len(slots) != len(leaves):
        raise PassError(f"the graph takes {len(slots)} inputs, the example has {len(leaves)}")
    places: list[int | None] = []
    inputs: list[Tensor] = []
    for slot, leaf in zip(slots, leaves, strict=True):
        if isinstance(leaf, Tensor):
            places.append(len(inputs))
            inputs.append(leaf.detach())
            continue
        places.append(None)
        if slot.users:
            raise PassError(f"input {slot.name!r} is {leaf!r}, not a tensor, and the graph uses it")
        graph.erase_node(slot)
    names = tuple(n.name for n in graph.nodes if n.op == "placeholder")
    if program.call_spec.out_spec is None:
        raise PassError("torch.export gave no output structure")
    out_tree = program.call_spec.out_spec
    end = next(iter(reversed(graph.nodes)))
    results = pytree.tree_leaves(end.args[0])
    outputs = [r for r in results if isinstance(r, fx.Node)]
    if not outputs:
        raise PassError("the model returns no tensor")
    end.args = (tuple(outputs),)
    order = iter(range(len(outputs)))
    out_places = tuple(next(order) if isinstance(r, fx.Node) else None for r in results)
    graph.set_codegen(CodeGen())
    flat = fx.GraphModule(module, graph, class_name="T3CGraph")
    if route == "make_fx":
        _strip(flat, "traced.model.")
    _describe_nodes(flat)
    _trim(flat)
    flat.eval()
    outs = _names(out_tree, out_places)
    return Captured(
        graph=flat,
        inputs=tuple(inputs),
        names=names,
        output_names=outs,
        in_tree=in_tree,
        out_tree=out_tree,
        input_leaves=tuple(places),
        fixed=tuple(None if isinstance(v, Tensor) else v for v in leaves),
        output_leaves=out_places,
        fixed_outputs=tuple(None if isinstance(r, fx.Node) else r for r in results),
        parameters=parameters,
        structure={
            "inputs": _describe(in_tree, iter(places), names, inputs),
            "outputs": _describe(
                out_tree, iter(out_places), outs, [n.meta["val"] for n in outputs]
            ),
        },
        route=route,
        notes=tuple(notes),
    )


def _strip(gm: fx.GraphModule, prefix: str) -> None:
    """Give parameters their own names back: ``traced.model.fc.weight`` -> ``fc.weight``."""
    for node in gm.graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith(prefix):
            tensor, name = _attr(gm, node), str(node.target).removeprefix(prefix)
            *path, leaf = name.split(".")
            owner: nn.Module = gm
            for part in path:
                if part not in owner._modules:  # pyright: ignore[reportPrivateUsage]
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(leaf, tensor)
            elif isinstance(tensor, Tensor):
                owner.register_buffer(leaf, tensor)
            node.target = name
    gm.recompile()


def _attr(gm: fx.GraphModule, node: fx.Node) -> object:
    value: object = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _describe_nodes(gm: fx.GraphModule) -> None:
    """Reduce every node's meta to its shape (on the meta device) and the user's module path."""
    for node in gm.graph.nodes:
        value = constant(gm, node)
        value = node.meta.get("val") if value is None else value
        keep: dict[str, Any] = {}
        if isinstance(value, Tensor):
            keep["val"] = _plain(value)
        elif isinstance(value, list | tuple):
            keep["val"] = tuple(_plain(v) if isinstance(v, Tensor) else v for v in value)
        stack = node.meta.get("nn_module_stack")
        if stack:
            keep["path"] = next(reversed(stack.values()))[0]
        node.meta = keep


def _plain(value: Tensor) -> Tensor:
    if any(type(n) is not int for n in value.shape):
        raise PassError(f"a tensor has the dynamic shape {tuple(value.shape)}; shapes are static")
    return on_meta(value)


def _trim(gm: fx.GraphModule) -> None:
    """Remove checks that hold by construction and everything that nobody reads."""
    for node in list(reversed(gm.graph.nodes)):
        checks = node.op == "call_function" and "assert" in str(node.target)
        guards = node.op == "call_module" and str(node.target) == "_guards_fn"
        if not node.users and (checks or guards):
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    gm.delete_all_unused_submodules()


def _names(tree: pytree.TreeSpec, places: tuple[int | None, ...]) -> tuple[str, ...]:
    """Names of the outputs: path of keys and indices in the structure."""
    found: list[str] = []
    order = iter(places)

    def walk(spec: pytree.TreeSpec, path: tuple[str, ...]) -> None:
        if spec.is_leaf():
            if next(order) is not None:
                found.append("_".join(path) or "output")
            return
        keys = _keys(spec)
        for i, child in enumerate(spec.children()):
            walk(child, (*path, str(i) if keys is None else keys[i]))

    walk(tree, ())
    return tuple(name if not name[0].isdigit() else f"output_{name}" for name in found)


def _keys(spec: pytree.TreeSpec) -> list[str] | None:
    context = spec.context
    if isinstance(spec.type, type) and issubclass(spec.type, dict) and isinstance(context, list):
        return [str(k) for k in context]
    return None


def _describe(
    tree: pytree.TreeSpec, places: Any, names: tuple[str, ...], values: list[Tensor]
) -> Json | None:
    """The structure as JSON; leaves without a tensor are left out."""
    if tree.is_leaf():
        place = next(places)
        if place is None:
            return None
        value = values[place]
        dtype = str(value.dtype).removeprefix("torch.")
        shape = [int(n) for n in value.shape]
        return {
            "kind": "leaf",
            "index": place,
            "name": names[place],
            "shape": shape,
            "dtype": dtype,
        }
    keys = _keys(tree)
    items = [_describe(child, places, names, values) for child in tree.children()]
    if keys is None:
        kind = "list" if tree.type is list else "tuple"
        return {"kind": kind, "items": [i for i in items if i is not None]}
    pairs = [(k, i) for k, i in zip(keys, items, strict=True) if i is not None]
    return {"kind": "dict", "keys": [k for k, _ in pairs], "items": [i for _, i in pairs]}
