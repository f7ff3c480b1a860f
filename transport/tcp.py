"""The tcp lane: any two hosts, no special hardware. Ties listener, channels, windows and mailbox together.

Each side that puts connects to the other, so a pair that puts both ways has two channels, of one connection or a few
each; on each of these only the connector talks after the handshake. A frame carries its own window and spans, hence
receivers hold no state per put, frames of many puts interleave freely, and a cancelled put is one whose last frame
never comes.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Sequence
from typing import Literal

from pdx.errors import ClosedTransport
from pdx.transport.api import CONTRACT, Copy, Event, PeerLost, PutFailed, Region
from pdx.transport.mailbox import Mailbox
from pdx.transport.outbox import Put, checked_copies
from pdx.transport.sockets import STALL_S, listen_at, parse_endpoint
from pdx.transport.tcp_channel import TcpChannel, usual_streams
from pdx.transport.tcp_receiver import TcpListener
from pdx.transport.tls import LaneTls
from pdx.transport.windows import CheckedRegion, WindowTable

# abort() waits no longer than this for threads that shutdown() has woken.
JOIN_S = 6.0


class TcpLane:
    """See Lane. All methods belong to the control thread, except that abort() may also come from a signal handler."""

    contract = CONTRACT
    scheme = "tcp"
    checked_by: Literal["receiver", "sender"] = "receiver"

    def __init__(
        self,
        url: str,
        *,
        key: bytes | None,
        name: str,
        tls: LaneTls | None = None,
        stall_s: float = STALL_S,
        streams: int | None = None,
    ) -> None:
        """Binds and listens; port 0 takes a free one. Raises ConfigError if the address cannot be had.

        Without a key only loopback addresses are served. A peer that moves nothing in mid-frame for `stall_s` is
        dropped. With `tls` neither side talks to a peer without. `streams`: connections to each peer (default: as many
        as this machine's cores are good for).
        """
        listening, self.endpoint = listen_at(url, scheme=self.scheme, key=key)
        self._key = key
        self._tls = tls
        self._name = name
        self._streams = streams or usual_streams()
        self._stall_s = stall_s
        self._mailbox = Mailbox()
        self._windows = WindowTable(emit=self._mailbox.add, new_id=lambda: secrets.randbits(64))
        self._listener = TcpListener(
            listening, key=key, windows=self._windows, mailbox=self._mailbox, name=name, stall_s=stall_s, tls=tls
        )
        self._channels: dict[int, TcpChannel] = {}
        self._numbers = itertools.count(1)
        self._tickets = itertools.count(1)
        self._regions: list[CheckedRegion] = []
        self._is_closed = False
        self._is_aborted = False

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open"
        return f"<TcpLane {self.endpoint} {state}: {len(self._channels)} channels>"

    def fileno(self) -> int:
        return self._mailbox.fileno()

    def register(self, memory: memoryview) -> CheckedRegion:
        self._check_open()
        region = CheckedRegion(memory, self._windows)
        self._regions.append(region)
        return region

    def connect(self, endpoint: str) -> int:
        self._check_open()
        parse_endpoint(endpoint)
        for channel in self._channels.values():
            if channel.endpoint == endpoint and not channel.is_over:
                return channel.number
        number = next(self._numbers)
        self._channels[number] = TcpChannel(
            number,
            endpoint,
            key=self._key,
            tls=self._tls,
            mailbox=self._mailbox,
            name=self._name,
            streams=self._streams,
            stall_s=self._stall_s,
        )
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
        ticket = next(self._tickets)
        target = self._channels.get(channel)
        if target is None:
            self._mailbox.add(PutFailed(ticket, "the channel is lost"))
        else:
            target.put(Put(ticket, queue, window, region.memory, checked, notice), urgency)
        return ticket

    def cancel(self, queue: bytes) -> None:
        for channel in self._channels.values():
            channel.cancel(queue)

    def take_events(self) -> list[Event]:
        events = self._mailbox.take()
        for event in events:
            if isinstance(event, PeerLost) and event.channel in self._channels:
                # Its thread's last act was to post this event.
                self._channels.pop(event.channel).join(JOIN_S)
        return events

    def break_channel(self, channel: int, reason: str) -> None:
        """Cuts a connection as if the network had: for Faulty, and for peers known to be dead. Unknown ids: no-op."""
        if channel in self._channels:
            self._channels[channel].stop(reason, is_ours=False)

    def close(self, *, drain_s: float) -> None:
        if not self._is_closed:
            self._is_closed = True
            deadline_s = time.monotonic() + drain_s
            for channel in self._channels.values():
                channel.finish()
            for channel in self._channels.values():
                channel.join(deadline_s - time.monotonic())
        self.abort()

    def abort(self) -> None:
        self._is_closed = True
        if self._is_aborted:
            return
        self._is_aborted = True
        self._mailbox.stop_waiting()
        self._listener.stop()
        for channel in self._channels.values():
            channel.stop("the lane was closed", is_ours=True)
        deadline_s = time.monotonic() + JOIN_S
        ended = [self._listener.join(JOIN_S)]
        ended += [channel.join(deadline_s - time.monotonic()) for channel in self._channels.values()]
        self._mailbox.close()
        if all(ended):
            for region in self._regions:
                region.memory.release()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedTransport(f"lane {self.endpoint} is closed")
