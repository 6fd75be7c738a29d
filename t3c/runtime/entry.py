"""A profile's function with everything that stays the same from call to call."""

import sys
import threading
from collections.abc import Sequence
from typing import Any, Protocol, final

import numpy as np

from t3c.core.errors import T3CError
from t3c.core.manifest import TensorSpec
from t3c.runtime import threads, tvm_vm
from t3c.runtime.weights import aligned_copy, aligned_empty


class Entry(Protocol):
    """Something that can be called from any thread."""

    def __call__(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        """Outputs, flat: torch tensors if asked for, else numpy arrays.

        Args:
            inputs: TVM tensors, in the manifest's order.
            as_torch: What to return.
        """
        ...


class Scratch(threading.local):
    """Arenas of the calling thread: one block of memory for all, as large as the largest."""

    def __init__(self) -> None:
        """Start without memory; called once in each thread."""
        self._block = aligned_empty((0,), np.dtype(np.uint8))
        self._views: dict[int, Any] = {}

    def arena(self, size: int) -> Any:
        """A TVM tensor of so many bytes; valid until the thread asks for more."""
        if (view := self._views.get(size)) is None:
            if size > self._block.nbytes:
                self._block = aligned_empty((size,), np.dtype(np.uint8))
                self._views.clear()
            view = self._views[size] = tvm_vm.share(self._block[: max(1, size)])
        return view


@final
class NativeEntry:
    """A function of machine code alone: it allocates nothing and checks its inputs once."""

    def __init__(
        self,
        function: tvm_vm.Function,
        weights: Sequence[Any],
        arena_bytes: int,
        outputs: Sequence[TensorSpec],
        scratch: Scratch,
        count: int = 1,
    ) -> None:
        """Take what every call needs.

        Args:
            function: Of the library.
            weights: TVM tensors, in the profile's order; kept alive.
            arena_bytes: Scratch memory of a call.
            outputs: What it writes.
            scratch: Where arenas come from.
            count: Threads of a call.
        """
        self._function = function
        self._weights = tuple(weights)
        addresses = [tensor.data_ptr() for tensor in weights] or [0]
        self._addresses = tvm_vm.share(aligned_copy(np.array(addresses, np.int64)))
        self._bytes = max(1, arena_bytes)
        self._outputs = [(spec.shape, np.dtype(spec.dtype), spec.dtype) for spec in outputs]
        self._scratch = scratch
        self._threads = count

    def __call__(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        """See `Entry`.

        Raises:
            TypeError: An input has another dtype.
            ValueError: An input has another shape.
            T3CError: A kernel found no memory.
        """
        outputs: list[Any]
        if as_torch:
            torch: Any = sys.modules["torch"]
            outputs = [torch.empty(s, dtype=getattr(torch, n)) for s, _, n in self._outputs]
        else:
            outputs = [aligned_empty(shape, dtype) for shape, dtype, _ in self._outputs]
        self.run(inputs, self._scratch.arena(self._bytes), *outputs)
        return outputs

    def run(self, inputs: Sequence[Any], arena: Any, *rest: Any) -> None:
        """One call with memory of the caller's choice.

        Args:
            inputs: TVM tensors.
            arena: A TVM tensor, of the size that the function takes.
            rest: Outputs, and what a trace takes behind them.

        Raises:
            T3CError: A kernel found no memory.
        """
        threads.use(self._threads)
        if self._function(*inputs, self._addresses, arena, *rest) != 0:
            raise T3CError("a kernel failed: no memory for its scratch, or for its threads")


@final
class MachineEntry:
    """A function of TVM's virtual machine, which allocates what it returns."""

    def __init__(
        self, library: tvm_vm.Library, name: str, weights: Sequence[Any], count: int
    ) -> None:
        """Look the function up, in this thread first; a call uses `count` threads of the host."""
        library.function(name)
        self._library, self._name, self._threads = library, name, count
        self._weights = tvm_vm.group(weights)

    def __call__(self, inputs: Sequence[Any], *, as_torch: bool) -> Sequence[Any]:
        """See `Entry`."""
        threads.use(self._threads)
        outputs = self._library.function(self._name)(*inputs, self._weights)
        if as_torch:
            torch: Any = sys.modules["torch"]
            return [torch.from_dlpack(tensor) for tensor in tvm_vm.flat(outputs)]
        return [tvm_vm.to_numpy(tensor) for tensor in tvm_vm.flat(outputs)]
