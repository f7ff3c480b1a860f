"""The reference lane: several lanes in one process, no sockets, no threads, the same order every time.

A LoopbackNet is the network. Bytes move only in LoopbackNet.step() or pump(), and every take_events() pumps first.
Windows, outbox and frames are those of the tcp lane, so that what holds here for order and admission holds there.
The net's lock lets control threads share it; without threads a run is a function of the calls and of `rng`.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Sequence
from typing import Literal

from pdx.errors import ClosedTransport, ConfigError, WireError
from pdx.transport.api import CONTRACT, Copy, Event, PeerLost, PutFailed, Region
from pdx.transport.mailbox import Mailbox
from pdx.transport.outbox import Frame, Outbox, Put, checked_copies
from pdx.transport.windows import CheckedRegion, WindowTable

SCHEME = "loopback"


class LoopbackNet:
    """Thread-safe."""

    def __init__(self, rng: random.Random) -> None:
        self.lock = threading.RLock()
        self._rng = rng
        self._lanes: dict[str, LoopbackLane] = {}
        self._cut: set[str] = set()
        self._turn = 0

    def open_lane(self, name: str) -> LoopbackLane:
        """A lane at loopback://name. Raises ConfigError if a live one is there."""
        endpoint = f"{SCHEME}://{name}"
        with self.lock:
            if endpoint in self._lanes:
                raise ConfigError(f"{endpoint} is taken")
            window_rng = random.Random(self._rng.getrandbits(64))  # noqa: S311 - guards nothing, seeded on purpose
            self._lanes[endpoint] = LoopbackLane(self, endpoint, window_rng)
            return self._lanes[endpoint]

    def cut(self, endpoint: str) -> None:
        """Breaks every channel from and to this endpoint and lets no new one through until mend()."""
        with self.lock:
            self._cut.add(endpoint)
            for lane in list(self._lanes.values()):
                for channel in list(lane.channels.values()):
                    if endpoint in (lane.endpoint, channel.endpoint):
                        lane.lose(channel, "the network was cut")

    def mend(self, endpoint: str) -> None:
        with self.lock:
            self._cut.discard(endpoint)

    def pump(self) -> None:
        """Moves frames until there is nothing left to move."""
        while self.step():
            pass

    def step(self) -> bool:
        """Moves one frame, the channels taking turns. False if there was none."""
        with self.lock:
            channels = [(lane, channel) for lane in self._lanes.values() for channel in lane.channels.values()]
            self._turn += 1
            for index in range(len(channels)):
                lane, channel = channels[(self._turn + index) % len(channels)]
                if lane.advance(channel):
                    return True
            return False

    def find(self, *, source: str, target: str) -> LoopbackLane | None:
        if source in self._cut or target in self._cut:
            return None
        return self._lanes.get(target)

    def remove(self, lane: LoopbackLane) -> None:
        """Forgets a closed lane: channels to it are lost at once."""
        if self._lanes.get(lane.endpoint) is not lane:
            return
        del self._lanes[lane.endpoint]
        for other in self._lanes.values():
            for channel in list(other.channels.values()):
                if channel.endpoint == lane.endpoint:
                    other.lose(channel, "peer closed the connection")


class LoopbackChannel:
    """A channel's number, destination and outbox."""

    def __init__(self, number: int, endpoint: str) -> None:
        self.number = number
        self.endpoint = endpoint
        self.outbox = Outbox()


