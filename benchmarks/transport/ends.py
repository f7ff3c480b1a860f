"""One end of a pair under test, in a process of its own: what sockets and pdx's lanes do. Others: see libraries.

Both ends know beforehand what will travel, so that none has to describe it; pdx's lanes do all the same.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from pdx.transport.api import Arrived, Copy, Event, Lane, PeerLost, PutDone, PutFailed, Span
from pdx.transport.registry import open_lane
from pdx.transport.tls import LaneTls, TlsFiles

CERTIFICATES = "BENCH_CERTIFICATES"  # the variable that names their folder
KEY = b"benchmark" * 2
WAIT_S = 60.0
QUEUED_BYTES = 64 << 20  # what a daemon may have given to a lane; more than any lane has under way


class End(Protocol):
    """Calls come in pairs: one end sends while the other receives, one pings while the other pongs."""

    def hello(self) -> str:
        """What the other end is told before meet()."""

    def meet(self, hello: str) -> None: ...

    def send(self, puts: Sequence[Sequence[Copy]]) -> None:
        """Returns when the source may be written to again."""

    def receive(self, puts: Sequence[Sequence[Copy]]) -> None:
        """Returns when all is there."""

    def ping(self, copy: Copy, rounds: int) -> list[float]:
        """Sends the copy and waits for its return; seconds of each round trip."""

    def pong(self, copy: Copy, rounds: int) -> None: ...

    def close(self) -> None: ...


class BareEnd:
    """A loop over sendmsg() and recvmsg_into(): one call a put, straight from and into the memory."""

    def __init__(self, side: str, memory: memoryview, *, host: str = "127.0.0.1") -> None:
        self._side, self._memory = side, memory
        self._listening = socket.create_server((host, 0)) if side == "target" else None

    def hello(self) -> str:
        return json.dumps(self._listening.getsockname()[:2] if self._listening else None)

    def meet(self, hello: str) -> None:
        if self._listening is None:
            self._socket = socket.create_connection(tuple(json.loads(hello)), WAIT_S)
        else:
            self._socket, _ = self._listening.accept()
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, puts: Sequence[Sequence[Copy]]) -> None:
        for put in puts:
            self._move([self._memory[c.source_offset : c.source_offset + c.length] for c in put], self._socket.sendmsg)

    def receive(self, puts: Sequence[Sequence[Copy]]) -> None:
        for put in puts:
            self._fill([self._memory[c.target_offset : c.target_offset + c.length] for c in put])

    def ping(self, copy: Copy, rounds: int) -> list[float]:
        view, seconds = self._memory[copy.source_offset : copy.source_offset + copy.length], []
        for _ in range(rounds):
            started = time.perf_counter()
            self._socket.sendall(view)
            self._fill([view])
            seconds.append(time.perf_counter() - started)
        return seconds

    def pong(self, copy: Copy, rounds: int) -> None:
        view = self._memory[copy.target_offset : copy.target_offset + copy.length]
        for _ in range(rounds):
            self._fill([view])
            self._socket.sendall(view)

    def close(self) -> None:
        self._socket.close()
        if self._listening is not None:
            self._listening.close()

    def _fill(self, views: list[memoryview]) -> None:
        self._move(views, lambda rest: self._socket.recvmsg_into(rest, 0, socket.MSG_WAITALL)[0])

    def _move(self, views: list[memoryview], call: Callable[[list[memoryview]], int]) -> None:
        left_bytes = sum(len(view) for view in views)
        while moved_bytes := call(views):
            left_bytes -= moved_bytes
            if not left_bytes:
                return
            while moved_bytes >= len(views[0]):
                moved_bytes -= len(views.pop(0))
            views[0] = views[0][moved_bytes:]
        raise ConnectionError("the other end has hung up")


class LaneEnd:
    """A lane of pdx, driven as a daemon drives it: events are taken when its descriptor says so."""

    def __init__(self, lane: Lane, memory: memoryview) -> None:
        self._lane = lane
        self._region = lane.register(memory)
        self._window = self._region.open_window([Span(0, memory.nbytes)])
        self._channel = self._their_window = 0
        self._arrived = self._ended = 0
        self.arrivals: list[tuple[float, str]] = []  # when, on this machine's clock, and its notice

    def hello(self) -> str:
        return json.dumps([self._lane.endpoint, self._window])

    def meet(self, hello: str) -> None:
        endpoint, self._their_window = json.loads(hello)
        self._channel = self._lane.connect(endpoint)
        self._put([], b"here")
        self._wait(lambda: self._ended == 1 and self._arrived == 1)
        self._arrived = 0

    def send(self, puts: Sequence[Sequence[Copy]]) -> None:
        sizes = [sum(copy.length for copy in put) for put in puts]
        first, queued_bytes, collected = self._ended, 0, 0
        for put, size in zip(puts, sizes, strict=True):
            while queued_bytes and queued_bytes + size > QUEUED_BYTES:
                self._wait(lambda: self._ended - first > collected)  # noqa: B023 - called at once
                while collected < self._ended - first:
                    queued_bytes -= sizes[collected]
                    collected += 1
            self._put(put, b"landed")
            queued_bytes += size
        self._wait(lambda: self._ended - first == len(puts))

    def receive(self, puts: Sequence[Sequence[Copy]]) -> None:
        self._wait(lambda: self._arrived >= len(puts))
        self._arrived -= len(puts)

    def ping(self, copy: Copy, rounds: int) -> list[float]:
        self._arrived, seconds = 0, []
        for number in range(rounds):
            started = time.perf_counter()
            self._put([copy], b"ping")
            self._wait(lambda: self._arrived > number)  # noqa: B023 - called at once
            seconds.append(time.perf_counter() - started)
        self._arrived = 0
        return seconds

    def pong(self, copy: Copy, rounds: int) -> None:
        for number in range(rounds):
            self._wait(lambda: self._arrived > number)  # noqa: B023 - called at once
            self._put([Copy(copy.target_offset, copy.source_offset, copy.length)], b"pong")
        self._arrived -= rounds

    def put(self, copies: Sequence[Copy], notice: bytes, *, queue: bytes, urgency: float) -> None:
        self._lane.put(
            self._channel, region=self._region, window=self._their_window, copies=copies, notice=notice, queue=queue,
            urgency=urgency,
        )  # fmt: skip

    def rest(self, seconds: float) -> None:
        """Takes events for so long."""
        until = time.monotonic() + seconds
        while (left_s := until - time.monotonic()) > 0:
            if select.select([self._lane.fileno()], [], [], left_s)[0]:
                self._take_all()

    def take_arrivals(self, count: int) -> list[tuple[float, str]]:
        """The next so many."""
        self._wait(lambda: len(self.arrivals) >= count)
        taken, self.arrivals = self.arrivals[:count], self.arrivals[count:]
        self._arrived -= count
        return taken

    def close(self) -> None:
        self._lane.close(drain_s=1.0)

    def _put(self, copies: Sequence[Copy], notice: bytes) -> None:
        self.put(copies, notice, queue=b"q", urgency=0.0)

    def _wait(self, is_reached: Callable[[], bool]) -> None:
        while not is_reached():
            if not select.select([self._lane.fileno()], [], [], WAIT_S)[0]:
                raise TimeoutError(f"{self._lane!r} said nothing for {WAIT_S:g} s")
            self._take_all()

    def _take_all(self) -> None:
        for event in self._lane.take_events():
            self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case Arrived(_, notice):
                self._arrived += 1
                if notice not in (b"landed", b"ping", b"pong", b"here"):
                    self.arrivals.append((time.monotonic(), notice.decode()))
            case PutDone():
                self._ended += 1
            case PutFailed() | PeerLost():
                raise ConnectionError(repr(event))


def lane_end(side: str, memory: memoryview, *, scheme: str, host: str = "127.0.0.1") -> LaneEnd:
    """An end of a lane that a daemon would open; "ucx" also where UCX emulates writes, "tls" is tcp with TLS."""
    url = f"{scheme}://{host}:0"
    if scheme == "tls":
        folder = Path(os.environ[CERTIFICATES])
        tls = LaneTls(TlsFiles(folder / "host.pem", folder / "host.key", folder / "authority.pem"))
        return LaneEnd(open_lane(f"tcp://{host}:0", key=KEY, name=side, tls=tls), memory)
    if scheme == "ucx":
        from pdx.transport.ucx import UcxLane

        return LaneEnd(UcxLane(url, key=KEY, name=side, emulated=True), memory)
    return LaneEnd(open_lane(url, key=KEY, name=side), memory)
