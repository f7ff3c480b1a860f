"""One channel of a one-sided lane: what is to be put through it, what is being written, and the rights it has.

Before the first put through a window the peer is asked for it; the answer is the window's spans, against which every
copy is checked here, since nobody checks it there. When the peer shuts a window nothing more is posted through it, and
DRAINED is said when what was under way has ended. Puts of one queue are written side by side and announced in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from pdx.errors import PeerGone, WireError
from pdx.transport.api import Copy, Event, PeerLost, PutDone, PutFailed, Span
from pdx.transport.fabric import Fabric, Memory, Transfer
from pdx.transport.link import Link
from pdx.transport.link_messages import Ask, Drained, Granted, Landed, LinkMessage, Shut, Unknown
from pdx.transport.outbox import PUTS_MAX
from pdx.transport.spans import SpanSet, check_inside

# Bytes under way are bytes that an urgent put cannot overtake; 8 MiB fill a link of 40 GB/s for 0.2 ms, which is more
# than this thread is ever away. One put is posted whatever its size.
FLYING_BYTES_MAX = 8 << 20
FLYING_PUTS_MAX = 64
# Some fabrics copy while a write is posted: so ends are collected, and their notices sent, after every such round; and
# after so many rounds others get their turn.
ROUND_BYTES = 1 << 20
ROUNDS_MAX = 8


class OneSidedPut:
    """One put, from the queue to its end."""

    __slots__ = ("copies", "is_done", "length", "notice", "source", "ticket", "transfer", "window")

    def __init__(self, ticket: int, window: int, source: Memory, copies: Sequence[Copy], notice: bytes) -> None:
        self.ticket = ticket
        self.window = window
        self.source = source
        self.copies = copies
        self.notice = notice
        self.length = sum(copy.length for copy in copies)
        self.transfer: Transfer | None = None
        self.is_done = False


class _Permit:
    """What the peer said of one window."""

    __slots__ = ("asked_s", "flying", "is_shut", "spans", "target")

    def __init__(self, asked_s: float) -> None:
        self.asked_s = asked_s
        self.spans: SpanSet | None = None  # None: not answered yet
        self.target = Memory(address=0, length=0)
        self.flying = 0
        self.is_shut = False


class _Queue:
    __slots__ = ("flying", "served_at_turn", "urgency", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[OneSidedPut] = deque()
        self.flying: deque[OneSidedPut] = deque()
        self.urgency = 0.0
        self.served_at_turn = 0

    def rank(self) -> tuple[float, int]:
        return self.urgency, -self.served_at_turn


class OneSidedChannel:
    """Owned by the reactor's thread. Raises PeerGone, WireError or OSError when the channel is over: call end()."""

    def __init__(self, number: int, endpoint: str, *, fabric: Fabric, emit: Callable[[Event], None]) -> None:
        self.number = number
        self.endpoint = endpoint
        self.link: Link | None = None  # None: not greeted yet
        self.bytes_sent = 0
        self.is_eager = False  # has more to do at once
        self.moved_s = 0.0  # when one ended, or the first of those under way began
        self._fabric = fabric
        self._emit = emit
        self._peer = ""
        self._queues: dict[bytes, _Queue] = {}
        self._permits: dict[int, _Permit] = {}
        self._put_count = 0
        self._flying_puts = 0
        self._flying_bytes = 0
        self._turn = 0
        self._is_posting = True

    @property
    def is_flying(self) -> bool:
        return self._flying_puts > 0

    @property
    def is_idle(self) -> bool:
        return not self._put_count and (self.link is None or not self.link.unsent_bytes)

    def put(self, put: OneSidedPut, queue_name: bytes, urgency: float) -> None:
        if self._put_count >= PUTS_MAX:
            self._emit(PutFailed(put.ticket, f"channel holds {PUTS_MAX} puts already"))
            return
        queue = self._queues.setdefault(queue_name, _Queue())
        queue.urgency = urgency
        queue.waiting.append(put)
        self._put_count += 1

    def cancel(self, queue_name: bytes) -> None:
        """What is under way ends as it would have."""
        queue = self._queues.get(queue_name)
        if queue is not None:
            self._fail_waiting(queue, lambda _: True, "cancelled")
            self._forget_if_empty(queue_name, queue)

    def stop_posting(self) -> None:
        """From now on only ends are waited for: the peer has hung up, or we will."""
        self._is_posting = False

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
                self._fail_window(window, "the peer closed the window")
                permit = self._permits.get(window)
                if permit is not None:
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
        if self._flying_puts and now > self.moved_s + stall_s:
            return True
        return any(permit.spans is None and now > permit.asked_s + stall_s for permit in self._permits.values())

    def end(self, reason: str, *, is_ours: bool) -> None:
        """Breaks with the peer; every put ends. `is_ours`: without PeerLost."""
        transfers = [
            put.transfer
            for queue in self._queues.values()
            for put in queue.flying
            if put.transfer is not None and not put.is_done
        ]
        if self._peer:
            self._fabric.drop_peer(self._peer, transfers)
        for queue in self._queues.values():
            for put in (*queue.flying, *queue.waiting):
                self._emit(PutFailed(put.ticket, reason))
        self._queues.clear()
        self._permits.clear()
        self._put_count = self._flying_puts = self._flying_bytes = 0
        if self.link is not None:
            self.link.close()
        if not is_ours:
            self._emit(PeerLost(self.number, self.endpoint, reason))

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
        if grant.metadata:
            self._peer = self._fabric.add_peer(grant.metadata)
        permit.target = Memory(grant.address, grant.length, grant.kind, grant.device)
        permit.spans = SpanSet(grant.spans)

    def _drain(self, window: int, permit: _Permit | None) -> None:
        if permit is None or not permit.flying:
            self._permits.pop(window, None)
            self._link().send(Drained(window))

    def _post(self, now: float) -> bool:
        """One round. Whether anything was posted."""
        blocked: set[bytes] = set()
        posted_puts = posted_bytes = 0
        while self._is_posting and posted_bytes < ROUND_BYTES and not self._link().is_congested and self._has_room():
            ready = [(name, queue) for name, queue in self._queues.items() if queue.waiting and name not in blocked]
            if not ready:
                break
            name, queue = max(ready, key=lambda item: item[1].rank())
            put = queue.waiting[0]
            permit = self._permits.get(put.window)
            if permit is None:
                permit = self._permits[put.window] = _Permit(asked_s=now)
                self._link().send(Ask(put.window))
            if permit.spans is None:
                blocked.add(name)
                continue
            self._turn += 1
            queue.served_at_turn = self._turn
            queue.waiting.popleft()
            if not all(permit.spans.covers(Span(copy.target_offset, copy.length)) for copy in put.copies):
                self._put_count -= 1
                self._emit(PutFailed(put.ticket, "a copy lies outside the window"))
                self._forget_if_empty(name, queue)
                continue
            self._start(put, queue, permit, now)
            posted_puts += 1
            posted_bytes += put.length
        return posted_puts > 0

    def _has_room(self) -> bool:
        return self._flying_puts < FLYING_PUTS_MAX and self._flying_bytes < FLYING_BYTES_MAX

    def _start(self, put: OneSidedPut, queue: _Queue, permit: _Permit, now: float) -> None:
        if not self._flying_puts:
            self.moved_s = now
        queue.flying.append(put)
        self._flying_puts += 1
        self._flying_bytes += put.length
        permit.flying += 1
        if put.copies:
            put.transfer = self._fabric.write(self._peer, source=put.source, target=permit.target, copies=put.copies)
        else:
            put.is_done = True

    def _collect(self, now: float) -> bool:
        """Whether any put ended."""
        flying_before = self._flying_puts
        if not flying_before:
            return False
        for name, queue in list(self._queues.items()):
            for put in queue.flying:
                if not put.is_done and put.transfer is not None and self._fabric.is_done(put.transfer):
                    put.is_done = True
            while queue.flying and queue.flying[0].is_done:
                self._landed(queue.flying.popleft())
                self.moved_s = now
            self._forget_if_empty(name, queue)
        return self._flying_puts < flying_before

    def _landed(self, put: OneSidedPut) -> None:
        self._put_count -= 1
        self._flying_puts -= 1
        self._flying_bytes -= put.length
        self.bytes_sent += put.length
        self._emit(PutDone(put.ticket))
        permit = self._permits[put.window]
        permit.flying -= 1
        self._link().send(Landed(put.window, put.notice))
        if permit.is_shut:
            self._drain(put.window, permit)

    def _fail_window(self, window: int, reason: str) -> None:
        for name, queue in list(self._queues.items()):
            self._fail_waiting(queue, lambda put: put.window == window, reason)
            self._forget_if_empty(name, queue)

    def _fail_waiting(self, queue: _Queue, is_meant: Callable[[OneSidedPut], bool], reason: str) -> None:
        kept: deque[OneSidedPut] = deque()
        for put in queue.waiting:
            if is_meant(put):
                self._put_count -= 1
                self._emit(PutFailed(put.ticket, reason))
            else:
                kept.append(put)
        queue.waiting = kept

    def _forget_if_empty(self, name: bytes, queue: _Queue) -> None:
        if not queue.waiting and not queue.flying:
            del self._queues[name]

    def _link(self) -> Link:
        if self.link is None:
            raise PeerGone("not connected")
        return self.link
