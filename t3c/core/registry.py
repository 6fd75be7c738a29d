"""Registries: a name maps to "module:ATTRIBUTE", resolved on use; listing imports nothing."""

from collections.abc import Mapping
from importlib import import_module

from t3c.core.errors import T3CError


def resolve(registry: Mapping[str, str], name: str, what: str, error: type[T3CError]) -> object:
    """The object that `name` stands for.

    Args:
        registry: Name -> "package.module:ATTRIBUTE".
        name: The key to resolve.
        what: What the registry holds, for the message, for example "target".
        error: Raised when the name is unknown; the message lists the known ones.
    """
    if name not in registry:
        raise error(f"unknown {what} {name!r}; known are {', '.join(sorted(registry))}")
    module, _, attribute = registry[name].partition(":")
    return getattr(import_module(module), attribute)
