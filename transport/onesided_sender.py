"""One channel of a one-sided lane: what is to be put through it, what is being written, and the rights it has.

Before the first put through a window the peer is asked for it; the answer is the window's spans, against which every
copy is checked here, since nobody checks it there. When the peer shuts a window nothing more is posted through it, and
DRAINED is said when what was under way has ended. Puts of one queue are written side by side and announced in order.
A put is posted piece by piece: what is posted nobody can overtake, or take back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from pdx.errors import PeerGone, WireError
from pdx.transport.api import Copy, Event, PutDone, PutFailed, Span
from pdx.transport.fabric import Fabric, Memory, Transfer
from pdx.transport.link import Link
from pdx.transport.link_messages import Ask, Drained, Granted, Landed, LinkMessage, Shut, Unknown
from pdx.transport.onesided_ending import Ending
from pdx.transport.queues import PUTS_MAX, Queue, Queues, cut
from pdx.transport.spans import SpanSet, check_inside

# Bytes under way are bytes that an urgent put cannot overtake; 8 MiB fill a link of 40 GB/s for 0.2 ms, which is more
# than this thread is ever away. Posting a piece costs some 20 us: 2 MiB are worth twice that on such a link.
FLYING_BYTES_MAX = 8 << 20
FLYING_PIECES_MAX = 64
PIECE_BYTES = 2 << 20
PIECE_COPIES_MAX = 1024
# Some fabrics copy while a write is posted: so ends are collected, and their notices sent, after every such round; and
# after so many rounds others get their turn.
ROUND_BYTES = 1 << 20
ROUNDS_MAX = 8


class OneSidedPut:
    """One put, from the queue to its end."""

    __slots__ = (
        "copied_bytes", "copies", "copy_index", "failure", "flying", "is_begun", "notice", "source", "ticket", "window",
    )  # fmt: skip

    def __init__(self, ticket: int, window: int, source: Memory, copies: Sequence[Copy], notice: bytes) -> None:
        self.ticket = ticket
        self.window = window
        self.source = source
        self.copies = copies
        self.notice = notice
        self.copy_index = self.copied_bytes = 0
        self.is_begun = False
        self.failure: str | None = None  # why the rest of it is not posted
        self.flying: dict[Transfer, int] = {}  # pieces, and their bytes

    @property
    def is_over(self) -> bool:
        return not self.flying and (self.failure is not None or self.copy_index == len(self.copies))


class _Permit:
    """What the peer said of one window."""

    __slots__ = ("asked_s", "begun", "is_shut", "spans", "target")

    def __init__(self, asked_s: float) -> None:
        self.asked_s = asked_s
        self.spans: SpanSet | None = None  # None: not answered yet
        self.target = Memory(address=0, length=0)
        self.begun = 0  # puts that have begun and not ended
        self.is_shut = False


class OneSidedChannel:
    """Owned by the reactor's thread. Raises PeerGone, WireError or OSError when the channel is over: call retire()."""

    def __init__(
        self, number: int, endpoint: str, *, fabric: Fabric, emit: Callable[[Event], None], check: Callable[[], None]
    ) -> None:
        """`check` is called before every write, and raises PeerGone if what peers have granted may be over."""
        self.number = number
        self.endpoint = endpoint
        self.link: Link | None = None  # None: not greeted yet
        self.is_eager = False  # has more to do at once
        self.moved_s = 0.0  # when a piece ended, or the first of those under way began
        self._fabric = fabric
        self._emit = emit
        self._check = check
        self._peer = ""
        self._waiting: Queues[OneSidedPut] = Queues()  # the first of a queue may have begun
        self._begun: dict[bytes, deque[OneSidedPut]] = {}  # by queue
        self._permits: dict[int, _Permit] = {}
        self._put_count = 0
        self._flying_pieces = 0
        self._flying_bytes = 0
        self._is_in_doubt = False  # a write failed in the middle: nobody knows what of it is under way

    @property
    def is_flying(self) -> bool:
        return self._flying_pieces > 0

    @property
    def is_idle(self) -> bool:
        return not self._put_count and (self.link is None or not self.link.unsent_bytes)

    @property
    def has_rights(self) -> bool:
        """Some window was granted, or asked for."""
        return bool(self._permits)

    def put(self, put: OneSidedPut, queue_name: bytes, urgency: float) -> None:
        if self._put_count >= PUTS_MAX:
            self._emit(PutFailed(put.ticket, f"channel holds {PUTS_MAX} puts already"))
            return
        self._waiting.add(queue_name, put, urgency)
        self._put_count += 1

    def cancel(self, queue_name: bytes) -> None:
        """What is under way ends as it would have, but for a put whose last piece is not."""
        self._fail(self._waiting.drop(queue_name), "cancelled")

    def handle(self, message: LinkMessage) -> None:
        match message:
            case Granted(window):
                self._granted(window, message)
            case Unknown(window):
                permit = self._permits.get(window)
                if permit is not None and permit.spans is not None:  # what flies through it still ends
                    raise WireError("a window that was granted is said to be unknown")
                self._permits.pop(window, None)
                self._fail_window(window, "the peer has no such window open")
            case Shut(window):
                permit = self._permits.get(window)
                if permit is None or permit.spans is None:  # each is answered: so there are no more than we asked for
                    raise WireError("a window is shut that was not granted")
                self._fail_window(window, "the peer closed the window")
                permit.is_shut = True
                self._drain(window, permit)
            case _:
                raise WireError("a receiver's message from where only a sender's may come")

    def advance(self, now: float) -> None:
        """Posts what may be posted and collects what has ended."""
        if self.link is None:
            return
        self.is_eager = True
        for _ in range(ROUNDS_MAX):
            has_posted = self._post(now)
            if not self._collect(now) and not has_posted:
                self.is_eager = False
                return

    def is_stuck(self, now: float, stall_s: float) -> bool:
        """Something of ours that the peer should have ended has not moved for so long."""
        if self._flying_pieces and now > self.moved_s + stall_s:
            return True
        return any(permit.spans is None and now > permit.asked_s + stall_s for permit in self._permits.values())

    def retire(self, reason: str, *, is_ours: bool, now: float) -> Ending:
        """Breaks with the peer: nothing more is posted, and what has not begun fails. The rest is the Ending's; this
        channel is of no use afterwards. `is_ours`: without PeerLost."""
        begun = [put for puts in self._begun.values() for put in puts]
        for put in self._waiting.drop_all(lambda put: not put.is_begun):
            self._emit(PutFailed(put.ticket, reason))
        return Ending(
            self.number, self.endpoint, reason,
            link=self.link, fabric=self._fabric, peer=self._peer, emit=self._emit, is_ours=is_ours,
            tickets=[put.ticket for put in begun], under_way=[transfer for put in begun for transfer in put.flying],
            is_in_doubt=self._is_in_doubt, now=now,
        )  # fmt: skip

    def _granted(self, window: int, grant: Granted) -> None:
        permit = self._permits.get(window)
        if permit is None or permit.spans is not None:
            raise WireError("a grant that was not asked for")
        if grant.address + grant.length >= 1 << 64:
            raise WireError(f"a grant of {grant.length} bytes at {grant.address}")
        try:
            check_inside(grant.spans, grant.length)
        except ValueError as error:
            raise WireError(f"a grant of more than there is: {error}") from error
        if grant.metadata and self._peer:
            self._fabric.update_peer(self._peer, grant.metadata)
        elif grant.metadata:
            self._peer = self._fabric.add_peer(grant.metadata)
        elif grant.length and not self._peer:
            raise WireError("a grant without what is needed to reach it")
        permit.target = Memory(grant.address, grant.length, grant.kind, grant.device)
        permit.spans = SpanSet(grant.spans)

    def _drain(self, window: int, permit: _Permit) -> None:
        if not permit.begun:
            del self._permits[window]
            self._link().send(Drained(window))

    def _post(self, now: float) -> bool:
        """One round. Whether anything was posted."""
        passed_over: set[bytes] = set()
        has_posted, left_bytes = False, ROUND_BYTES
        while left_bytes > 0 and not self._link().is_congested and self._has_room():
            queue = self._waiting.next(passed_over)
            if queue is None:
                break
            put = queue.puts[0]
            permit = self._permits.get(put.window)
            if permit is None:
                permit = self._permits[put.window] = _Permit(asked_s=now)
                self._link().send(Ask(put.window))
            if permit.spans is None:
                passed_over.add(queue.name)
            elif (failure := _why_not(put, permit, permit.spans)) is not None:
                self._waiting.end_first(queue.name)
                self._fail([put], failure)
            else:
                self._waiting.take_turn(queue)
                left_bytes -= max(self._post_piece(put, queue, permit, now), ROUND_BYTES // FLYING_PIECES_MAX)
                has_posted = True
        return has_posted

    def _has_room(self) -> bool:
        return self._flying_pieces < FLYING_PIECES_MAX and self._flying_bytes < FLYING_BYTES_MAX

    def _post_piece(self, put: OneSidedPut, queue: Queue[OneSidedPut], permit: _Permit, now: float) -> int:
        """The bytes of the piece. Nothing is counted that is not posted, but that its put has begun: of a first piece
        that fails, some may be under way."""
        if not put.is_begun:
            put.is_begun = True
            permit.begun += 1
            self._begun.setdefault(queue.name, deque()).append(put)
        piece = cut(put, bytes_max=PIECE_BYTES, copies_max=PIECE_COPIES_MAX)
        piece_bytes = sum(copy.length for copy in piece)
        if piece:
            self._check()
            self._is_in_doubt = True
            transfer = self._fabric.write(self._peer, source=put.source, target=permit.target, copies=piece)
            self._is_in_doubt = False
            if not self._flying_pieces:
                self.moved_s = now
            put.flying[transfer] = piece_bytes
            self._flying_pieces += 1
            self._flying_bytes += piece_bytes
        if put.copy_index == len(put.copies):
            self._waiting.end_first(queue.name)
        return piece_bytes

    def _collect(self, now: float) -> bool:
        """Whether anything ended."""
        has_moved = False
        for name, begun in list(self._begun.items()):
            for put in begun:
                for transfer in list(put.flying):
                    if self._fabric.is_done(transfer):
                        self._flying_pieces -= 1
                        self._flying_bytes -= put.flying.pop(transfer)
                        self.moved_s = now
                        has_moved = True
            while begun and begun[0].is_over:
                self._end(begun.popleft())
                has_moved = True
            if not begun:
                del self._begun[name]
        return has_moved

    def _end(self, put: OneSidedPut) -> None:
        self._put_count -= 1
        permit = self._permits[put.window]
        permit.begun -= 1
        if put.failure is None:
            self._emit(PutDone(put.ticket))
            self._link().send(Landed(put.window, put.notice))
        else:
            self._emit(PutFailed(put.ticket, put.failure))
        if permit.is_shut:
            self._drain(put.window, permit)

    def _fail_window(self, window: int, reason: str) -> None:
        self._fail(self._waiting.drop_all(lambda put: put.window == window), reason)

    def _fail(self, puts: Iterable[OneSidedPut], reason: str) -> None:
        """They wait no longer. One that has begun ends when its pieces have."""
        for put in puts:
            if put.is_begun:
                put.failure = reason
            else:
                self._put_count -= 1
                self._emit(PutFailed(put.ticket, reason))

    def _link(self) -> Link:
        if self.link is None:
            raise PeerGone("not connected")
        return self.link


def _why_not(put: OneSidedPut, permit: _Permit, spans: SpanSet) -> str | None:
    """Why this put may not be written into the window."""
    if permit.is_shut:
        return "the peer closed the window"
    if not put.is_begun and not all(spans.covers(Span(copy.target_offset, copy.length)) for copy in put.copies):
        return "a copy lies outside the window"
    return None
