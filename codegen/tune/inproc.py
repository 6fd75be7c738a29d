"""TVM's builder and runner, in this process.

The stock ones start workers that import every CUDA intrinsic, over ten seconds each, and run into
their own time limit. Built kernels stay in memory; the path of an artifact is a key into it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from t3c.codegen.tune.measure import Arguments, Contestant, Param, contest
from t3c.codegen.tvm_api import meta_schedule, tvm

_builder: Any = meta_schedule.builder
_runner: Any = meta_schedule.runner
_derived: Any = tvm.ir.utils.derived_object


@dataclass(slots=True)
class Shop:
    """Built kernels by the key that stands for their path."""

    kernels: dict[str, Contestant] = field(default_factory=dict)
    _made: int = 0

    def keep(self, kernel: Contestant) -> str:
        """Store a kernel and give its key."""
        self._made += 1
        key = f"memory:{self._made}"
        self.kernels[key] = kernel
        return key

    def drop(self, keys: Iterable[str]) -> None:
        """Forget kernels."""
        for key in keys:
            self.kernels.pop(key, None)


def contestant(module: Any, target: Any) -> Contestant:
    """Compile a module of one function."""
    ((name, function),) = ((gv.name_hint, f) for gv, f in module.functions_items())
    params = tuple(
        Param(buffer.name, tuple(int(n) for n in buffer.shape), str(buffer.dtype))
        for buffer in function.params
    )
    with tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
        compiled = tvm.compile(module, target=target)
    return Contestant(compiled[name], params)


@_derived
class Builder(_builder.PyBuilder):  # type: ignore[misc]
    """Compiles one after the other and keeps the result in memory."""

    def __init__(self, shop: Shop) -> None:
        """Say where to keep them."""
        super().__init__()
        self.shop = shop

    def build(self, inputs: Sequence[Any]) -> list[Any]:
        """See TVM; an error becomes the result of its input."""
        return [self._build(i) for i in inputs]

    def _build(self, given: Any) -> Any:
        try:
            made = contestant(given.mod, given.target)
        except Exception as error:  # TVM raises what it likes
            return _builder.BuilderResult(None, f"{type(error).__name__}: {error}"[:500])
        return _builder.BuilderResult(self.shop.keep(made), None)


@_derived
class _Done(_runner.PyRunnerFuture):  # type: ignore[misc]
    """A result that is already there."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def done(self) -> bool:
        return True

    def result(self) -> Any:
        return self.value


@_derived
class Runner(_runner.PyRunner):  # type: ignore[misc]
    """Lets all kernels of a batch take turns; the seconds of equal turns belong together."""

    def __init__(
        self,
        shop: Shop,
        seconds: float,
        turns: tuple[int, int],
        arguments: Arguments | None = None,
    ) -> None:
        """Limits and arguments of a contest, see `contest`."""
        super().__init__()
        self.shop = shop
        self.seconds = seconds
        self.turns = turns
        self.arguments = arguments or Arguments()
        self.rng = np.random.default_rng(0)

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """See TVM."""
        keys = [str(i.artifact_path) for i in inputs]
        kernels = [self.shop.kernels[key] for key in keys]
        times = contest(kernels, self.arguments, self.rng, self.seconds, self.turns)
        self.shop.drop(keys)
        results = [_runner.RunnerResult(t.tolist(), None) for t in times]
        return [_Done(result) for result in results]
