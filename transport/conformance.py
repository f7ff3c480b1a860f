"""What every lane must do, as functions anybody can call: check_all(make_pair), or one check_<property> at a time.

`make_pair` is a callable whose result is a context manager that yields a fresh Pair and leaves nothing behind. A check
raises AssertionError naming what was broken. Nothing here sleeps: every wait is for an event, under a deadline.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import tracemalloc
from collections.abc import Callable
from functools import partial

from pdx.errors import ClosedTransport
from pdx.transport.api import Copy, Event, PutDone, PutFailed, Span, WindowClosed
from pdx.transport.conformance_peers import (
    check_hostile_bytes,
    check_idle_peer_killed,
    check_peer_killed,
    check_peer_of_another_kind,
    check_reconnect,
    check_unreachable,
)
from pdx.transport.side import MEMORY_BYTES, WAIT_S, MakePair, arrivals_of, ends_of, losses_of, sides

Check = Callable[[MakePair], None]


def check_all(make_pair: MakePair) -> None:
    for check in CHECKS:
        check(make_pair)


def check_bytes_land_exactly(make_pair: MakePair) -> None:
    """Scattered spans land where they should, and no other byte changes."""
    with sides(make_pair) as (_, near, far, channel):
        expected = bytearray(far.memory)
        copies = [Copy(10_000, 77, 1), Copy(5, 5_000, 70_001), Copy(1 << 20, 3 << 20, 300_000), Copy(3, 90_000, 4096)]
        window = far.region.open_window([Span(copy.target_offset, copy.length) for copy in copies])
        for copy in copies:
            source = near.memory[copy.source_offset : copy.source_offset + copy.length]
            expected[copy.target_offset : copy.target_offset + copy.length] = source
        ticket = near.put(channel, window, copies, notice=b"all")
        assert isinstance(near.wait_end(ticket), PutDone), "the put failed"
        far.wait_arrived(b"all")
        assert far.memory == expected, "other bytes landed than were sent"


def check_notice_after_data(make_pair: MakePair) -> None:
    """Whenever a notice is taken, the bytes of its put are there already."""
    with sides(make_pair) as (_, near, far, channel):
        page_bytes = 64 << 10
        window = far.region.open_window([Span(0, MEMORY_BYTES)])
        count = MEMORY_BYTES // page_bytes
        for index in range(count):
            offset = index * page_bytes
            near.put(channel, window, [Copy(offset, offset, page_bytes)], notice=index.to_bytes(2, "little"))
        checked = 0
        while checked < count:
            far.wait("next notice", partial(_has_more_than, checked))
            for notice in arrivals_of(far.events)[checked:]:
                offset = int.from_bytes(notice, "little") * page_bytes
                here, there = far.memory[offset : offset + page_bytes], near.memory[offset : offset + page_bytes]
                assert here == there, f"notice of page {offset // page_bytes} came before its bytes"
                checked += 1


def check_empty_put(make_pair: MakePair) -> None:
    """A put without copies delivers its notice and changes nothing; a window may be without spans."""
    with sides(make_pair) as (_, near, far, channel):
        before = bytes(far.memory)
        window = far.region.open_window([])
        tickets = [
            near.put(channel, window, [], notice=b"bare"),
            near.put(channel, window, [Copy(9, 9, 0)], notice=b""),
        ]
        for ticket in tickets:
            assert isinstance(near.wait_end(ticket), PutDone), "an empty put failed"
        far.wait("both notices", lambda events: arrivals_of(events) == [b"bare", b""])
        assert far.memory == before, "an empty put changed memory"


def check_many_small_spans(make_pair: MakePair) -> None:
    """Thousands of spans in one put, their order shuffled."""
    with sides(make_pair) as (_, near, far, channel):
        rng = random.Random(3)  # noqa: S311 - seeded on purpose
        slots = list(range(3000))
        sources, targets = rng.sample(slots, 2500), rng.sample(slots, 2500)
        copies = [
            Copy(source * 700, target * 700, rng.randint(1, 699))
            for source, target in zip(sources, targets, strict=True)
        ]
        expected = bytearray(far.memory)
        for copy in copies:
            source_bytes = near.memory[copy.source_offset : copy.source_offset + copy.length]
            expected[copy.target_offset : copy.target_offset + copy.length] = source_bytes
        window = far.region.open_window([Span(copy.target_offset, copy.length) for copy in copies])
        near.put(channel, window, copies, notice=b"many")
        far.wait_arrived(b"many")
        assert far.memory == expected, "small spans landed wrong"


def check_big_put(make_pair: MakePair) -> None:
    """A put far larger than any frame or socket buffer, with the largest notice that handoffs use."""
    with sides(make_pair) as (_, near, far, channel):
        notice = bytes(64 << 10)
        window = far.region.open_window([Span(0, MEMORY_BYTES)])
        ticket = near.put(channel, window, [Copy(0, 0, MEMORY_BYTES)], notice=notice)
        assert isinstance(near.wait_end(ticket), PutDone), "a big put failed"
        far.wait_arrived(notice)
        assert far.memory == near.memory, "a big put landed wrong"


def check_order_within_queue(make_pair: MakePair) -> None:
    """Whatever their urgency and however many queues share the channel, puts of one queue keep their order."""
    with sides(make_pair) as (_, near, far, channel):
        rng = random.Random(4)  # noqa: S311 - seeded on purpose
        window = far.region.open_window([Span(0, MEMORY_BYTES)])
        sent: dict[bytes, list[bytes]] = {b"a": [], b"b": [], b"c": []}
        for index in range(120):
            queue = rng.choice(list(sent))
            notice = queue + str(index).encode()
            length = rng.choice([0, 1, 50_000, 400_000])
            near.put(
                channel, window, [Copy(0, 0, length)], notice=notice, queue=queue, urgency=rng.choice([0.0, 1.0, 2.0])
            )
            sent[queue].append(notice)
        far.wait("all notices", lambda events: len(arrivals_of(events)) == 120)
        for queue, notices in sent.items():
            got = [notice for notice in arrivals_of(far.events) if notice[:1] == queue]
            assert got == notices, f"queue {queue!r} was reordered"


def check_both_directions(make_pair: MakePair) -> None:
    """Each side puts into the other's window at the same time."""
    with sides(make_pair) as (pair, near, far, channel):
        half = MEMORY_BYTES // 2
        far_window = far.region.open_window([Span(0, half)])
        near_window = near.region.open_window([Span(0, half)])
        back = far.lane.connect(pair.near.endpoint)
        upper_halves = bytes(near.memory[half:]), bytes(far.memory[half:])
        near.put(channel, far_window, [Copy(half, 0, half)], notice=b"there")
        far.put(back, near_window, [Copy(half, 0, half)], notice=b"back")
        far.wait_arrived(b"there")
        near.wait_arrived(b"back")
        assert (bytes(far.memory[:half]), bytes(near.memory[:half])) == upper_halves, "directions disturbed each other"


