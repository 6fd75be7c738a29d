"""The nesting of a model's inputs and outputs as plain JSON, so that an artifact needs no pickle.

A tree is one of
    {"kind": "leaf"}                                   one tensor of the flat list, in order
    {"kind": "none"}                                   None; no tensor
    {"kind": "const", "value": 3}                      a plain bool, int, float or string; no tensor
    {"kind": "tuple" | "list", "items": [tree, ...]}   a tuple may have "fields": a named tuple
    {"kind": "dict", "items": {"name": tree, ...}}     keys are strings, in order
The inputs of a model are the tuple (positional arguments, keyword arguments).
"""

from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

Tree = Mapping[str, Any]
LEAF: Tree = {"kind": "leaf"}


@runtime_checkable
class SupportsDLPack(Protocol):
    """Any array of any library: numpy, torch, tvm, jax, cupy."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """Export the array."""


class Output(dict[str, Any]):
    """A dict whose values are attributes too and can be taken by position, as with transformers."""

    def __getattr__(self, name: str) -> Any:
        """The value called `name`."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; there are {', '.join(self)}") from None

    def __getitem__(self, key: str | int) -> Any:
        """The value called `key`, or at position `key`."""
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


def describe(value: object, where: str = "value") -> Tree:
    """The tree of a nested value whose leaves are arrays of any library.

    Raises:
        TypeError: A part is neither an array, None, plain data, tuple, list nor mapping.
    """
    match value:
        case None:
            return {"kind": "none"}
        case bool() | int() | float() | str():
            return {"kind": "const", "value": value}
        case SupportsDLPack():
            return LEAF
        case tuple() | list():
            parts = cast(Sequence[object], value)
            items = [describe(part, f"{where}[{i}]") for i, part in enumerate(parts)]
            fields: Sequence[str] | None = getattr(parts, "_fields", None)
            kind = "list" if isinstance(parts, list) else "tuple"
            named = {} if fields is None else {"fields": list(fields)}
            return {"kind": kind, "items": items, **named}
        case Mapping():
            pairs = cast(Mapping[object, object], value)
            for key in pairs:
                if not isinstance(key, str):
                    raise TypeError(
                        f"{where}: key {key!r} is not a string; only string keys are kept"
                    )
            return {
                "kind": "dict",
                "items": {str(k): describe(v, f"{where}[{k!r}]") for k, v in pairs.items()},
            }
        case _:
            raise TypeError(
                f"{where} is a {type(value).__name__}; allowed are arrays, None, plain numbers and "
                "strings, and tuples, lists and mappings of these"
            )


def leaves(tree: Tree) -> int:
    """How many tensors the tree holds."""
    return len(names(tree))


def names(tree: Tree, prefix: str = "") -> tuple[str, ...]:
    """A name for every leaf: its keys and positions joined by dots, for example ``logits``."""
    if tree["kind"] == "leaf":
        return (prefix or "0",)
    return tuple(
        name
        for key, part in children(tree)
        for name in names(part, f"{prefix}.{key}" if prefix else str(key))
    )


def children(tree: Tree) -> tuple[tuple[str | int, Tree], ...]:
    """(key or position, part) of a container; empty for everything else."""
    match tree["kind"]:
        case "tuple" | "list":
            return tuple(enumerate(tree["items"]))
        case "dict":
            return tuple(tree["items"].items())
        case _:
            return ()


def flatten(tree: Tree, value: Any, where: str = "inputs") -> list[Any]:
    """The leaves of `value` in order.

    Raises:
        TypeError: `value` is nested in another way than `tree`; the message names the place.
        ValueError: A constant has another value than the one that was compiled in.
    """
    match tree["kind"]:
        case "leaf":
            return [value]
        case "none":
            if value is not None:
                raise TypeError(f"{where} was compiled as None, got {type(value).__name__}")
            return []
        case "const":
            if value != tree["value"]:
                raise ValueError(f"{where} was compiled as {tree['value']!r}, got {value!r}")
            return []
        case "dict":
            keys = list(tree["items"])
            if not isinstance(value, Mapping) or set(cast(Any, value)) != set(keys):
                raise TypeError(f"{where}: expected a dict with keys {keys}, got {_outline(value)}")
        case kind:
            size = len(tree["items"])
            if not isinstance(value, tuple | list) or len(cast(Any, value)) != size:
                raise TypeError(f"{where}: expected a {kind} of {size}, got {_outline(value)}")
    parts: Any = value
    return [
        leaf
        for key, part in children(tree)
        for leaf in flatten(part, parts[key], f"{where}[{key!r}]")
    ]


def unflatten(tree: Tree, flat: Iterator[Any]) -> Any:
    """The nested value; takes as many leaves from `flat` as the tree holds."""
    match tree["kind"]:
        case "leaf":
            return next(flat)
        case "none":
            return None
        case "const":
            return tree["value"]
        case "dict":
            return Output((str(key), unflatten(part, flat)) for key, part in children(tree))
        case "list":
            return [unflatten(part, flat) for _, part in children(tree)]
        case _:
            parts = [unflatten(part, flat) for _, part in children(tree)]
            if "fields" in tree:
                named = cast(Any, namedtuple)("Outputs", tree["fields"])
                return named(*parts)
            return tuple(parts)


def problem(tree: object, where: str) -> str | None:
    """What is wrong with a tree read from a file; None if nothing is."""
    if not isinstance(tree, Mapping):
        return f"{where}: expected an object, got {type(tree).__name__}"
    node = cast(Tree, tree)
    match node.get("kind"):
        case "leaf" | "none":
            return None
        case "const":
            return None if "value" in node else f"{where}: a const needs a value"
        case "tuple" | "list":
            items: object = node.get("items")
            if not isinstance(items, list):
                return f"{where}.items: expected a list"
            parts = list(enumerate(cast(list[object], items)))
            fields: object = node.get("fields", [])
            if "fields" in node and not (
                isinstance(fields, list)
                and len(cast(list[object], fields)) == len(parts)
                and all(isinstance(f, str) and f.isidentifier() for f in cast(list[object], fields))
            ):
                return f"{where}.fields: expected one identifier per item"
        case "dict":
            members: object = node.get("items")
            if not isinstance(members, Mapping):
                return f"{where}.items: expected an object"
            parts = list(cast(Mapping[Any, object], members).items())
        case kind:
            return f"{where}.kind: {kind!r} is none of leaf, none, const, tuple, list, dict"
    return next(filter(None, (problem(part, f"{where}.{key}") for key, part in parts)), None)


def _outline(value: object) -> str:
    match value:
        case Mapping():
            return f"a mapping with keys {list(value)}"
        case tuple() | list():
            return f"a {type(cast(object, value)).__name__} of {len(cast(Sequence[Any], value))}"
        case _:
            return f"a {type(value).__name__}"
