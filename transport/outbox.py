"""What one channel still has to send, cut into frames in a fair order (see queues). Pure: no threads, no clocks.

At most one frame is under way at a time: next_frame(), then frame_sent().
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pdx.transport.api import Copy, PutDone, PutFailed, Span
from pdx.transport.frames import NOTICE_BYTES_MAX, SPANS_MAX, U64_MAX
from pdx.transport.pace import FIRST_FRAME_BYTES
from pdx.transport.queues import PUTS_MAX, Queues, cut


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
        self._queues: Queues[Put] = Queues()
        self._put_count = 0
        self._under_way: Put | None = None
        self._cancelled: str | None = None  # why the put under way shall end

    def __len__(self) -> int:
        return self._put_count

    def add(self, put: Put, urgency: float) -> PutFailed | None:
        if self._put_count >= PUTS_MAX:
            return PutFailed(put.ticket, f"channel holds {PUTS_MAX} puts already")
        self._queues.add(put.queue, put, urgency)
        self._put_count += 1
        return None

    def next_frame(self, bytes_max: int = FIRST_FRAME_BYTES) -> Frame | None:
        """The frame to send now, of at most so many bytes. Its put stays in the outbox until frame_sent()."""
        queue = self._queues.next()
        if queue is None:
            return None
        self._queues.take_turn(queue)
        put = self._under_way = queue.puts[0]
        memory = put.memory
        sources: list[memoryview] = []
        targets: list[Span] = []
        payload_bytes = 0
        for copy in cut(put, bytes_max=bytes_max, copies_max=SPANS_MAX):
            length = copy.length
            sources.append(memory[copy.source_offset : copy.source_offset + length])
            targets.append(Span(copy.target_offset, length))
            payload_bytes += length
        return Frame(put, sources, targets, payload_bytes, is_last=put.copy_index == len(put.copies))

    def frame_sent(self, frame: Frame) -> PutDone | PutFailed | None:
        """The frame's memory is no longer read. Says how its put ended, if it did."""
        put, self._under_way = frame.put, None
        cancelled, self._cancelled = self._cancelled, None
        if cancelled is not None:
            self._put_count -= 1
            return PutDone(put.ticket) if frame.is_last else PutFailed(put.ticket, cancelled)
        if not frame.is_last:
            return None
        self._queues.end_first(put.queue)
        self._put_count -= 1
        return PutDone(put.ticket)

    def cancel(self, name: bytes, reason: str) -> list[PutFailed]:
        """Drops a queue. The put whose frame is under way ends in frame_sent(): until then its memory is read."""
        dropped = self._queues.drop(name)
        if dropped and dropped[0] is self._under_way:
            del dropped[0]
            self._cancelled = reason
        self._put_count -= len(dropped)
        return [PutFailed(put.ticket, reason) for put in dropped]

    def fail_all(self, reason: str) -> list[PutFailed]:
        """Drops everything, the put under way too: call it only once its frame is no longer being sent."""
        failed = []
        if self._under_way is not None and self._cancelled is not None:
            failed.append(PutFailed(self._under_way.ticket, reason))
        self._under_way = self._cancelled = None
        failed += [PutFailed(put.ticket, reason) for put in self._queues.drop_all()]
        self._put_count = 0
        return failed


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