def check_concurrent(make_pair: MakePair) -> None:
    """Many queues, small and large, there, back and to the lane itself, all at once: every byte in its place."""
    with sides(make_pair) as (pair, near, far, channel):
        rng = random.Random(7)  # noqa: S311 - seeded on purpose
        quarter, page_bytes = MEMORY_BYTES // 4, 32 << 10
        routes = [  # from, channel, to, the quarter read and the quarter written
            (near, channel, far, 0, 1),
            (far, far.lane.connect(pair.near.endpoint), near, 2, 3),
            (near, near.lane.connect(pair.near.endpoint), near, 0, 1),
        ]
        windows = [target.region.open_window([Span(at * quarter, quarter)]) for _, _, target, _, at in routes]
        expected: dict[int, set[bytes]] = {id(near): set(), id(far): set()}
        for index in rng.sample(range(quarter // page_bytes), quarter // page_bytes):
            for number, (source, via, target, read, written) in enumerate(routes):
                offset, notice = index * page_bytes, b"%d.%d" % (number, index)
                copy = Copy(read * quarter + offset, written * quarter + offset, page_bytes)
                source.put(via, windows[number], [copy], notice=notice, queue=b"q%d" % (index % 5), urgency=index % 3)
                expected[id(target)].add(notice)
        near.wait_arrived(*expected[id(near)])
        far.wait_arrived(*expected[id(far)])
        quarters = [slice(at * quarter, (at + 1) * quarter) for at in range(4)]
        assert far.memory[quarters[1]] == near.memory[quarters[0]] == near.memory[quarters[1]], "pages went astray"
        assert near.memory[quarters[3]] == far.memory[quarters[2]], "pages went astray on the way back"


def check_arguments(make_pair: MakePair) -> None:
    """Spans outside a region raise ValueError and change nothing; connect() is idempotent."""
    with sides(make_pair) as (pair, near, far, channel):
        window = far.region.open_window([Span(0, MEMORY_BYTES)])
        for copy in (Copy(MEMORY_BYTES - 1, 0, 2), Copy(-1, 0, 2), Copy(0, 0, -1), Copy(0, -1, 1)):
            assert_raises(ValueError, partial(near.put, channel, window, [copy]))
        for span in (Span(MEMORY_BYTES, 1), Span(-1, 1), Span(0, -1)):
            assert_raises(ValueError, partial(far.region.open_window, [Span(0, 1), span]))
        assert pair.near.connect(pair.far.endpoint) == channel, "a second channel to a live endpoint"
        near.put(channel, window, [Copy(0, 0, 10)], notice=b"works")
        far.wait_arrived(b"works")


def check_closed_window(make_pair: MakePair) -> None:
    """A closed window admits nothing, says WindowClosed exactly once, and leaves the channel usable."""
    with sides(make_pair) as (_, near, far, channel):
        closed = far.region.open_window([Span(0, MEMORY_BYTES)])
        opened = far.region.open_window([Span(0, 10)])
        near.put(channel, closed, [Copy(0, 0, 10)], notice=b"before")
        far.wait_arrived(b"before")
        far.region.close_window(closed)
        far.wait_closed(closed)
        before = bytes(far.memory)
        far.region.close_window(closed)
        near.put(channel, closed, [Copy(500, 500, 1 << 20)], notice=b"late")
        near.put(channel, opened, [Copy(0, 0, 10)], notice=b"after")
        far.wait_arrived(b"after")
        assert far.memory == before, "bytes came through a closed window"
        assert b"late" not in arrivals_of(far.events), "a notice came through a closed window"
        assert far.events.count(WindowClosed(closed)) == 1, "WindowClosed more than once"


def check_close_under_way(make_pair: MakePair) -> None:
    """After WindowClosed not one byte changes, although the peer is in the middle of a stream of puts."""
    with sides(make_pair) as (_, near, far, channel):
        window = far.region.open_window([Span(0, MEMORY_BYTES)])
        near.put(channel, window, [Copy(0, 0, 1)], notice=b"first", queue=b"other")
        tickets = [near.put(channel, window, [Copy(0, 0, MEMORY_BYTES)], notice=b"%d" % n) for n in range(8)]
        far.wait_arrived(b"first")
        far.region.close_window(window)
        far.wait_closed(window)
        arrived = len(arrivals_of(far.events))
        far.memory[:] = bytes(MEMORY_BYTES)
        opened = far.region.open_window([])
        near.put(channel, opened, [], notice=b"done")
        for ticket in tickets:
            near.wait_end(ticket)
        far.wait_arrived(b"done")
        assert not any(far.memory), "a byte was written after WindowClosed"
        assert len(arrivals_of(far.events)) == arrived + 1, "a notice came after WindowClosed"
        assert far.events.count(WindowClosed(window)) == 1, "WindowClosed more than once"


def check_unknown_window(make_pair: MakePair) -> None:
    """A put into a window that never was changes nothing, and the channel lives on."""
    with sides(make_pair) as (_, near, far, channel):
        window = far.region.open_window([Span(0, 10)])
        before = bytes(far.memory)
        far.region.close_window(window ^ 1)
        near.put(channel, window ^ 1, [Copy(0, 0, 1 << 20)], notice=b"unknown")
        near.put(channel, window, [], notice=b"known")
        far.wait_arrived(b"known")
        assert arrivals_of(far.events) == [b"known"], "a notice came through an unknown window"
        assert far.memory == before, "bytes came through an unknown window"
        assert not losses_of(near.events, channel), "an unknown window cost the channel"


def check_put_outside_window(make_pair: MakePair) -> None:
    """Not a byte leaves the window: the receiver drops whoever tries, or the sender fails the put."""
    with sides(make_pair) as (_, near, far, channel):
        window = far.region.open_window([Span(100, 100), Span(300, 100)])
        for offset, length in ((99, 2), (150, 51), (200, 1), (100, 300), (MEMORY_BYTES + 5, 1)):
            before = bytes(far.memory)
            ticket = near.put(channel, window, [Copy(0, offset, length)], notice=b"outside")
            if far.lane.checked_by == "receiver":
                near.wait_lost(channel)
                near.wait_end(ticket)
                channel = near.lane.connect(far.lane.endpoint)
            else:
                assert isinstance(near.wait_end(ticket), PutFailed), "the sender did not check its put"
            assert far.memory == before, f"{length} bytes at {offset} were written through window [100,200) [300,400)"
        near.put(channel, window, [Copy(0, 100, 100), Copy(0, 300, 100)], notice=b"inside")
        far.wait_arrived(b"inside")
        assert arrivals_of(far.events) == [b"inside"], "a notice of a refused put was delivered"


def check_cancel(make_pair: MakePair) -> None:
    """cancel() ends every ticket of its queue exactly once, leaves other queues alone, and may be repeated."""
    with sides(make_pair) as (_, near, far, channel):
        window = far.region.open_window([Span(0, MEMORY_BYTES)])
        doomed = [
            near.put(channel, window, [Copy(0, 0, MEMORY_BYTES)], notice=b"x%d" % n, queue=b"x") for n in range(20)
        ]
        kept = [near.put(channel, window, [Copy(0, 0, 1000)], notice=b"y%d" % n, queue=b"y") for n in range(3)]
        near.lane.cancel(b"x")
        near.lane.cancel(b"x")
        near.lane.cancel(b"never used")
        ends = [near.wait_end(ticket) for ticket in doomed]
        assert isinstance(ends[-1], PutFailed), "cancel did not reach the last put of its queue"
        for ticket in kept:
            assert isinstance(near.wait_end(ticket), PutDone), "cancel reached another queue"
        far.wait_arrived(b"y0", b"y1", b"y2")
        near.put(channel, window, [], notice=b"x again", queue=b"x")
        far.wait_arrived(b"x again")
        done = {b"x%d" % n for n, end in enumerate(ends) if isinstance(end, PutDone)}
        got = {notice for notice in arrivals_of(far.events) if notice[:1] == b"x"} - {b"x again"}
        assert got == done, "notices and ends of cancelled puts disagree"


def check_cancel_leaves_nothing(make_pair: MakePair) -> None:
    """However much is put and cancelled, no memory, thread or descriptor stays behind."""
    with sides(make_pair) as (_, near, far, channel):
        window = far.region.open_window([Span(0, MEMORY_BYTES)])
        used: list[tuple[int, int]] = []
        tracemalloc.start()
        try:
            for turn in range(6):
                for number in range(300):
                    copies = [Copy(n * 9000, n * 9000, 4096) for n in range(8)]
                    near.put(channel, window, copies, notice=bytes(512), queue=b"%d" % (number % 3))
                near.put(channel, window, [], notice=b"last of %d" % turn, queue=b"last")
                for queue in (b"0", b"1", b"2"):
                    near.lane.cancel(queue)
                near.wait("all ends", lambda events: sum(isinstance(e, PutDone | PutFailed) for e in events) == 301)
                near.events.clear()
                far.wait_arrived(b"last of %d" % turn)
                far.events.clear()
                gc.collect()
                used.append((tracemalloc.get_traced_memory()[0], threading.active_count() + _descriptor_count()))
        finally:
            tracemalloc.stop()
        grown_bytes = used[-1][0] - used[0][0]
        assert grown_bytes < 300 << 10, f"1,500 cancelled puts with 750 KB of notices left {grown_bytes} bytes"
        open_things = [count for _, count in used]
        # A lane may open one more, once, on its way; none for every so many puts.
        assert open_things[-1] <= open_things[0] + 1, f"threads and descriptors, each 300 puts: {open_things}"


def check_close_drains(make_pair: MakePair) -> None:
    """close(drain_s) sends what is queued."""
    with sides(make_pair) as (_, near, far, channel):
        window = far.region.open_window([Span(0, MEMORY_BYTES)])
        tickets = [near.put(channel, window, [Copy(0, 0, MEMORY_BYTES)], notice=b"%d" % n) for n in range(4)]
        expected = bytes(near.memory)
        near.lane.close(drain_s=WAIT_S)
        near.events += near.lane.take_events()
        assert [e.ticket for e in near.events if isinstance(e, PutDone)] == tickets, "close dropped queued puts"
        far.wait_arrived(b"0", b"1", b"2", b"3")
        assert far.memory == expected


def check_closed_is_closed(make_pair: MakePair) -> None:
    """close() and abort() are idempotent, end open tickets, release memory, and leave no thread and no descriptor."""
    threads_before, descriptors_before = threading.active_count(), _descriptor_count()
    with sides(make_pair) as (pair, near, far, channel):
        window = far.region.open_window([Span(0, MEMORY_BYTES)])
        tickets = [near.put(channel, window, [Copy(0, 0, MEMORY_BYTES)]) for _ in range(20)]
        near.lane.abort()
        near.lane.abort()
        near.lane.close(drain_s=1.0)
        near.events += near.lane.take_events()
        for ticket in tickets:
            assert len(ends_of(near.events, ticket)) == 1, "abort left a ticket open, or ended it twice"
        assert_raises(ClosedTransport, lambda: near.put(channel, window, []))
        assert_raises(ClosedTransport, lambda: pair.near.connect(far.lane.endpoint))
        assert_raises(ClosedTransport, lambda: pair.near.register(memoryview(bytearray(8))))
        near.free_memory()  # BufferError if the lane still held a view
        far.lane.close(drain_s=0.0)
        far.free_memory()
    assert threading.active_count() == threads_before, f"threads left: {threading.enumerate()}"
    assert _descriptor_count() == descriptors_before, "descriptors left open"


CHECKS: tuple[Check, ...] = (
    check_bytes_land_exactly,
    check_notice_after_data,
    check_empty_put,
    check_many_small_spans,
    check_big_put,
    check_order_within_queue,
    check_both_directions,
    check_concurrent,
    check_hostile_bytes,
    check_peer_of_another_kind,
    check_arguments,
    check_closed_window,
    check_close_under_way,
    check_unknown_window,
    check_put_outside_window,
    check_cancel,
    check_cancel_leaves_nothing,
    check_peer_killed,
    check_idle_peer_killed,
    check_unreachable,
    check_reconnect,
    check_close_drains,
    check_closed_is_closed,
)


def assert_raises(kind: type[Exception], call: Callable[[], object]) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


def _has_more_than(count: int, events: list[Event]) -> bool:
    return len(arrivals_of(events)) > count


def _descriptor_count() -> int:
    return len(os.listdir("/proc/self/fd"))
