"""Peers of a one-sided lane that are not what they should be: they speak through raw links, without any library."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Iterator

from lane_pairs import KEY, example_fabric

from pdx.errors import PeerGone
from pdx.transport.api import Span
from pdx.transport.fabric import Fabric
from pdx.transport.handshake import greet_as_acceptor, greet_as_connector
from pdx.transport.link import Link
from pdx.transport.link_messages import Ask, Granted, LinkMessage
from pdx.transport.onesided import OneSidedLane
from pdx.transport.side import MEMORY_BYTES, WAIT_S, Side
from pdx.transport.sockets import parse_endpoint


@contextlib.contextmanager
def opened(
    key: bytes | None = KEY,
    *,
    seed: int = 2,
    stall_s: float = 5.0,
    settle_s: float = 0.0,
    make_fabric: Callable[[], Fabric] = example_fabric,
) -> Iterator[Side]:
    lane = OneSidedLane(
        "raw://127.0.0.1:0", scheme="raw", key=key, name=f"side{seed}", make_fabric=make_fabric, stall_s=stall_s,
        settle_s=settle_s,
    )  # fmt: skip
    side = Side(lane, seed=seed)
    try:
        yield side
    finally:
        lane.abort()


class RawPeer:
    """The other end of a link, which says what it is told to."""

    def __init__(self, connection: socket.socket) -> None:
        self.link = Link(connection)
        self._said: list[LinkMessage] = []

    def next(self) -> LinkMessage:
        """What the lane says next. PeerGone when it hangs up."""
        deadline_s = time.monotonic() + WAIT_S
        while not self._said:
            assert select.select([self.link.fileno()], [], [], deadline_s - time.monotonic())[0], "it says nothing"
            self._said += self.link.receive()
        return self._said.pop(0)

    def is_dropped(self) -> bool:
        with contextlib.suppress(PeerGone, ConnectionResetError):
            while True:
                self.next()
        return True

    def grant(self, window: int, *, at: Side, span: Span) -> None:
        """When it is asked for: this span of the memory of a side in this process."""
        assert self.next() == Ask(window)
        address = at.region.memory.address  # type: ignore[attr-defined]
        self.link.send(Granted(window, address, MEMORY_BYTES, "DRAM", 0, [span], example_fabric().metadata()))

    def grant_nothing(self, window: int) -> None:
        """It was asked for: a window without a byte, whose notices can be put."""
        self.link.send(Granted(window, 0, 0, "DRAM", 0, [], b""))


@contextlib.contextmanager
def writer(side: Side) -> Iterator[RawPeer]:
    """A peer that proved the key and is about to write into `side`."""
    connection = socket.create_connection(parse_endpoint(side.lane.endpoint, scheme="raw"), timeout=WAIT_S)
    with connection:
        greet_as_connector(connection, KEY)
        yield RawPeer(connection)


@contextlib.contextmanager
def reader(side: Side) -> Iterator[tuple[RawPeer, int]]:
    """A peer that `side` is about to write into, and the channel to it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(WAIT_S)
        channel = side.lane.connect(f"raw://127.0.0.1:{listening.getsockname()[1]}")
        connection, _ = listening.accept()
        with connection:
            connection.settimeout(WAIT_S)
            greet_as_acceptor(connection, KEY)
            yield RawPeer(connection), channel
