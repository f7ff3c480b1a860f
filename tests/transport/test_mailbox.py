"""A control thread that is behind holds its peers back, and is not buried by them."""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Iterator

import pytest
import raw_peers
from held_fabric import wait_until
from lane_pairs import KEY

from pdx.transport import mailbox, reactor
from pdx.transport.api import Arrived, Copy, PutDone, Span, WindowClosed
from pdx.transport.frames import NOTICE_BYTES_MAX
from pdx.transport.link_messages import Ask, Granted, Landed
from pdx.transport.side import Side, arrivals_of
from pdx.transport.tcp import TcpLane

ROOM, PUTS = 50, 400


@contextlib.contextmanager
def opened(*, seed: int, stall_s: float = 5.0) -> Iterator[Side]:
    side = Side(TcpLane("tcp://127.0.0.1:0", key=KEY, name="test", stall_s=stall_s), seed=seed)
    try:
        yield side
    finally:
        side.lane.abort()


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "EVENTS_MAX", ROOM)


def put_many(near: Side, far: Side) -> int:
    channel, window = near.lane.connect(far.lane.endpoint), far.region.open_window([])
    tickets = [near.put(channel, window, [Copy(0, 0, 0)], notice=b"%d" % number) for number in range(PUTS)]
    near.wait_end(tickets[-1])
    return channel


def test_ends_and_arrivals_know_when_they_were_however_late_they_are_taken() -> None:
    box = mailbox.Mailbox()
    began_ns = time.monotonic_ns()
    for event in (PutDone(1), Arrived(2, b"n"), WindowClosed(2)):
        box.add(event)
    ended_ns = time.monotonic_ns()
    done, arrived, closed = box.take()
    assert isinstance(done, PutDone) and isinstance(arrived, Arrived) and closed == WindowClosed(2)
    assert began_ns <= done.at_ns <= arrived.at_ns <= ended_ns
    box.close()


def test_peers_wait_until_there_is_room() -> None:
    with opened(seed=1) as near, opened(seed=2) as far:
        put_many(near, far)
        taken: list[int] = []
        while sum(taken) < PUTS:
            assert select.select([far.lane.fileno()], [], [], 10)[0], f"after {taken} nothing more came"
            events = far.lane.take_events()
            far.events += events
            taken.append(len(events))
        assert max(taken) <= ROOM
        assert arrivals_of(far.events) == [b"%d" % number for number in range(PUTS)]


def test_large_notices_wait_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "NOTICES_BYTES_MAX", 10 * NOTICE_BYTES_MAX)
    with opened(seed=1) as near, opened(seed=2) as far:
        channel, window = near.lane.connect(far.lane.endpoint), far.region.open_window([])
        notices = [b"%d" % number + bytes(NOTICE_BYTES_MAX - 2) for number in range(10, 10 + ROOM)]
        for notice in notices:
            near.put(channel, window, [], notice=notice)
        wait_until(lambda: not far.lane._mailbox.has_room)  # type: ignore[attr-defined]
        taken = far.lane.take_events()
        assert 0 < len(taken) <= 11
        far.events += taken
        far.wait_arrived(*notices)
        assert arrivals_of(far.events) == notices


def test_a_reader_that_takes_nothing_loses_its_peers() -> None:
    with opened(seed=1) as near, opened(seed=2, stall_s=0.2) as far:
        near.wait_lost(put_many(near, far))
        assert len(far.lane.take_events()) <= ROOM


@contextlib.contextmanager
def held_back(side: Side) -> Iterator[tuple[raw_peers.RawPeer, list[bytes]]]:
    """A peer that has put so many notices that `side`, which takes none, does not listen to it any more."""
    with raw_peers.writer(side) as peer:
        window, notices = side.region.open_window([]), [b"%d" % number for number in range(PUTS)]
        peer.link.send(Ask(window))
        assert isinstance(peer.next(), Granted)
        for part in (notices[:ROOM], notices[ROOM:]):
            for notice in part:
                peer.link.send(Landed(window, notice))
            wait_until(lambda: not side.lane._mailbox.has_room)  # type: ignore[attr-defined]
        wait_until(lambda: bool(side.lane._reactor._held_back))  # type: ignore[attr-defined]
        yield peer, notices


def test_peers_of_a_one_sided_lane_wait_and_nobody_else_does() -> None:
    with raw_peers.opened(seed=1, stall_s=0.2) as near, raw_peers.opened() as far, held_back(near) as (_, notices):
        window, channel = far.region.open_window([Span(0, 10)]), near.lane.connect(far.lane.endpoint)
        for notice in notices[:3]:  # for longer than a stall time, which is not theirs
            near.put(channel, window, [Copy(0, 0, 10)], notice=notice)
            far.wait_arrived(notice)
            select.select([], [], [], 0.1)
        near.wait_arrived(*notices)
        assert arrivals_of(near.events) == notices


def test_a_lane_closes_though_nobody_takes_what_its_peers_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reactor, "WIND_DOWN_S", 1e9)
    with raw_peers.opened() as side:
        with held_back(side):
            pass
        side.lane.abort()
        assert not side.lane._reactor._thread.is_alive()  # type: ignore[attr-defined]