class LoopbackLane:
    """See Lane. Thread-safe through the net's lock, which is more than the contract asks."""

    contract = CONTRACT
    scheme = SCHEME
    checked_by: Literal["receiver", "sender"] = "receiver"

    def __init__(self, net: LoopbackNet, endpoint: str, rng: random.Random) -> None:
        self.endpoint = endpoint
        self.channels: dict[int, LoopbackChannel] = {}
        self._net = net
        self._mailbox = Mailbox()
        self._windows = WindowTable(emit=self._mailbox.add, new_id=lambda: rng.getrandbits(64))
        self._numbers = itertools.count(1)
        self._tickets = itertools.count(1)
        self._regions: list[CheckedRegion] = []
        self._is_closed = False

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open"
        return f"<LoopbackLane {self.endpoint} {state}: {len(self.channels)} channels>"

    def fileno(self) -> int:
        return self._mailbox.fileno()

    def register(self, memory: memoryview) -> CheckedRegion:
        self._check_open()
        region = CheckedRegion(memory, self._windows)
        self._regions.append(region)
        return region

    def connect(self, endpoint: str) -> int:
        self._check_open()
        with self._net.lock:
            for channel in self.channels.values():
                if channel.endpoint == endpoint:
                    return channel.number
            number = next(self._numbers)
            self.channels[number] = LoopbackChannel(number, endpoint)
            self._mailbox.announce()
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
        self._check_open()
        if not isinstance(region, CheckedRegion) or region.windows is not self._windows:
            raise ValueError("the region was registered with another lane")
        checked = checked_copies(copies, region.memory.nbytes, notice=notice)
        with self._net.lock:
            ticket = next(self._tickets)
            target = self.channels.get(channel)
            if target is None:
                self._mailbox.add(PutFailed(ticket, "the channel is lost"))
                return ticket
            failed = target.outbox.add(Put(ticket, queue, window, region.memory, checked, notice), urgency)
            if failed is not None:
                self._mailbox.add(failed)
            self._mailbox.announce()
            peer = self._net.find(source=self.endpoint, target=target.endpoint)
            if peer is not None:
                peer._mailbox.announce()
            return ticket

    def cancel(self, queue: bytes) -> None:
        with self._net.lock:
            for channel in self.channels.values():
                self._mailbox.add_all(channel.outbox.cancel(queue, "cancelled"))

    def take_events(self) -> list[Event]:
        self._net.pump()
        with self._net.lock:
            return self._mailbox.take()

    def close(self, *, drain_s: float) -> None:
        if not self._is_closed and drain_s > 0:
            self._net.pump()
        self.abort()

    def abort(self) -> None:
        with self._net.lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._net.remove(self)
            for channel in self.channels.values():
                self._mailbox.add_all(channel.outbox.fail_all("the lane was closed"))
            self.channels.clear()
            for region in self._regions:
                region.memory.release()
            self._mailbox.close()

    def break_channel(self, channel: int, reason: str) -> None:
        """Cuts one connection as if the network had. Unknown ids: no-op."""
        with self._net.lock:
            if channel in self.channels:
                self.lose(self.channels[channel], reason)

    def lose(self, channel: LoopbackChannel, reason: str) -> None:
        """Called by the net, under its lock."""
        del self.channels[channel.number]
        self._mailbox.add_all(channel.outbox.fail_all(reason))
        self._mailbox.add(PeerLost(channel.number, channel.endpoint, reason))

    def advance(self, channel: LoopbackChannel) -> bool:
        """One frame of this channel, if it has one; called by the net, under its lock. Whether anything happened."""
        peer = self._net.find(source=self.endpoint, target=channel.endpoint)
        if peer is None:
            self.lose(channel, f"no lane answers at {channel.endpoint}")
            return True
        frame = channel.outbox.next_frame()
        if frame is None:
            return False
        try:
            peer.receive(frame)
        except WireError as error:
            self.lose(channel, f"peer closed the connection: {error}")
            return True
        end = channel.outbox.frame_sent(frame)
        if end is not None:
            self._mailbox.add(end)
        return True

    def receive(self, frame: Frame) -> None:
        put = frame.put
        targets = self._windows.admit(put.window, frame.targets)
        if targets is None:
            return
        for source, target in zip(frame.sources, targets, strict=True):
            target[:] = source
        notice = put.notice if frame.is_last else None
        self._windows.end_frame(put.window, notice=notice)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedTransport(f"lane {self.endpoint} is closed")
