"""The windows of a one-sided lane as its receiver sees them: who was granted one, and when the last of them is quiet.

Nobody checks the bytes of a one-sided write. So a window goes open -> closing -> closed, and it is closed only when
every peer that was granted it has said DRAINED, or can't write any more (which the reactor finds out).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pdx.errors import WireError
from pdx.transport.api import Arrived, Event, Span, WindowClosed
from pdx.transport.fabric import Fabric, Memory
from pdx.transport.link import Link
from pdx.transport.link_messages import Ask, Bye, Drained, Granted, Landed, LinkMessage, Unknown


class Grant:
    """One window."""

    __slots__ = ("askers", "granted", "is_closing", "memory", "spans")

    def __init__(self, memory: Memory, spans: Sequence[Span]) -> None:
        self.memory = memory
        self.spans = spans
        self.askers: set[int] = set()  # links that may be writing through it
        self.granted: set[int] = set()  # links that were told of it, those too that have drained
        self.is_closing = False


class Grants:
    """Owned by the reactor's thread. Links are named by numbers that are never used again."""

    def __init__(self, *, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._open: dict[int, Grant] = {}

    def open(self, window: int, memory: Memory, spans: Sequence[Span]) -> None:
        self._open[window] = Grant(memory, spans)

    def close(self, window: int) -> set[int]:
        """Who must be told SHUT. Unknown ids: nobody."""
        grant = self._open.get(window)
        if grant is None or grant.is_closing:
            return set()
        grant.is_closing = True
        askers = set(grant.askers)
        self._end_if_quiet(window, grant)
        return askers

    def ask(self, window: int, *, link: int) -> Grant | None:
        """The grant, from now on given to this link too; None if no such window is open. WireError if it had it."""
        grant = self._open.get(window)
        if grant is None or (grant.is_closing and link not in grant.askers):
            return None
        if link in grant.granted:
            raise WireError("a window is asked for that was granted")  # the answer may be large
        grant.askers.add(link)
        grant.granted.add(link)
        return grant

    def landed(self, window: int, notice: bytes, *, link: int) -> bool:
        """False if this link has no such grant: an honest peer's message can't say so."""
        grant = self._open.get(window)
        if grant is None or link not in grant.askers:
            return False
        self._emit(Arrived(window, notice))
        return True

    def drained(self, window: int, *, link: int) -> None:
        grant = self._open.get(window)
        if grant is not None:
            grant.askers.discard(link)
            self._end_if_quiet(window, grant)

    def link_is_quiet(self, link: int) -> None:
        """It will never write again, through any window."""
        for window, grant in list(self._open.items()):
            grant.granted.discard(link)
            if link in grant.askers:
                self.drained(window, link=link)

    def _end_if_quiet(self, window: int, grant: Grant) -> None:
        if grant.is_closing and not grant.askers:
            del self._open[window]
            self._emit(WindowClosed(window))


class InboundPeer:
    """A peer that writes into us, at its end of one link. Owned by the reactor's thread."""

    def __init__(self, number: int, link: Link, *, grants: Grants, fabric: Fabric) -> None:
        self.number = number
        self.link = link
        self.said_bye = False
        self.is_refused = False
        self._grants = grants
        self._fabric = fabric
        self._metadata_sent = b""

    def handle_all(self, messages: Iterable[LinkMessage]) -> None:
        """In their order. Raises as handle() does; what follows is not handled then."""
        for message in messages:
            self.handle(message)

    def handle(self, message: LinkMessage) -> None:
        """Raises WireError, OSError: then the peer is not served any longer."""
        if self.said_bye:
            self.said_bye = False  # its word is worth nothing: it may still write
            raise WireError("a message after BYE")
        match message:
            case Ask(window):
                self._answer(window)
            case Landed(window, notice):
                if not self._grants.landed(window, notice, link=self.number):
                    raise WireError("a notice through a window that this peer was not granted")
            case Drained(window):
                self._grants.drained(window, link=self.number)
            case Bye():
                self.said_bye = True
            case _:
                raise WireError("a sender's message from where only a receiver's may come")

    def _answer(self, window: int) -> None:
        grant = self._grants.ask(window, link=self.number)
        if grant is None:
            self.link.send(Unknown(window))
            return
        metadata = self._fabric.metadata()
        news = b"" if metadata == self._metadata_sent else metadata
        self._metadata_sent = metadata
        at = grant.memory
        self.link.send(Granted(window, at.address, at.length, at.kind, at.device, list(grant.spans), news))
