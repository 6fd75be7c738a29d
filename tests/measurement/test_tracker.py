import socket
import threading
import time
from collections.abc import Iterator

import pytest

from t3c.codegen.tvm_api import rpc
from t3c.core.errors import TargetError
from t3c.measurement.hosts import connect
from t3c.measurement.tracker import Board, Tracker


@pytest.fixture
def tracker() -> Iterator[Tracker]:
    with Tracker() as made:
        worker = threading.Thread(target=made.serve_forever)
        worker.start()
        yield made
        made.shutdown()
        worker.join()


def server(tracker: Tracker, key: str, port: int) -> socket.socket:
    """A connection that announced a server, in TVM's words."""
    found = socket.create_connection(tracker.address)
    found.sendall((rpc.base.RPC_TRACKER_MAGIC).to_bytes(4, "little"))
    assert len(found.recv(4)) == 4
    put = [rpc.base.TrackerCode.PUT, key, [port, f"{key}:secret{port}"], None]
    rpc.base.sendjson(found, put)
    assert rpc.base.recvjson(found) == rpc.base.TrackerCode.SUCCESS
    return found


def test_tvms_own_client_sees_servers_come_and_go(tracker: Tracker) -> None:
    client = rpc.connect_tracker(*tracker.address)
    assert client.summary()["queue_info"] == {}
    one, two = server(tracker, "board", 7001), server(tracker, "board", 7002)
    assert client.summary()["queue_info"]["board"] == {"free": 2, "pending": 0}
    rpc.base.sendjson(one, [rpc.base.TrackerCode.GET_PENDING_MATCHKEYS])
    assert rpc.base.recvjson(one) == ["board:secret7001"]
    one.close()
    limit = time.monotonic() + 10
    while client.summary()["queue_info"]["board"]["free"] != 1 and time.monotonic() < limit:
        time.sleep(0.01)
    assert client.summary()["queue_info"]["board"]["free"] == 1
    two.close()


def test_whoever_waits_longest_gets_the_next_server() -> None:
    board, given = Board(), list[tuple[str, str]]()

    def gone(*_: object) -> None:
        raise OSError("hung up")

    board.ask("a", gone)
    board.ask("a", lambda address, secret: given.append(("first", secret)))
    board.ask("a", lambda address, secret: given.append(("second", secret)))
    with socket.socket() as connection:
        for secret in ("x", "y", "z"):
            board.put("a", (("host", 1), secret, connection))
        assert given == [("first", "x"), ("second", "y")]
        assert board.counts() == {"a": {"free": 1, "pending": 0}}
        assert board.secrets(connection) == ["z"]
        board.forget(connection)
    assert board.counts() == {"a": {"free": 0, "pending": 0}}


def test_a_tracker_without_servers_is_told(tracker: Tracker) -> None:
    host, port = tracker.address
    with pytest.raises(TargetError, match="has no free server of key 'board'; start one with"):
        connect(f"tracker://{host}:{port}/board")
    with pytest.raises(ValueError, match="write tracker://host:port/key"):
        connect(f"tracker://{host}:{port}")
