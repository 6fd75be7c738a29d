"""The only module that calls TVM at run time: libraries, virtual machines, tensors."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import tvm_ffi
from numpy.typing import NDArray
from tvm import runtime
from tvm.runtime import vm

from t3c.core.errors import ArtifactError, TargetError
from t3c.runtime.weights import ALIGNMENT

_HOST = runtime.cpu(0).dlpack_device_type()

Tensor = Any
Function = Callable[..., Any]


configure_pool: Function = tvm_ffi.get_global_func("runtime.config_threadpool")
"""Of the calling thread: (mode, number of threads, processors)."""


class Library:
    """A loaded library. A virtual machine is not re-entrant, so each thread gets its own."""

    def __init__(self, path: Path, kind: str) -> None:
        """Load it.

        Args:
            path: The shared library.
            kind: ``llvm`` or ``cuda``.

        Raises:
            ArtifactError: TVM cannot load the file.
            TargetError: The device is not there.
        """
        try:
            self._module: Any = runtime.load_module(str(path))
        except (RuntimeError, OSError, ValueError) as error:
            raise ArtifactError(f"{path}: TVM cannot load it: {error}") from error
        self.device: Any = runtime.cuda(0) if kind == "cuda" else runtime.cpu(0)
        self.on_host = kind != "cuda"
        if not self.device.exist:
            raise TargetError(f"{path.name} needs a {kind} device; TVM finds none on this machine")
        self._local = threading.local()

    def native(self, name: str) -> Function:
        """The function of machine code called `name`; any thread may call it.

        Raises:
            ArtifactError: The library has no such function.
        """
        try:
            return cast(Function, self._module[name])
        except AttributeError as error:
            raise ArtifactError(f"the library has no function {name!r}") from error

    def function(self, name: str) -> Function:
        """The VM function called `name`, in this thread's virtual machine.

        Raises:
            ArtifactError: The library has no such function.
        """
        functions: dict[str, Function] | None = getattr(self._local, "functions", None)
        if functions is None:
            functions = self._local.functions = {}
            self._local.machine = vm.VirtualMachine(self._module, self.device)
        if (found := functions.get(name)) is None:
            try:
                found = functions[name] = self._local.machine[name]
            except AttributeError as error:
                raise ArtifactError(f"the library has no function {name!r}") from error
        return found

    def place(self, tensor: Tensor) -> Tensor:
        """The tensor on the library's device; itself when it is there already."""
        return tensor if self.on_host else tensor.copyto(self.device)


def share(array: object) -> Tensor:
    """A TVM tensor over the memory of any DLPack array; no bytes are copied.

    Raises:
        BufferError: A read-only numpy array.
    """
    return tvm_ffi.from_dlpack(array)


def group(tensors: Sequence[Tensor]) -> Any:
    """A tuple argument, converted once."""
    return tvm_ffi.convert(list(tensors))


def on_host(tensor: Tensor) -> bool:
    """Whether the tensor lies in host memory."""
    return bool(tensor.device.dlpack_device_type() == _HOST)


def aligned(tensor: Tensor) -> bool:
    """Whether the tensor starts at a multiple of 64 bytes, as compiled kernels need."""
    return int(tensor.data_ptr()) % ALIGNMENT == 0


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """A numpy array over the tensor's memory (a copy if it lies on a device)."""
    return np.from_dlpack(tensor) if on_host(tensor) else tensor.numpy()


def flat(outputs: Any) -> Sequence[Tensor]:
    """The outputs of a call as a sequence, also when it is a single tensor."""
    return (outputs,) if isinstance(outputs, runtime.Tensor) else tuple(outputs)
