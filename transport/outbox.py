"""What one channel still has to send, cut into frames in a fair order. Pure: no threads, sockets or clocks.

Puts of one queue leave in order. Between queues the most urgent goes first, and equals take turns frame by frame; a
queue is as urgent as its latest put says. At most one frame is under way at a time: next_frame(), then frame_sent().
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from pdx.transport.api import Copy, PutDone, PutFailed, Span
from pdx.transport.frames import NOTICE_BYTES_MAX, SPANS_MAX, U64_MAX
from pdx.transport.pace import FIRST_FRAME_BYTES

# Far above what handoffs in flight need (layers x chunks of a few hundred prompts); a put beyond it fails at once.
PUTS_MAX = 1 << 16


class Put(msgspec.Struct):
    """One put on its way out. Mutable: the cursor moves as frames are cut."""

    ticket: int
    queue: bytes
    window: int
    memory: memoryview
    copies: Sequence[Copy]
    notice: bytes
    copy_index: int = 0
    copied_bytes: int = 0  # of copies[copy_index]


class Frame(msgspec.Struct):
    """Part of one put, or all of it. `sources` are views of the memory itself."""

    put: Put
    sources: list[memoryview]
    targets: list[Span]
    payload_bytes: int
    is_last: bool


class Outbox:
    """Owned by whoever guards it with a lock; see TcpStream."""

    def __init__(self) -> None:
        self._queues: dict[bytes, _Queue] = {}
        self._turn = 0
        self._put_count = 0
        self._under_way: Put | None = None
        self._cancelled: str | None = None  # why the put under way shall end

    def __len__(self) -> int:
        return self._put_count

    def add(self, put: Put, urgency: float) -> PutFailed | None:
        if self._put_count >= PUTS_MAX:
            return PutFailed(put.ticket, f"channel holds {PUTS_MAX} puts already")
        queue = self._queues.get(put.queue)
        if queue is None:
            queue = self._queues[put.queue] = _Queue()
        queue.urgency = urgency
        queue.puts.append(put)
        self._put_count += 1
        return None

    def next_frame(self, bytes_max: int = FIRST_FRAME_BYTES) -> Frame | None:
        """The frame to send now, of at most so many bytes. Its put stays in the outbox until frame_sent()."""
        if not self._queues:
            return None
        if len(self._queues) == 1:
            (queue,) = self._queues.values()
        else:
            queue = max(self._queues.values(), key=_Queue.rank)
        self._turn += 1
        queue.served_at_turn = self._turn
        self._under_way = queue.puts[0]
        return _cut(self._under_way, bytes_max)

    def frame_sent(self, frame: Frame) -> PutDone | PutFailed | None:
        """The frame's memory is no longer read. Says how its put ended, if it did."""
        put, self._under_way = frame.put, None
        cancelled, self._cancelled = self._cancelled, None
        if cancelled is not None:
            self._put_count -= 1
            return PutDone(put.ticket) if frame.is_last else PutFailed(put.ticket, cancelled)
        if not frame.is_last:
            return None
        queue = self._queues[put.queue]
        queue.puts.popleft()
        self._put_count -= 1
        if not queue.puts:
            del self._queues[put.queue]
        return PutDone(put.ticket)

    def cancel(self, name: bytes, reason: str) -> list[PutFailed]:
        """Drops a queue. The put whose frame is under way ends in frame_sent(): until then its memory is read."""
        queue = self._queues.pop(name, None)
        if queue is None:
            return []
        if self._under_way is not None and queue.puts[0] is self._under_way:
            queue.puts.popleft()
            self._cancelled = reason
        self._put_count -= len(queue.puts)
        return [PutFailed(put.ticket, reason) for put in queue.puts]

    def fail_all(self, reason: str) -> list[PutFailed]:
        """Drops everything, the put under way too: call it only once its frame is no longer being sent."""
        failed = []
        if self._under_way is not None and self._cancelled is not None:
            failed.append(PutFailed(self._under_way.ticket, reason))
        self._under_way = self._cancelled = None
        failed += [PutFailed(put.ticket, reason) for queue in self._queues.values() for put in queue.puts]
        self._queues.clear()
        self._put_count = 0
        return failed


class _Queue:
    __slots__ = ("puts", "served_at_turn", "urgency")

    def __init__(self) -> None:
        self.puts: deque[Put] = deque()
        self.urgency = 0.0
        self.served_at_turn = 0

    def rank(self) -> tuple[float, int]:
        return self.urgency, -self.served_at_turn


def _cut(put: Put, bytes_max: int) -> Frame:
    sources: list[memoryview] = []
    targets: list[Span] = []
    memory, copies, room_bytes = put.memory, put.copies, bytes_max
    index, done_bytes = put.copy_index, put.copied_bytes
    last_index = min(len(copies), index + SPANS_MAX)
    while room_bytes and index < last_index:  # once for every span that is sent: what can be outside, is
        copy = copies[index]
        start, length = copy.source_offset + done_bytes, copy.length - done_bytes
        target = copy.target_offset + done_bytes
        if length > room_bytes:
            length = room_bytes
            done_bytes += length
        else:
            index += 1
            done_bytes = 0
        sources.append(memory[start : start + length])
        targets.append(Span(target, length))
        room_bytes -= length
    put.copy_index, put.copied_bytes = index, done_bytes
    is_last = index == len(copies)
    return Frame(put, sources, targets, bytes_max - room_bytes, is_last)


def checked_copies(copies: Sequence[Copy], region_bytes: int, *, notice: bytes) -> list[Copy]:
    """What a put may ask for, neighbours joined. Raises ValueError for anything out of bounds."""
    if len(notice) > NOTICE_BYTES_MAX:
        raise ValueError(f"a notice may have {NOTICE_BYTES_MAX} bytes, not {len(notice)}")
    result: list[Copy] = []
    source_end = target_end = -1
    for copy in copies:  # of every put, on the thread that owns all state: one pass
        source, target, length = copy.source_offset, copy.target_offset, copy.length
        if source < 0 or target < 0 or length < 0 or source + length > region_bytes or target + length > U64_MAX:
            raise ValueError(f"a copy of {length} bytes from {source} to {target} lies outside its region")
        if length == 0:
            continue
        if source == source_end and target == target_end:
            last = result[-1]
            result[-1] = Copy(last.source_offset, last.target_offset, last.length + length)
        else:
            result.append(copy)
        source_end, target_end = source + length, target + length
    return result
