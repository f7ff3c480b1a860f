"""One side of a pair of lanes under test: its memory, its events, and waits that end. Knows the contract only.

Nothing here sleeps: every wait is for an event, under a deadline, and fails with what was seen so far.
"""

from __future__ import annotations

import random
import select
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import msgspec

from pdx.transport.api import Arrived, Copy, Event, Lane, PeerLost, PutDone, PutFailed, Region, WindowClosed

# It bounds a hang: on a busy machine a lane that is right may take many times as long as on an idle one.
WAIT_S = 30.0
# For the window of a peer that is gone without a word: what its network card may still write is waited for.
GONE_S = 2 * WAIT_S
MEMORY_BYTES = 4 << 20


class Pair(Protocol):
    """Two lanes of one kind that can reach each other; `far` can die and come back at the same endpoint."""

    near: Lane
    far: Lane

    def kill_far(self) -> None:
        """`far` stops without goodbye, as a killed process does."""

    def revive_far(self) -> Lane:
        """A new lane at the endpoint of the killed one."""


MakePair = Callable[[], AbstractContextManager[Pair]]


class ProcessPair(Pair, Protocol):
    """A pair whose far lane is a process of its own: kill_far() is a SIGKILL."""

    def stop_far(self) -> None:
        """SIGSTOP; when this returns, no thread of it runs any more."""

    def continue_far(self) -> None: ...


class Side:
    """One lane with a registered memory, and all events it has had so far.

    The memory is a bytearray; a lane in another process brings its own, shared with us.
    """

    def __init__(self, lane: Lane, *, seed: int, memory_bytes: int = MEMORY_BYTES) -> None:
        self.lane = lane
        self._backing = getattr(lane, "make_memory", bytearray)(memory_bytes)
        self.memory = memoryview(self._backing)
        self.memory[:] = random.Random(seed).randbytes(memory_bytes)  # noqa: S311 - seeded on purpose
        self.region: Region = lane.register(self.memory)
        self.events: list[Event] = []

    def put(
        self,
        channel: int,
        window: int,
        copies: list[Copy],
        *,
        notice: bytes = b"",
        queue: bytes = b"q",
        urgency: float = 0.0,
    ) -> int:
        return self.lane.put(
            channel, region=self.region, window=window, copies=copies, notice=notice, queue=queue, urgency=urgency
        )

    def free_memory(self) -> None:
        """BufferError if the lane still holds a view."""
        self.memory.release()
        if isinstance(self._backing, bytearray):
            self._backing.clear()
        else:
            self._backing.close()

    def wait(self, what: str, is_reached: Callable[[list[Event]], bool], wait_s: float = WAIT_S) -> None:
        """Takes events until the condition holds; AssertionError after `wait_s`."""
        deadline_s = time.monotonic() + wait_s
        self.take()
        while not is_reached(self.events):
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"{what}: not within {wait_s:g} s; events so far: {self.events}"
            select.select([self.lane.fileno()], [], [], left_s)
            self.take()

    def take(self) -> None:
        """What has come since. Times are looked at, and left out: events are compared."""
        for event in self.lane.take_events():
            if isinstance(event, PutDone | Arrived):
                assert 0 <= event.at_ns <= time.monotonic_ns(), f"not this process's monotonic clock: {event}"
                event = msgspec.structs.replace(event, at_ns=0)
            self.events.append(event)

    def wait_end(self, ticket: int, wait_s: float = WAIT_S) -> PutDone | PutFailed:
        self.wait(f"end of ticket {ticket}", lambda events: bool(ends_of(events, ticket)), wait_s)
        (end,) = ends_of(self.events, ticket)
        return end

    def wait_arrived(self, *notices: bytes) -> None:
        wanted = set(notices)
        self.wait(
            f"arrival of {notices}", lambda events: wanted <= {e.notice for e in events if isinstance(e, Arrived)}
        )

    def wait_closed(self, window: int, wait_s: float = WAIT_S) -> None:
        self.wait(f"close of window {window}", lambda events: WindowClosed(window) in events, wait_s)

    def wait_lost(self, channel: int) -> None:
        self.wait(f"loss of channel {channel}", lambda events: bool(losses_of(events, channel)))


@contextmanager
def sides(make_pair: MakePair) -> Iterator[tuple[Pair, Side, Side, int]]:
    """A pair, its two sides and near's channel to far."""
    with make_pair() as pair:
        near, far = Side(pair.near, seed=1), Side(pair.far, seed=2)
        yield pair, near, far, pair.near.connect(pair.far.endpoint)


def ends_of(events: list[Event], ticket: int) -> list[PutDone | PutFailed]:
    return [event for event in events if isinstance(event, PutDone | PutFailed) and event.ticket == ticket]


def losses_of(events: list[Event], channel: int) -> list[PeerLost]:
    return [event for event in events if isinstance(event, PeerLost) and event.channel == channel]


def arrivals_of(events: list[Event]) -> list[bytes]:
    return [event.notice for event in events if isinstance(event, Arrived)]
