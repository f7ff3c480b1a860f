"""A lane that fails on purpose, for tests and chaos runs. Knows only the contract and what a Breakable lane adds.

Which fault strikes when is drawn from the seed alone, at put() and take_events(); what a broken connection had
carried by then is up to the lane inside. Nothing is ever duplicated or reordered, as no lane may do that.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
from collections import deque
from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from pdx.transport.api import Copy, Event, Lane, Region, Span
from pdx.transport.spans import check_inside


class Breakable(Lane, Protocol):
    """A lane whose connections can be cut from outside."""

    def break_channel(self, channel: int, reason: str) -> None:
        """The channel is lost as if the network had failed. Unknown ids: no-op."""


class Faults(msgspec.Struct, frozen=True, kw_only=True):
    """How often what goes wrong; chances are per put, or per event for `delay_chance`."""

    break_chance: float = 0.0  # the channel breaks just after this put was queued
    break_after_puts: int | None = None  # and after every so many puts
    break_after_bytes: int | None = None  # and after every so many bytes
    corrupt_chance: float = 0.0  # one bit of the put's bytes arrives flipped
    delay_chance: float = 0.0  # this event and those behind it wait for the next take_events()


class Faulty:
    """See Lane; same thread rules. Breaks, corrupts and delays according to `faults`."""

    def __init__(self, lane: Breakable, rng: random.Random, faults: Faults) -> None:
        self._lane = lane
        self._rng = rng
        self._faults = faults
        self._held: deque[Event] = deque()
        self._regions: list[FaultyRegion] = []
        self._puts_since_break = 0
        self._bytes_since_break = 0
        self.break_count = 0
        self.corrupt_count = 0
        self.contract = lane.contract
        self.scheme = lane.scheme
        self.checked_by: Literal["receiver", "sender"] = lane.checked_by
        self.endpoint = lane.endpoint
        # Readable if the lane inside is, or if events are held back.
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.epoll()
        self._poll.register(self._bell, select.EPOLLIN)
        self._poll.register(lane.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        return self._poll.fileno() if not self._poll.closed else -1

    def register(self, memory: memoryview) -> FaultyRegion:
        region = FaultyRegion(self._lane.register(memory), memory)
        self._regions.append(region)
        return region

    def connect(self, endpoint: str) -> int:
        return self._lane.connect(endpoint)

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
        if not isinstance(region, FaultyRegion):
            raise ValueError("the region was registered with another lane")
        if self._rng.random() < self._faults.corrupt_chance and any(copy.length for copy in copies):
            inner, copies = self._corrupted(region, copies)
        else:
            inner = region.inner
        ticket = self._lane.put(
            channel, region=inner, window=window, copies=copies, notice=notice, queue=queue, urgency=urgency
        )
        self._puts_since_break += 1
        self._bytes_since_break += sum(copy.length for copy in copies)
        if self._break_is_due():
            self._puts_since_break = self._bytes_since_break = 0
            self.break_count += 1
            self._lane.break_channel(channel, "fault injected")
        return ticket

    def cancel(self, queue: bytes) -> None:
        self._lane.cancel(queue)

    def take_events(self) -> list[Event]:
        self._held.extend(self._lane.take_events())
        taken: list[Event] = []
        while self._held and (self._poll.closed or self._rng.random() >= self._faults.delay_chance):
            taken.append(self._held.popleft())
        if not self._poll.closed:
            self._ring_if(bool(self._held))
        return taken

    def break_channel(self, channel: int, reason: str) -> None:
        self._lane.break_channel(channel, reason)

    def close(self, *, drain_s: float) -> None:
        self._lane.close(drain_s=drain_s)
        self._release()

    def abort(self) -> None:
        self._lane.abort()
        self._release()

    def _break_is_due(self) -> bool:
        faults = self._faults
        return (
            self._rng.random() < faults.break_chance
            or (faults.break_after_puts is not None and self._puts_since_break >= faults.break_after_puts)
            or (faults.break_after_bytes is not None and self._bytes_since_break >= faults.break_after_bytes)
        )

    def _corrupted(self, region: FaultyRegion, copies: Sequence[Copy]) -> tuple[Region, list[Copy]]:
        """A copy of the source with one bit flipped; kept as long as this lane, like any registered memory."""
        check_inside((Span(copy.source_offset, copy.length) for copy in copies), region.memory.nbytes)
        spoilt = bytearray()
        moved: list[Copy] = []
        for copy in copies:
            moved.append(Copy(len(spoilt), copy.target_offset, copy.length))
            spoilt += region.memory[copy.source_offset : copy.source_offset + copy.length]
        spoilt[self._rng.randrange(len(spoilt))] ^= 1 << self._rng.randrange(8)
        inner = self._lane.register(memoryview(spoilt))
        self.corrupt_count += 1
        return inner, moved

    def _ring_if(self, is_holding: bool) -> None:
        if is_holding:
            os.eventfd_write(self._bell, 1)
            return
        with contextlib.suppress(BlockingIOError):  # was silent
            os.eventfd_read(self._bell)

    def _release(self) -> None:
        if not self._poll.closed:
            self._poll.close()
            os.close(self._bell)
            for region in self._regions:
                region.memory.release()


class FaultyRegion:
    """A Region that remembers its memory, so that a put of it can be corrupted on the way."""

    def __init__(self, inner: Region, memory: memoryview) -> None:
        self.inner = inner
        self.memory = memory.cast("B") if memory.format != "B" or memory.ndim != 1 else memory[:]
        self.open_window = inner.open_window
        self.close_window = inner.close_window
