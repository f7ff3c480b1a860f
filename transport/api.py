"""The transport contract. Knows regions, windows, puts and tickets; nothing of handoffs, slots or engines.

A daemon registers its arena once and gets a Region. For each grant it opens a *window*: a set of spans into which one
peer may put for a while. The window's id is all the peer is told. The peer puts spans of its own region into a window;
when the bytes have landed, and only then, the put's notice is delivered.

Who enforces a window is declared by the lane: `checked_by = "receiver"` (tcp: every frame is checked against the open
windows before a byte is written) or `"sender"` (nixl, ucx: one-sided writes run no receiver code). There the sender's
lane asks the receiver's for a window's spans and checks its copies against them; what opens the region to it is told
only to peers that proved the cluster key and named an open window. The contract is the same: WindowClosed comes when
not a byte can follow. On a "sender"-checked lane that is when the peer's lane has drained, or is gone; a peer that is
merely stopped keeps the window, and so its slots in quarantine, until it goes on or dies. One that is gone without a
word has its network's time to end what was under way. So has the sender: its ticket stays open as long as the library
may read the source, and PeerLost does not wait for the end of such a ticket.

After a failure: a lost channel is lost for ever (connect() gives a new one), and a lane whose own thread failed says
LaneFailed and loses all its channels and every later one; its windows then stay open for good, as nothing is left that
could close them.

Threads: all methods are called by the one thread that made the lane (the daemon's control thread) and never block on
the network. Lanes have threads of their own; what they have to say waits in take_events().
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import msgspec

# Grows when what is said here changes. A lane says for which number it was written, and no other is opened.
CONTRACT = 1


class Span(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`length` bytes from `offset`, relative to a region's start."""

    offset: int
    length: int


class Copy(msgspec.Struct, frozen=True):
    """`length` bytes from `source_offset` of the local region to `target_offset` of the peer's region."""

    source_offset: int
    target_offset: int
    length: int


class PutDone(msgspec.Struct, frozen=True):
    """The source bytes of this put may be reused. (That they have landed is the peer's to say, by its notice.)"""

    ticket: int
    at_ns: int = 0  # when, on this process's monotonic clock; 0: when it is taken


class PutFailed(msgspec.Struct, frozen=True):
    """This put will not complete and its source is no longer read. Some of its bytes may have landed; its notice
    was not, and will not be, delivered."""

    ticket: int
    reason: str


class Arrived(msgspec.Struct, frozen=True):
    """All bytes of one put into `window` have landed; `notice` is what the sender attached."""

    window: int
    notice: bytes
    at_ns: int = 0  # as PutDone's


class WindowClosed(msgspec.Struct, frozen=True):
    """No byte will be written through this window any more: its slots may be reused."""

    window: int


class PeerLost(msgspec.Struct, frozen=True):
    """A channel of ours broke. Its open puts have failed (their PutFailed events come first, but for those whose source
    may still be read). Connect anew."""

    channel: int
    endpoint: str
    reason: str


class LaneFailed(msgspec.Struct, frozen=True):
    """A thread of the lane itself failed: it is of no use any more."""

    reason: str


Event = PutDone | PutFailed | Arrived | WindowClosed | PeerLost | LaneFailed


class Region(Protocol):
    """Local power over registered memory. Not encodable, so it can't be sent by mistake."""

    def open_window(self, spans: Sequence[Span]) -> int:
        """A new window over these spans of this region; its id is random and never reused.

        Raises ValueError, changing nothing, if a span lies outside the region.
        """

    def close_window(self, window: int) -> None:
        """Admits no further put. Ends in exactly one WindowClosed, at once or when what is under way has ended: soon on
        a "receiver"-checked lane, whenever the peer has drained or gone on a "sender"-checked one. Unknown ids: no-op.
        """


class Lane(Protocol):
    """One transport in one process."""

    contract: int  # for which CONTRACT it was written
    scheme: str
    checked_by: Literal["receiver", "sender"]
    endpoint: str  # published address, e.g. tcp://127.0.0.1:40213

    def fileno(self) -> int:
        """Readable while take_events() has something to say."""

    def register(self, memory: memoryview) -> Region:
        """Raises ClosedTransport. The memory must outlive the lane."""

    def connect(self, endpoint: str) -> int:
        """A channel to a peer's lane, usable at once; failure to reach it comes as PeerLost. Idempotent per live
        endpoint: the same channel is returned until it is lost."""

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
        """Queues one put and returns its ticket, which ends in PutDone or PutFailed, exactly once.

        Puts of one `queue` (a handoff) keep their order; queues share the channel, larger `urgency` first. On failure
        the target spans are undefined and no byte outside them has changed. Copies may be empty: then only the notice
        travels. Raises ValueError if a copy lies outside the region, ClosedTransport after close.
        """

    def cancel(self, queue: bytes) -> None:
        """Drops what is not yet on the wire: those tickets end in PutFailed, those under way in either."""

    def take_events(self) -> list[Event]:
        """Everything that happened since the last call, in order per channel. Never blocks."""

    def close(self, *, drain_s: float) -> None:
        """Sends what is queued for at most `drain_s`, then aborts. Idempotent. Afterwards no memory is touched."""

    def abort(self) -> None:
        """Drops everything now. Safe from destructors and signal paths; idempotent."""


@runtime_checkable
class OverDevices(Protocol):
    """A Lane that uses RDMA devices where there are any."""

    devices: Sequence[str]  # their names, as the kernel has them; empty: there are none
