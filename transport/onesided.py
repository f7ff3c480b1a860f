"""A lane that writes straight into its peer's memory through a Fabric. The control thread's side; see Reactor.

The endpoint is where the lane's own connections are made: they carry the proof of the cluster key, then a window's
rights and the notices, and their end tells that a peer is gone. So nothing of a fabric is told to an unproven peer, a
notice cannot overtake its bytes (it is sent when they are there), and WindowClosed means here what it means on tcp,
without the daemons' help: the lane at the other end has said that it drained, or is gone.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from pdx.errors import ClosedTransport
from pdx.transport.api import CONTRACT, Copy, Event, PeerLost, Region, Span
from pdx.transport.fabric import Fabric, host_memory
from pdx.transport.link_messages import SPANS_IN_WINDOW_MAX
from pdx.transport.mailbox import Mailbox
from pdx.transport.onesided_sender import OneSidedPut
from pdx.transport.outbox import checked_copies
from pdx.transport.reactor import SETTLE_S, WIND_DOWN_S, Reactor
from pdx.transport.sockets import STALL_S, listen_at, parse_endpoint
from pdx.transport.spans import SpanSet, check_inside

# What is under way has its time; then the fabric ends its connections, one after the other.
JOIN_S = 3 * WIND_DOWN_S


class OneSidedRegion:
    """See Region."""

    def __init__(self, view: memoryview, reactor: Reactor) -> None:
        self.view = view.cast("B") if view.format != "B" or view.ndim != 1 else view[:]
        self.memory = host_memory(self.view)
        self.reactor = reactor

    def open_window(self, spans: Sequence[Span]) -> int:
        check_inside(spans, self.memory.length)
        merged = SpanSet(spans).spans()
        if len(merged) > SPANS_IN_WINDOW_MAX:
            raise ValueError(f"a window of {len(merged)} spans apart; {SPANS_IN_WINDOW_MAX} can be granted")
        window = secrets.randbits(64)
        self.reactor.call(partial(self.reactor.open_window, window, self.memory, merged))
        return window

    def close_window(self, window: int) -> None:
        self.reactor.call(partial(self.reactor.close_window, window))


class OneSidedLane:
    """See Lane. All methods belong to the control thread, except that abort() may also come from a signal handler."""

    contract = CONTRACT
    checked_by: Literal["receiver", "sender"] = "sender"

    def __init__(
        self,
        url: str,
        *,
        scheme: str,
        key: bytes | None,
        name: str,
        make_fabric: Callable[[], Fabric],
        stall_s: float = STALL_S,
        settle_s: float = SETTLE_S,
        devices: Sequence[str] = (),
    ) -> None:
        """`settle_s`: for how long a peer that is gone without a word may still write. `devices`: of RDMA, which the
        fabric uses. Raises ConfigError if the address cannot be had, and whatever make_fabric raises."""
        self.scheme = scheme
        self.devices = tuple(devices)
        listening, self.endpoint = listen_at(url, scheme=scheme, key=key)
        try:
            self._fabric = make_fabric()
        except BaseException:
            listening.close()
            raise
        self._mailbox = Mailbox()
        self._reactor = Reactor(
            listening,
            scheme=scheme,
            key=key,
            fabric=self._fabric,
            mailbox=self._mailbox,
            name=name,
            stall_s=stall_s,
            settle_s=settle_s,
        )
        self._channels: dict[str, int] = {}  # by endpoint, until their loss was told
        self._numbers = itertools.count(1)
        self._tickets = itertools.count(1)
        self._regions: list[OneSidedRegion] = []
        self._is_closed = False
        self._is_aborted = False

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open"
        return f"<OneSidedLane {self.endpoint} {state}: {len(self._channels)} channels>"

    def fileno(self) -> int:
        return self._mailbox.fileno()

    def register(self, memory: memoryview) -> OneSidedRegion:
        self._check_open()
        region = OneSidedRegion(memory, self._reactor)
        self._fabric.register(region.memory)
        self._regions.append(region)
        return region

    def connect(self, endpoint: str) -> int:
        self._check_open()
        parse_endpoint(endpoint, scheme=self.scheme)
        if endpoint not in self._channels:
            self._channels[endpoint] = next(self._numbers)
            self._reactor.call(partial(self._reactor.connect, self._channels[endpoint], endpoint))
        return self._channels[endpoint]

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
        if not isinstance(region, OneSidedRegion) or region.reactor is not self._reactor:
            raise ValueError("the region was registered with another lane")
        checked = checked_copies(copies, region.memory.length, notice=notice)
        ticket = next(self._tickets)
        put = OneSidedPut(ticket, window, region.memory, checked, notice)
        self._reactor.call(partial(self._reactor.put, channel, put, queue, urgency))
        return ticket

    def cancel(self, queue: bytes) -> None:
        self._reactor.call(partial(self._reactor.cancel, queue))

    def take_events(self) -> list[Event]:
        events = self._mailbox.take()
        for event in events:
            if isinstance(event, PeerLost) and self._channels.get(event.endpoint) == event.channel:
                del self._channels[event.endpoint]
        return events

    def break_channel(self, channel: int, reason: str) -> None:
        """Cuts a connection as if the network had: for Faulty, and for peers known to be dead. Unknown ids: no-op."""
        self._reactor.call(partial(self._reactor.break_channel, channel, reason))

    def close(self, *, drain_s: float) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._reactor.stop(drain_s=drain_s)
            self._reactor.join(drain_s + JOIN_S)
        self.abort()

    def abort(self) -> None:
        if self._is_aborted:
            return
        self._is_closed = self._is_aborted = True
        self._mailbox.stop_waiting()
        self._reactor.stop(drain_s=0.0)
        has_ended = self._reactor.join(JOIN_S)
        self._mailbox.close()
        if has_ended:
            for region in self._regions:
                region.view.release()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedTransport(f"lane {self.endpoint} is closed")
