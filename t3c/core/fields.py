"""Typed reading of JSON objects from files; every complaint names the file and the field."""

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

from t3c.core.errors import ArtifactError, T3CError

T = TypeVar("T")


class Fields:
    """Typed reading of a JSON object; every complaint names the file and the field."""

    def __init__(self, data: object, file: str, path: str = "") -> None:
        """Take one object; `path` leads to it from the root of the file."""
        if not isinstance(data, dict):
            raise ArtifactError(
                f"{file}: {path or 'content'}: expected an object, got {data!r:.60}"
            )
        self.data = cast(dict[str, Any], data)
        self.file = file
        self.path = path

    def where(self, key: str) -> str:
        """File and path of a field."""
        return f"{self.file}: {self._below(key)}"

    def get(self, key: str, *kinds: type) -> Any:
        """The field, which must be there and of one of the kinds."""
        if key not in self.data:
            raise ArtifactError(f"{self.where(key)}: missing")
        value = self.data[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            allowed = " or ".join(kind.__name__ for kind in kinds)
            raise ArtifactError(f"{self.where(key)}: expected {allowed}, got {value!r:.60}")
        return value

    def text(self, key: str) -> str:
        """A string."""
        return cast(str, self.get(key, str))

    def whole(self, key: str) -> int:
        """A whole number, not negative."""
        value = cast(int, self.get(key, int))
        if value < 0:
            raise ArtifactError(f"{self.where(key)}: {value} is negative")
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        return cast(bool, self.get(key, bool))

    def number(self, key: str) -> float:
        """A number; the string "inf" is infinity."""
        value = self.get(key, float, int, str)
        if value == "inf":
            return math.inf
        if isinstance(value, str) or math.isnan(value):
            raise ArtifactError(f"{self.where(key)}: expected a number or 'inf', got {value!r:.60}")
        return float(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """An object."""
        return cast(dict[str, Any], self.get(key, dict))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self.get(key, list)
        if not all(isinstance(v, str) for v in values):
            raise ArtifactError(f"{self.where(key)}: expected strings only")
        return tuple(values)

    def wholes(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers, not negative."""
        values = self.get(key, list)
        if not all(type(v) is int and v >= 0 for v in values):
            raise ArtifactError(
                f"{self.where(key)}: expected whole numbers >= 0, got {values!r:.60}"
            )
        return tuple(values)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        values = self.get(key, list)
        if not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            raise ArtifactError(f"{self.where(key)}: expected numbers only, got {values!r:.60}")
        return tuple(float(v) for v in values)

    def limits(self, key: str) -> tuple[float, ...]:
        """A list of numbers; the string "inf" is infinity."""
        values = self.get(key, list)
        below = Fields({str(i): v for i, v in enumerate(values)}, self.file, self._below(key))
        return tuple(below.number(str(i)) for i in range(len(values)))

    def choice(self, key: str, allowed: tuple[str, ...]) -> Any:
        """One of the allowed strings."""
        if (value := self.text(key)) not in allowed:
            raise ArtifactError(f"{self.where(key)}: {value!r} is none of {', '.join(allowed)}")
        return value

    def optional(self, key: str, read: Callable[[str], T]) -> T | None:
        """What `read` gives; None where the field is null or missing."""
        return None if self.data.get(key) is None else read(key)

    def within(self, key: str, read: Callable[["Fields"], T]) -> T:
        """An object, read by `read`."""
        return Fields(self.mapping(key), self.file, self._below(key)).build(read)

    def named(self, key: str, read: Callable[["Fields"], T]) -> dict[str, T]:
        """An object of objects, each read by `read`."""
        below = self._below(key)
        return {
            name: Fields(part, self.file, f"{below}.{name}").build(read)
            for name, part in self.mapping(key).items()
        }

    def each(self, key: str, read: Callable[["Fields"], T]) -> tuple[T, ...]:
        """A list of objects, each read by `read`."""
        below = self._below(key)
        return tuple(
            Fields(part, self.file, f"{below}[{i}]").build(read)
            for i, part in enumerate(self.get(key, list))
        )

    def build(self, read: Callable[["Fields"], T]) -> T:
        """What `read` makes of this; a value that it refuses becomes an ArtifactError."""
        try:
            return read(self)
        except ArtifactError:
            raise
        except (ValueError, TypeError, T3CError) as error:
            raise ArtifactError(f"{self.file}: {self.path or 'content'}: {error}") from error

    def _below(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key
