"""Schedules: the choices of a kernel family that change its speed and never its result.

An *operator* is one kernel at one set of sizes; its *schedule* says how that kernel is cut into
loops. A family lists the schedules that are valid for an operator, names one by a rule over sizes
and caches, and takes a tuned record before the rule. A family adopts schedules in four steps:

    1. a frozen dataclass of small ints and strings, subclass of `Schedule`, for each operator;
    2. the family is a `Scheduled` and has `schedules`, `default` and `kernel`;
    3. its methods ask `pick(op)` and hand ``op`` and the schedule to the `Kernel`;
    4. kernel names end in `suffix(op, schedule)`, which is "" where the rule was followed.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Self

from t3c.core.errors import LoweringError

if TYPE_CHECKING:
    from t3c.codegen.kernels.family import Kernel

_SIZE = re.compile(r"([a-z_]+)=(\d+)")
_LONG = ("gelu", "gelu-tanh", "silu", "tanh", "sigmoid")


@dataclass(frozen=True, slots=True)
class Op:
    """One operator at one set of sizes: what a record is for.

    Attributes:
        kind: Operator of the family, for example ``dense``.
        sizes: (name, value) in the family's order: shape and rank.
        epilogue: Class of the epilogue, itself an epilogue (`epilogue_class`).
    """

    kind: str
    sizes: tuple[tuple[str, int], ...]
    epilogue: str = ""

    @classmethod
    def of(cls, kind: str, epilogue: str = "", /, **sizes: int) -> "Op":
        """An operator with its sizes as keywords."""
        return cls(kind, tuple(sizes.items()), epilogue)

    @classmethod
    def parse(cls, key: str) -> "Op":
        """The operator of a key.

        Raises:
            ValueError: The text is no key.
        """
        kind, *words = key.split(" ")
        epilogue = words.pop() if words and "=" not in words[-1] else ""
        found = [_SIZE.fullmatch(word) for word in words]
        sizes = tuple((m[1], int(m[2])) for m in found if m)
        op = cls(kind, sizes, epilogue)
        if op.key != key or not kind:
            raise ValueError(
                f"{key!r} is no operator; write its kind, sizes as name=number, then the epilogue, "
                "for example 'dense m=197 n=768 k=768 gelu'"
            )
        return op

    @property
    def key(self) -> str:
        """Stable text, for records and logs."""
        sizes = [f"{name}={value}" for name, value in self.sizes]
        return " ".join([self.kind, *sizes, *([self.epilogue] if self.epilogue else [])])

    def __getitem__(self, name: str) -> int:
        """One size."""
        return dict(self.sizes)[name]


def epilogue_class(epilogue: str) -> str:
    """The epilogue that stands for all of about the same cost.

    ReLU costs nothing, all activations cost about what GELU costs, and a residual is one more
    stream from memory.
    """
    steps = epilogue.split(",")
    long = any(step in _LONG for step in steps)
    return ",".join((["gelu"] if long else []) + (["add"] if "add" in steps else []))


@dataclass(frozen=True, slots=True)
class Schedule:
    """Base of the choices of one operator: a subclass has fields of int or str only."""

    @property
    def text(self) -> str:
        """Short and unique among the schedules of one class."""
        return "_".join(f"{f.name[0]}{getattr(self, f.name)}" for f in fields(self))

    def record(self) -> dict[str, int | str]:
        """Field -> value, for JSON."""
        return asdict(self)


class Scheduled(ABC):
    """A kernel family with a search space."""

    name: ClassVar[str]

    def __init__(self, records: Mapping[str, Schedule] | None = None) -> None:
        """Take tuned schedules: key of an operator -> schedule; None: follow the rule."""
        self.records = records or {}

    def with_records(self, records: Mapping[str, Schedule]) -> Self:
        """The same family with these records only."""
        return type(self)(records)

    @abstractmethod
    def schedules(self, op: Op) -> tuple[Schedule, ...]:
        """Every valid choice for an operator.

        Raises:
            LoweringError: The family has no such operator (`unknown`).
        """

    @abstractmethod
    def default(self, op: Op) -> Schedule:
        """The choice of the rule: one of `schedules`."""

    @abstractmethod
    def kernel(self, op: Op) -> "Kernel":
        """The kernel of an operator, by its record or by the rule."""

    def pick(self, op: Op) -> Schedule:
        """The record of an operator, else the rule."""
        return self.records.get(op.key) or self.default(op)

    def suffix(self, op: Op, schedule: Schedule) -> str:
        """What a kernel's name says of its schedule: nothing where the rule was followed."""
        return "" if schedule == self.default(op) else schedule.text

    def unknown(self, op: Op) -> LoweringError:
        """The error for an operator that the family does not have."""
        return LoweringError(f"{self.name}: no schedules for operator {op.key!r}")
