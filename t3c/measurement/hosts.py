"""Where units run: this process, or servers of TVM's RPC."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t3c.codegen.shards import fill
from t3c.codegen.tvm_api import rpc, tvm
from t3c.core.errors import TargetError
from t3c.measurement.units import PLACE, Array, Function, Unit

_SHARE_ALL = -3


class Host:
    """One device that runs libraries; it works on one unit at a time.

    Attributes:
        name: For messages.
        here: Whether it is this process.
    """

    def __init__(self, name: str, session: Any = None) -> None:
        """Use this process, or a session of TVM's RPC."""
        self.name = name
        self.here = session is None
        self._session = session
        self._device = tvm.cpu(0) if session is None else session.cpu(0)

    def use_threads(self, count: int) -> None:
        """Let kernels run on so many threads."""
        name = "runtime.config_threadpool"
        found = (
            tvm.get_global_func(name) if self._session is None else self._session.get_function(name)
        )
        found(_SHARE_ALL, count)

    def load(self, unit: Unit) -> "Loaded":
        """Bring a unit onto the device."""
        if self._session is None:
            module = tvm.runtime.load_module(str(unit.library))
        else:
            remote = f"{unit.path.name}.so"
            self._session.upload(bytearray(unit.library.read_bytes()), remote)
            module = self._session.load_module(remote)
        return Loaded(unit, module, self._device, self._session is None)


def connect(device: str, key: str = "", timeout_s: float = 60.0) -> list[Host]:
    """Hosts by text.

    Args:
        device: ``local``; ``host:port,host:port`` for servers of TVM's RPC; or
            ``tracker://host:port/key``, all of a tracker's free servers of that key.
        key: Of servers that are named one by one.
        timeout_s: Waited for a tracker's server.

    Raises:
        TargetError: A server cannot be reached, or a tracker has none.
        ValueError: The text is none of these.
    """
    if device == "local":
        return [Host("local")]
    tracked = device.startswith("tracker://")
    addresses = [] if tracked else [_address(one.strip(), device) for one in device.split(",")]
    try:
        if tracked:
            return _tracked(device, timeout_s)
        return [Host(f"{h}:{p}", rpc.connect(h, p, key)) for h, p in addresses]
    except (RuntimeError, OSError) as error:
        raise TargetError(
            f"device {device!r} cannot be reached: {str(error).strip().splitlines()[-1]}; start "
            "`python -m tvm.exec.rpc_server` there (it needs cloudpickle), and check address and "
            "key"
        ) from error


def _address(text: str, device: str) -> tuple[str, int]:
    """Host and port."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"device {device!r}: write 'local', 'host:port,host:port' or 'tracker://host:port/key'"
        )
    return host, int(port)


def _tracked(device: str, timeout_s: float) -> list[Host]:
    """A session of each free server of a key."""
    address, _, key = device.removeprefix("tracker://").partition("/")
    if not key:
        raise ValueError(f"device {device!r}: write tracker://host:port/key")
    tracker = rpc.connect_tracker(*_address(address, device))
    free = tracker.summary()["queue_info"].get(key, {}).get("free", 0)
    if not free:
        raise TargetError(
            f"tracker {address} has no free server of key {key!r}; start one with `python -m "
            f"tvm.exec.rpc_server --tracker {address} --key {key}`"
        )
    return [
        Host(f"{key} {i}", tracker.request(key, session_timeout=0, max_retry=1))
        for i in range(int(free))
    ]


@dataclass(slots=True)
class Loaded:
    """A unit on a device.

    Attributes:
        unit: What it is.
        module: Its functions.
        device: Where its memory is.
        here: Whether that is this process.
    """

    unit: Unit
    module: Any
    device: Any
    here: bool
    _block: Any = None
    _arguments: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def kernels(self, function: Function) -> NDArray[np.float64]:
        """Seconds of every kernel of one call that follows another."""
        stamps = self.tensor(np.zeros(len(function.of_call) + 1, np.int64))
        arguments = (*self.arguments(function), stamps)
        (seconds,) = self._timed(function.trace, 1, arguments)
        cycles = np.diff(stamps.numpy()).astype(np.float64)
        scaled: NDArray[np.float64] = cycles * (seconds / max(1.0, float(cycles.sum())))
        return scaled

    def calls(self, function: Function, count: int) -> list[float]:
        """Seconds of so many calls in a row, behind one that does not count.

        One thread of this process is timed by the processor time that it takes: the time of a call
        on a quiet machine, whatever else runs.
        """
        arguments = self.arguments(function)
        if not self.here or function.rows[0].threads > 1:
            return self._timed(function.call, count, arguments)
        call = self.module[function.call]
        call(*arguments)
        found = []
        for _ in range(count):
            start = time.thread_time()
            call(*arguments)
            found.append(time.thread_time() - start)
        return found

    def runner(self, function: Function) -> Callable[[], object]:
        """One call, as often as it is wanted; for meters."""
        arguments = self.arguments(function)
        if not function.call:
            stamps = self.tensor(np.zeros(len(function.of_call) + 1, np.int64))
            arguments = (*arguments, stamps)
        return partial(self.module[function.call or function.trace], *arguments)

    def _timed(self, name: str, count: int, arguments: tuple[Any, ...]) -> list[float]:
        timer = self.module.time_evaluator(name, self.device, number=1, repeat=count)
        return [float(seconds) for seconds in timer(*arguments).results]

    def arguments(self, function: Function) -> tuple[Any, ...]:
        """What the function is called with, but stamps; made once."""
        if function.trace not in self._arguments:
            rng = np.random.default_rng(0)
            inputs = [self.tensor(_input(one, rng)) for one in function.inputs]
            outputs = [self.tensor(np.zeros(shape, dtype)) for shape, dtype in function.outputs]
            arena = self.tensor(fill(function.arena_bytes))
            self._arguments[function.trace] = (*inputs, self._table(function), arena, *outputs)
        return self._arguments[function.trace]

    def _table(self, function: Function) -> Any:
        """Addresses of the weights, on the device."""
        if self._block is None:
            block = self.unit.block()
            if block is None:
                return self.tensor(np.zeros(1, np.int64))
            self._block = self.tensor(block)
        most = max(len(f.weights) for f in self.unit.functions)
        offsets = np.zeros(most, np.int64)
        offsets[: len(function.weights)] = function.weights
        table = self.tensor(np.zeros(most, np.int64))
        self.module[PLACE](self._block, self.tensor(offsets), table)
        count = max(1, len(function.weights))
        if count == most:
            return table
        return self.tensor(table.numpy()[:count])

    def tensor(self, array: NDArray[Any]) -> Any:
        """An array on the device."""
        return tvm.runtime.tensor(array, self.device)


def _input(one: Array, rng: np.random.Generator) -> NDArray[Any]:
    shape, dtype = one
    if dtype.startswith("float"):
        return rng.standard_normal(shape).astype(dtype)
    return np.ones(shape, dtype)
