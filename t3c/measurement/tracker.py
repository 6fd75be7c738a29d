"""A tracker of RPC servers, speaking the protocol of TVM's own, which needs the package tornado.

    python -m t3c.measurement.tracker --port 9190
    python -m tvm.exec.rpc_server --tracker 127.0.0.1:9190 --key board      on each device

Servers announce themselves under a key; whoever asks for one gets its address and a secret that
the server accepts once. A server that goes away is forgotten.
Source: tvm/rpc/tracker.py and base.py of TVM 0.27.
"""

import argparse
import json
import socket
import socketserver
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from t3c.codegen.tvm_api import rpc

Address = tuple[str, int]
Free = tuple[Address, str, socket.socket]
"""Address of a server, the secret that it accepts, the connection that announced it."""


@dataclass(slots=True)
class Board:
    """Who is free and who waits, by key."""

    free: dict[str, list[Free]] = field(default_factory=dict)
    waiting: dict[str, list[Callable[[Address, str], None]]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def put(self, key: str, server: Free) -> None:
        """A server is free: whoever waits longest gets it."""
        with self.lock:
            self.free.setdefault(key, []).append(server)
            self._match(key)

    def ask(self, key: str, give: Callable[[Address, str], None]) -> None:
        """Somebody wants a server."""
        with self.lock:
            self.waiting.setdefault(key, []).append(give)
            self._match(key)

    def forget(self, connection: socket.socket) -> None:
        """The server of a connection is gone."""
        with self.lock:
            for key, servers in self.free.items():
                self.free[key] = [s for s in servers if s[2] is not connection]

    def secrets(self, connection: socket.socket) -> list[str]:
        """Secrets of the servers that a connection announced and nobody took."""
        with self.lock:
            return [s[1] for servers in self.free.values() for s in servers if s[2] is connection]

    def counts(self) -> dict[str, dict[str, int]]:
        """Key -> free servers and those who wait."""
        with self.lock:
            return {
                key: {
                    "free": len(self.free.get(key, [])),
                    "pending": len(self.waiting.get(key, [])),
                }
                for key in {*self.free, *self.waiting}
            }

    def _match(self, key: str) -> None:
        free, waiting = self.free.get(key, []), self.waiting.get(key, [])
        while free and waiting:
            address, secret, _ = free[0]
            try:
                waiting.pop(0)(address, secret)
            except OSError:  # it did not wait so long
                continue
            free.pop(0)


class _Connection(socketserver.BaseRequestHandler):
    """Talks with one server or client until it hangs up."""

    def handle(self) -> None:
        """See socketserver."""
        board: Board = self.server.board  # type: ignore[attr-defined]
        try:
            if _receive(self.request, 4) != struct.pack("<i", rpc.base.RPC_TRACKER_MAGIC):
                return
            self.request.sendall(struct.pack("<i", rpc.base.RPC_TRACKER_MAGIC))
            while True:
                (size,) = struct.unpack("<i", _receive(self.request, 4))
                self._answer(board, json.loads(_receive(self.request, size)))
        except (ConnectionError, OSError, ValueError, struct.error):
            pass
        finally:
            board.forget(self.request)

    def _answer(self, board: Board, message: list[Any]) -> None:
        codes = rpc.base.TrackerCode
        match message:
            case [codes.PUT, key, [int(port), str(secret)], host]:
                address = (self.client_address[0] if host is None else str(host), port)
                board.put(str(key), (address, secret, self.request))
                self._send(codes.SUCCESS)
            case [codes.REQUEST, key, _, _]:
                board.ask(
                    str(key),
                    lambda address, secret: self._send([codes.SUCCESS, [*address, secret]]),
                )
            case [codes.GET_PENDING_MATCHKEYS]:
                self._send(board.secrets(self.request))
            case [codes.SUMMARY]:
                self._send([codes.SUCCESS, {"queue_info": board.counts(), "server_info": []}])
            case [codes.PING] | [codes.UPDATE_INFO, _]:
                self._send(codes.SUCCESS)
            case _:
                self._send(codes.FAIL)

    def _send(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.request.sendall(struct.pack("<i", len(data)) + data)


def _receive(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise ConnectionError("hung up")
        found += part
    return found


class Tracker(socketserver.ThreadingTCPServer):
    """The tracker; `serve_forever` works until `shutdown`."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; port 0 takes a free one, which is then in `address`."""
        self.board = Board()
        super().__init__((host, port), _Connection)

    @property
    def address(self) -> Address:
        """Host and port that it listens at."""
        host, port = self.server_address[:2]
        return str(host), int(port)


def main() -> None:
    """Run one until it is interrupted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9190)
    options = parser.parse_args()
    with Tracker(options.host, options.port) as tracker:
        print(f"tracker at {options.host}:{options.port}", flush=True)
        try:
            tracker.serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
