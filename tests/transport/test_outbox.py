"""Fairness and accounting of one channel's outbox."""

from __future__ import annotations

from pdx.transport.api import Copy, PutDone, PutFailed, Span
from pdx.transport.frames import SPANS_MAX
from pdx.transport.outbox import Outbox, Put, checked_copies
from pdx.transport.pace import FIRST_FRAME_BYTES
from pdx.transport.queues import PUTS_MAX
from pdx.transport.spans import SpanSet

MEMORY = memoryview(bytes(4 * FIRST_FRAME_BYTES))


def a_put(ticket: int, queue: bytes, *, frames: int = 1) -> Put:
    return Put(ticket, queue, 1, MEMORY, [Copy(0, 0, frames * FIRST_FRAME_BYTES)], b"n")


def send_all(outbox: Outbox) -> list[int]:
    """The ticket of every frame, in sending order."""
    order = []
    while (frame := outbox.next_frame()) is not None:
        order.append(frame.put.ticket)
        outbox.frame_sent(frame)
    return order


def test_equals_take_turns_and_urgent_goes_first() -> None:
    outbox = Outbox()
    outbox.add(a_put(1, b"a", frames=3), 0.0)
    outbox.add(a_put(2, b"b", frames=2), 0.0)
    outbox.add(a_put(3, b"c", frames=2), 1.0)
    assert send_all(outbox) == [3, 3, 1, 2, 1, 2, 1]
    assert len(outbox) == 0


def test_an_urgent_put_overtakes_between_frames() -> None:
    outbox = Outbox()
    outbox.add(a_put(1, b"a", frames=3), 0.0)
    frame = outbox.next_frame()
    assert frame is not None
    assert outbox.frame_sent(frame) is None
    outbox.add(a_put(2, b"b"), 5.0)
    assert send_all(outbox) == [2, 1, 1]


def test_a_queue_is_as_urgent_as_its_latest_put() -> None:
    outbox = Outbox()
    outbox.add(a_put(1, b"a"), 0.0)
    outbox.add(a_put(2, b"b"), 1.0)
    outbox.add(a_put(3, b"a"), 2.0)
    assert send_all(outbox) == [1, 3, 2]


def test_cancel_of_the_put_under_way_waits_for_its_frame() -> None:
    outbox = Outbox()
    outbox.add(a_put(1, b"a", frames=2), 0.0)
    outbox.add(a_put(2, b"a"), 0.0)
    frame = outbox.next_frame()
    assert frame is not None
    assert outbox.cancel(b"a", "why") == [PutFailed(2, "why")]
    assert outbox.frame_sent(frame) == PutFailed(1, "why")
    assert outbox.next_frame() is None
    assert len(outbox) == 0


def test_cancel_during_the_last_frame_is_too_late() -> None:
    outbox = Outbox()
    outbox.add(a_put(1, b"a"), 0.0)
    frame = outbox.next_frame()
    assert frame is not None
    assert outbox.cancel(b"a", "why") == []
    assert outbox.frame_sent(frame) == PutDone(1)


def test_fail_all_ends_each_put_once() -> None:
    outbox = Outbox()
    for ticket in range(4):
        outbox.add(a_put(ticket, b"%d" % (ticket % 2)), 0.0)
    assert outbox.next_frame() is not None
    outbox.cancel(b"0", "cancelled")
    assert sorted(end.ticket for end in outbox.fail_all("lost")) == [0, 1, 3]
    assert outbox.fail_all("lost") == []


def test_bound() -> None:
    outbox = Outbox()
    for ticket in range(PUTS_MAX):
        assert outbox.add(Put(ticket, b"q", 1, MEMORY, [], b""), 0.0) is None
    assert isinstance(outbox.add(a_put(-1, b"q"), 0.0), PutFailed)


def test_frames_are_bounded_in_spans_and_bytes() -> None:
    outbox = Outbox()
    copies = [Copy(index * 2, index * 3, 1) for index in range(SPANS_MAX + 1)] + [Copy(0, 4096, FIRST_FRAME_BYTES + 1)]
    outbox.add(Put(1, b"q", 1, MEMORY, copies, b""), 0.0)
    frames = []
    while (frame := outbox.next_frame()) is not None:
        frames.append(frame)
        outbox.frame_sent(frame)
    assert all(len(frame.targets) <= SPANS_MAX and frame.payload_bytes <= FIRST_FRAME_BYTES for frame in frames)
    assert sum(frame.payload_bytes for frame in frames) == sum(copy.length for copy in copies)
    assert [frame.is_last for frame in frames] == [False] * (len(frames) - 1) + [True]


def test_neighbours_are_joined() -> None:
    copies = [Copy(0, 100, 10), Copy(10, 110, 5), Copy(15, 115, 0), Copy(15, 200, 1), Copy(17, 201, 1)]
    assert checked_copies(copies, 100, notice=b"") == [Copy(0, 100, 15), Copy(15, 200, 1), Copy(17, 201, 1)]


def test_span_set_against_a_set_of_bytes() -> None:
    spans = [Span(10, 5), Span(15, 5), Span(40, 1), Span(38, 10), Span(60, 0)]
    covered = {byte for span in spans for byte in range(span.offset, span.offset + span.length)}
    span_set = SpanSet(spans)
    for offset in range(70):
        for length in range(1, 15):
            assert span_set.covers(Span(offset, length)) == set(range(offset, offset + length)).issubset(covered)
