"""A control thread that is behind holds its peers back, and is not buried by them."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Iterator

import pytest
from lane_pairs import KEY

from pdx.transport import mailbox
from pdx.transport.api import Copy
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


def test_a_reader_that_takes_nothing_loses_its_peers() -> None:
    with opened(seed=1) as near, opened(seed=2, stall_s=0.2) as far:
        near.wait_lost(put_many(near, far))
        assert len(far.lane.take_events()) <= ROOM
