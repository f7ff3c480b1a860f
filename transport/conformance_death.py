"""What every lane must do when a peer is killed or stopped: conformance checks that need the far lane in a process.

A stopped process is not gone: what it had begun goes on when it does. So these checks let it go on, and look at memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import cast

from pdx.transport.api import Copy, Event, PutDone, PutFailed, Span
from pdx.transport.side import (
    GONE_S,
    MEMORY_BYTES,
    WAIT_S,
    Pair,
    ProcessPair,
    Side,
    arrivals_of,
    ends_of,
    losses_of,
    sides,
)

MakeProcessPair = Callable[[], AbstractContextManager[ProcessPair]]
WHOLE = [Copy(0, 0, MEMORY_BYTES)]


def check_killed_reader(make_pair: MakeProcessPair) -> None:
    """SIGKILL of the peer in the middle of a stream of puts into it."""
    with sides(cast(Callable[[], AbstractContextManager[Pair]], make_pair)) as (pair, near, far, channel):
        window = far.region.open_window([Span(0, MEMORY_BYTES)])
        tickets = [near.put(channel, window, WHOLE, notice=b"%d" % n, queue=b"%d" % (n % 3)) for n in range(48)]
        far.wait_arrived(b"0")
        pair.kill_far()
        near.wait_lost(channel)
        if near.lane.checked_by == "sender":  # what is under way may end after its channel
            for ticket in tickets:
                near.wait_end(ticket)
        loss = near.events.index(losses_of(near.events, channel)[0])
        before = near.events if near.lane.checked_by == "sender" else near.events[:loss]
        ended = [event.ticket for event in before if isinstance(event, PutDone | PutFailed)]
        assert sorted(ended) == tickets, "some put did not end, or ended twice, before PeerLost"


def check_killed_writer(make_pair: MakeProcessPair) -> None:
    """SIGKILL of a peer that is putting into us: its window closes, and then not one byte changes."""
    with sides(cast(Callable[[], AbstractContextManager[Pair]], make_pair)) as (pair, near, far, _):
        window = _stream_into_near(near, far)
        pair.kill_far()
        near.region.close_window(window)
        near.wait_closed(window, GONE_S)
        _check_stays_untouched(near)


def check_stopped_writer(make_pair: MakeProcessPair) -> None:
    """SIGSTOP of a peer that is putting into us, while its window is closed: nothing of it lands after WindowClosed."""
    with sides(cast(Callable[[], AbstractContextManager[Pair]], make_pair)) as (pair, near, far, _):
        window = _stream_into_near(near, far)
        cast(ProcessPair, pair).stop_far()
        near.region.close_window(window)
        if near.lane.checked_by == "receiver":
            near.wait_closed(window)
            near.memory[:] = bytes(MEMORY_BYTES)
        cast(ProcessPair, pair).continue_far()
        near.wait_closed(window)
        if near.lane.checked_by == "receiver":
            assert not any(near.memory), "a byte was written after WindowClosed"
        _check_stays_untouched(near)


def check_stopped_before_greeting(make_pair: MakeProcessPair) -> None:
    """A peer that is stopped before it ever answered costs a stall time: then PutFailed and PeerLost."""
    with make_pair() as pair:
        near = Side(pair.near, seed=1)
        pair.stop_far()
        try:
            channel = near.lane.connect(pair.far.endpoint)
            ticket = near.put(channel, 1, WHOLE)
            near.wait_lost(channel)
            assert isinstance(near.wait_end(ticket), PutFailed)
        finally:
            pair.continue_far()


def check_stopped_reader(make_pair: MakeProcessPair) -> None:
    """Puts into a stopped peer end within a few stall times, all of them, whether or not their bytes landed.

    Where nobody checks a write, it may be that it can't be taken back: then the loss is told in that time, and the put
    ends when the peer goes on.
    """
    with sides(cast(Callable[[], AbstractContextManager[Pair]], make_pair)) as (pair, near, far, channel):
        window = far.region.open_window([Span(0, MEMORY_BYTES)])
        near.put(channel, window, [], notice=b"up")
        far.wait_arrived(b"up")
        cast(ProcessPair, pair).stop_far()
        try:
            tickets = [near.put(channel, window, WHOLE) for _ in range(16)]
            loss_is_enough = near.lane.checked_by == "sender"

            def is_over(events: list[Event]) -> bool:
                is_lost = loss_is_enough and bool(losses_of(events, channel))
                return is_lost or all(ends_of(events, ticket) for ticket in tickets)

            near.wait("the end of puts into a stopped peer", is_over, 2 * WAIT_S)
        finally:
            cast(ProcessPair, pair).continue_far()
        for ticket in tickets:
            near.wait_end(ticket)


def check_killed_somewhere(make_pair: MakeProcessPair, *, seed: int) -> None:
    """SIGKILL, or SIGSTOP and then SIGKILL, at a moment that the seed chooses, while both put into each other."""
    rng = random.Random(seed)  # noqa: S311 - seeded on purpose
    with sides(cast(Callable[[], AbstractContextManager[Pair]], make_pair)) as (pair, near, far, channel):
        back, half = far.lane.connect(near.lane.endpoint), MEMORY_BYTES // 2
        windows = [side.region.open_window([Span(0, half)]) for side in (far, near)]
        count = rng.randrange(1, 24)
        copies = [Copy(half, 0, rng.choice([0, 4096, 100_000, half]))]
        for number in range(count):
            far.put(back, windows[1], copies, notice=b"%d" % number, queue=b"%d" % rng.randrange(3))
        tickets = [near.put(channel, windows[0], copies, queue=b"%d" % rng.randrange(3)) for _ in range(count)]
        wanted = rng.randrange(count + 1)
        near.wait(f"{wanted} notices", lambda events: len(arrivals_of(events)) >= wanted)
        if rng.random() < 0.4:
            cast(ProcessPair, pair).stop_far()
        pair.kill_far()
        near.wait_lost(channel)
        for ticket in tickets:
            near.wait_end(ticket)
        near.region.close_window(windows[1])
        near.wait_closed(windows[1], GONE_S)
        ended = [event.ticket for event in near.events if isinstance(event, PutDone | PutFailed)]
        assert sorted(ended) == tickets, "some put did not end, or ended twice"
        assert len(losses_of(near.events, channel)) == 1, "PeerLost more than once"
        _check_stays_untouched(near)


PROCESS_CHECKS: tuple[Callable[[MakeProcessPair], None], ...] = (
    check_killed_reader,
    check_killed_writer,
    check_stopped_writer,
    check_stopped_before_greeting,
    check_stopped_reader,
)


def _stream_into_near(near: Side, far: Side) -> int:
    """Far is in the middle of 256 MiB of puts into the window that is returned."""
    back = far.lane.connect(near.lane.endpoint)
    window = near.region.open_window([Span(0, MEMORY_BYTES)])
    for number in range(64):
        far.put(back, window, WHOLE, notice=b"%d" % number)
    near.wait_arrived(b"0")
    return window


def _check_stays_untouched(near: Side) -> None:
    """Memory does not change any more, at least while a put to ourselves takes its way."""
    near.memory[:] = bytes(MEMORY_BYTES)
    window = near.region.open_window([])
    near.put(near.lane.connect(near.lane.endpoint), window, [], notice=b"barrier")
    near.wait_arrived(b"barrier")
    assert not any(near.memory), "a byte was written after WindowClosed"
