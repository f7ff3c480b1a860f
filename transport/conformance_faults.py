"""What every lane must do whatever befalls the network: seeded faults in the middle of a stream of puts.

Near reaches far through a Hazard, which passes bytes on until the fault strikes, at a byte that the seed has chosen:
before the greeting, within it, within a frame, behind the last. A killed or stopped peer: see conformance_death.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
from collections.abc import Sequence
from typing import Literal
from urllib.parse import urlsplit

from pdx.transport.api import Copy, PutDone, Span
from pdx.transport.side import GONE_S, MEMORY_BYTES, WAIT_S, MakePair, Side, arrivals_of, ends_of, losses_of

Fault = Literal["cut", "reset", "stall", "corrupt"]
# A one-sided lane's connection carries the right to write: a bit that flips there is for TCP's checksum to find.
FAULTS: dict[Literal["receiver", "sender"], tuple[Fault, ...]] = {
    "receiver": ("cut", "reset", "stall", "corrupt"),
    "sender": ("cut", "reset", "stall"),
}
PUTS, PUT_BYTES, USUAL_PUT_BYTES = 24, 64 << 10, 17 << 10
GREETINGS_BYTES = 80
MESSAGE_BYTES = 24  # of a one-sided lane, for each put
# Puts go from the lower half of near's memory into the upper half of far's.
START = MEMORY_BYTES // 2


def check_fault(make_pair: MakePair, *, fault: Fault, seed: int) -> None:
    """Every put ends once, nothing lands outside its window or is told before it is there, and all goes on after it."""
    rng = random.Random(f"{fault} {seed}")  # noqa: S311 - seeded on purpose
    with make_pair() as pair:
        near, far = Side(pair.near, seed=1), Side(pair.far, seed=2)
        carried_bytes = USUAL_PUT_BYTES if far.lane.checked_by == "receiver" else MESSAGE_BYTES
        with Hazard(far.lane.endpoint, fault, after_bytes=rng.randrange(GREETINGS_BYTES + PUTS * carried_bytes)) as way:
            _stream(near, far, near.lane.connect(way.endpoint), rng, is_intact=fault != "corrupt")
        window = far.region.open_window([Span(0, 10)])
        ticket = near.put(near.lane.connect(far.lane.endpoint), window, [Copy(0, 0, 10)], notice=b"and on")
        ended = near.wait_end(ticket)
        assert isinstance(ended, PutDone), f"the put after it: {ended}"
        far.wait_arrived(b"and on")


def _stream(near: Side, far: Side, channel: int, rng: random.Random, *, is_intact: bool) -> None:
    before = bytes(far.memory)
    window = far.region.open_window([Span(START, PUTS * PUT_BYTES)])
    copies = [
        Copy(number * PUT_BYTES, START + number * PUT_BYTES, rng.choice([0, 1, 4096, PUT_BYTES]))
        for number in range(PUTS)
    ]
    tickets: list[int] = []
    for number, copy in enumerate(copies):
        queue, urgency = b"%d" % rng.randrange(3), float(rng.randrange(3))
        tickets.append(near.put(channel, window, [copy], notice=b"%d" % number, queue=queue, urgency=urgency))
    if rng.random() < 0.2:
        near.lane.cancel(b"0")
    is_closed_early = rng.random() < 0.3
    if is_closed_early:
        far.region.close_window(window)
    for ticket in tickets:
        near.wait_end(ticket)
    if not is_closed_early:
        far.region.close_window(window)
    if far.lane.checked_by == "sender":  # it keeps a window for a peer that is there
        near.lane.break_channel(channel, "the test is over")  # type: ignore[attr-defined]
    far.wait_closed(window, GONE_S)
    assert all(len(ends_of(near.events, ticket)) == 1 for ticket in tickets), "a put ended twice"
    assert len(losses_of(near.events, channel)) <= 1, "PeerLost more than once"
    behind = START + PUTS * PUT_BYTES
    untouched = far.memory[:START] == before[:START] and far.memory[behind:] == before[behind:]
    assert untouched, "a byte was written outside the window"
    if is_intact:
        _check_arrived(near, far, copies)


def _check_arrived(near: Side, far: Side, copies: Sequence[Copy]) -> None:
    notices = arrivals_of(far.events)
    assert len(notices) == len(set(notices)), "a notice was delivered twice"
    for notice in notices:
        copy = copies[int(notice)]
        here = far.memory[copy.target_offset : copy.target_offset + copy.length]
        there = near.memory[copy.source_offset : copy.source_offset + copy.length]
        assert here == there, f"put {int(notice)} is told and not there"


class Hazard:
    """A way to `endpoint` on which one fault strikes. Its thread ends with the context, and all connections with it."""

    def __init__(self, endpoint: str, fault: Fault, *, after_bytes: int) -> None:
        address = urlsplit(endpoint)
        assert address.hostname is not None and address.port is not None
        self._target = address.hostname, address.port
        self.scheme, self.fault = address.scheme, fault
        self._left_bytes = after_bytes
        self.has_struck = False
        self._listening = socket.create_server((address.hostname, 0))
        self._stop, self._stopped = socket.socketpair()
        self.endpoint = f"{address.scheme}://{address.hostname}:{self._listening.getsockname()[1]}"
        self._other: dict[socket.socket, socket.socket] = {}  # each end and where its bytes go
        self._from_near: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._run, name="hazard")

    def __enter__(self) -> Hazard:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        for connection in list(self._other):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that is sending
        self._thread.join(WAIT_S)
        self._stopped.close()
        self._listening.close()

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._stopped, self._listening, *self._other], [], [])
            if self._stopped in ready:
                break
            for readable in ready:
                if readable is self._listening:
                    self._accept()
                elif readable in self._other:
                    self._pass_on(readable)
        for connection in list(self._other):
            self._drop(connection)

    def _accept(self) -> None:
        near, _ = self._listening.accept()
        try:
            far = socket.create_connection(self._target, WAIT_S)
        except OSError:  # nobody is there any more
            near.close()
            return
        self._other |= {near: far, far: near}
        self._from_near.add(near)

    def _pass_on(self, source: socket.socket) -> None:
        try:
            data = bytearray(source.recv(16 << 10))
            if not data:
                self._drop(source)
                return
            if source in self._from_near and not self.has_struck:
                self._left_bytes -= len(data)
                if self._left_bytes < 0:
                    self.has_struck = True
                    if not self._strike(source, data):
                        return
            if self.fault != "stall" or not self.has_struck:
                self._other[source].sendall(data)
        except OSError:
            self._drop(source)

    def _strike(self, source: socket.socket, data: bytearray) -> bool:
        """Whether what is left of the data goes on."""
        at = len(data) + self._left_bytes  # the first byte that does not pass as it is
        match self.fault:
            case "corrupt":
                data[at] ^= 1 << (at % 8)
            case "stall" | "cut" | "reset":
                self._other[source].sendall(data[:at])
        if self.fault in ("cut", "reset"):
            self._drop(source, resets=self.fault == "reset")
        return self.fault == "corrupt"

    def _drop(self, connection: socket.socket, *, resets: bool = False) -> None:
        other = self._other.pop(connection, None)
        if other is None:
            return
        self._other.pop(other, None)
        self._from_near -= {connection, other}
        for end in (connection, other):
            if resets:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            end.close()
