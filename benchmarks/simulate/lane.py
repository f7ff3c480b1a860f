"""The simulated lane: puts that are late, torn in two, spoilt or cut off. Windows are the production ones.

A put takes three steps: its bytes are read here, half of them are written there, then the rest. Between any two the
other side may close the window, the connection may break, or either daemon may die.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from benchmarks.simulate.world import Process, World
from pdx.errors import WireError
from pdx.transport.api import CONTRACT, Copy, Event, PeerLost, PutDone, PutFailed, Region, Span
from pdx.transport.outbox import checked_copies
from pdx.transport.windows import CheckedRegion, WindowTable

SCHEMES = ("fast", "plain")  # best first: what is lost on the one goes over the other for a while
LANE_S = 0.0008  # of each step of a put, give or take

Touch = Callable[[int, int, Literal["read", "write"]], None]  # offset, length, how: raises Violation


class Network:
    """Where lanes find each other, and what fate does to their puts."""

    def __init__(self) -> None:
        self.lanes: dict[str, SimulatedLane] = {}
        self.cut_until = 0.0
        self.spoil_chance = 0.0
        self.slowness = 1.0


class _Put(NamedTuple):
    ticket: int
    channel: int
    window: int
    copies: list[Copy]
    notice: bytes
    queue: bytes


class _Arrival(NamedTuple):
    """Bytes on the wire."""

    sender: SimulatedLane
    put: _Put
    spans: list[Span]
    pieces: list[bytes]

    @property
    def lost(self) -> bool:
        return self.put.channel not in self.sender._channels


class SimulatedLane:
    """See pdx.transport.api.Lane. `ring` wakes the daemon that owns it."""

    contract = CONTRACT
    checked_by: Literal["receiver", "sender"] = "receiver"

    def __init__(
        self,
        owner: Process,
        network: Network,
        name: str,
        *,
        scheme: str,
        touch: Touch,
        ring: Callable[[], None],
        region: Callable[[memoryview, WindowTable], CheckedRegion],
    ) -> None:
        self.scheme = scheme
        self.endpoint = f"{scheme}://{name}"
        self.owner = owner
        self._world: World = owner.world
        self._network = network
        self._touch = touch
        self._ring = ring
        self._region = region
        self._events: list[Event] = []
        self._numbers = itertools.count(1)
        self._channels: dict[int, str] = {}
        self._queues: dict[bytes, list[_Put]] = {}  # each in order; its first put is under way
        self._wire_free_at = 0.0  # bytes arrive in the order in which they left
        self.windows = WindowTable(emit=self._emit, new_id=lambda: self._world.chance.getrandbits(64))
        self._memory = memoryview(b"")
        network.lanes[self.endpoint] = self

    def fileno(self) -> int:
        return -1  # nobody polls: `ring` is called

    def register(self, memory: memoryview) -> CheckedRegion:
        self._memory = memory
        return self._region(memory, self.windows)

    def connect(self, endpoint: str) -> int:
        for number, there in self._channels.items():
            if there == endpoint:
                return number
        number = next(self._numbers)
        self._channels[number] = endpoint
        return number

    def put(
        self,
        channel: int,
        *,
        region: Region,
        window: int,
        copies: Sequence[Copy],
        notice: bytes,
        queue: bytes,
        urgency: float,
    ) -> int:
        ticket = next(self._numbers)
        put = _Put(ticket, channel, window, checked_copies(copies, len(self._memory), notice=notice), notice, queue)
        waiting = self._queues.setdefault(queue, [])
        waiting.append(put)
        if len(waiting) == 1:
            self._start(put)
        return ticket

    def cancel(self, queue: bytes) -> None:
        waiting = self._queues.get(queue)
        if waiting is not None:
            dropped = waiting[1:]  # the first is on the wire
            del waiting[1:]
            for put in dropped:
                self._emit(PutFailed(put.ticket, "cancelled"))

    @property
    def windows_open(self) -> int:
        return len(self.windows._windows)

    def take_events(self) -> list[Event]:
        taken, self._events = self._events, []
        return taken

    def close(self, *, drain_s: float) -> None:
        self.abort()

    def abort(self) -> None:
        if self._network.lanes.get(self.endpoint) is self:
            del self._network.lanes[self.endpoint]
        self._channels.clear()
        self._queues.clear()
        for lane in self._network.lanes.values():
            lane.break_to(self.endpoint)

    def break_to(self, endpoint: str) -> None:
        """The connection to this peer breaks; bytes on their way are lost, even of puts that are done here."""
        for number in [n for n, there in self._channels.items() if there == endpoint]:
            del self._channels[number]
            for queue, waiting in list(self._queues.items()):
                for put in [put for put in waiting if put.channel == number]:
                    waiting.remove(put)
                    self._emit(PutFailed(put.ticket, "the connection broke"))
                if not waiting:
                    del self._queues[queue]
            self._emit(PeerLost(number, endpoint, "the connection broke"))

    # --- the way of a put -------------------------------------------------------------------------------------

    def _delay_s(self) -> float:
        return LANE_S * self._network.slowness * (0.2 + 1.6 * self._world.chance.random())

    def _start(self, put: _Put) -> None:
        self.owner.later(self._delay_s(), self._leave, put)

    def _leave(self, put: _Put) -> None:
        """The bytes are read and gone; the source is free."""
        waiting = self._queues.get(put.queue)
        if not waiting or waiting[0] is not put:
            return  # lost with its channel
        endpoint = self._channels.get(put.channel)
        peer = self._network.lanes.get(endpoint or "")
        if endpoint is None or peer is None or self._world.now < self._network.cut_until:
            self._fail(put, endpoint)
            return
        for copy in put.copies:
            self._touch(copy.source_offset, copy.length, "read")
        pieces = [bytes(self._memory[c.source_offset : c.source_offset + c.length]) for c in put.copies]
        pieces = self._spoilt(pieces)
        waiting.pop(0)
        if waiting:
            self._start(waiting[0])
        else:
            del self._queues[put.queue]
        self._emit(PutDone(put.ticket))
        first_at = max(self._world.now + self._delay_s(), self._wire_free_at)
        self._wire_free_at = first_at + self._delay_s() / 2
        spans = [Span(copy.target_offset, copy.length) for copy in put.copies]
        arrival = _Arrival(self, put, spans, pieces)
        self._world.at(first_at, peer.owner, peer.arrive, arrival, self._wire_free_at)

    def _fail(self, put: _Put, endpoint: str | None) -> None:
        if endpoint is not None:
            self.break_to(endpoint)
            return
        self._queues[put.queue].remove(put)
        if not self._queues[put.queue]:
            del self._queues[put.queue]
        self._emit(PutFailed(put.ticket, "the channel is lost"))

    def _spoilt(self, pieces: list[bytes]) -> list[bytes]:
        chance = self._world.chance
        if not pieces or chance.random() >= self._network.spoil_chance:
            return pieces
        self._world.counts["pages spoilt on the way"] += 1
        first = bytearray(pieces[0])
        first[chance.randrange(len(first))] ^= 1 << chance.randrange(8)
        return [bytes(first), *pieces[1:]]

    def arrive(self, arrival: _Arrival, rest_at: float) -> None:
        """At the receiver: half of the bytes now, the rest and the notice a moment later."""
        if arrival.lost:
            return
        try:
            targets = self.windows.admit(arrival.put.window, arrival.spans)
        except WireError:
            arrival.sender.break_to(self.endpoint)
            return
        if targets is None:
            return
        half = len(targets) // 2
        self._write(arrival, targets, range(half))
        self._world.at(max(rest_at, self._world.now), self.owner, self._arrive_rest, arrival, targets, half)

    def _arrive_rest(self, arrival: _Arrival, targets: list[memoryview], half: int) -> None:
        put = arrival.put
        if not arrival.lost:
            self._write(arrival, targets, range(half, len(targets)))
        self.windows.end_frame(put.window, notice=None if arrival.lost else put.notice)

    def _write(self, arrival: _Arrival, targets: list[memoryview], which: range) -> None:
        for n in which:
            self._touch(arrival.spans[n].offset, arrival.spans[n].length, "write")
            targets[n][:] = arrival.pieces[n]

    def _emit(self, event: Event) -> None:
        self._events.append(event)
        self._ring()
