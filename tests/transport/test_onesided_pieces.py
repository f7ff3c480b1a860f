"""Puts of a one-sided lane go piece by piece: what is urgent waits for what is posted, and for nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from held_fabric import HeldFabric, wait_until
from raw_peers import RawPeer, opened, reader

from pdx.transport import onesided_sender
from pdx.transport.api import Copy, PutDone, PutFailed, Span
from pdx.transport.link_messages import Drained, Landed, Shut
from pdx.transport.side import MEMORY_BYTES, WAIT_S, Side, ends_of, losses_of

PIECE_BYTES = 1000
BIG = [Copy(0, 0, 1500), Copy(2000, 2000, 3500)]


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch) -> HeldFabric:
    """Of a lane that posts one piece at a time."""
    monkeypatch.setattr(onesided_sender, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(onesided_sender, "FLYING_PIECES_MAX", 1)
    return HeldFabric()


Way = tuple[Side, Side, RawPeer, int]


@pytest.fixture
def way(fabric: HeldFabric) -> Iterator[Way]:
    """A side, the side whose memory is granted, the peer that grants it, and the channel to that peer."""
    with opened(seed=1, make_fabric=lambda: fabric) as side, opened() as target, reader(side) as (peer, channel):
        yield side, target, peer, channel
        fabric.is_holding = False


def post(way: Way, fabric: HeldFabric, *, pieces: int = 1) -> int:
    side, target, peer, channel = way
    ticket = side.put(channel, 1, BIG, notice=b"big", queue=b"big")
    peer.grant(1, at=target, span=Span(0, MEMORY_BYTES))
    wait_until(lambda: len(fabric.written) == pieces)
    return ticket


def test_the_urgent_overtakes_between_pieces(way: Way, fabric: HeldFabric) -> None:
    side, target, peer, channel = way
    big = post(way, fabric)
    urgent = side.put(channel, 1, [Copy(7000, 7000, 10)], notice=b"urgent", queue=b"urgent", urgency=1.0)
    side.put(channel, 1, [], notice=b"behind", queue=b"big")
    heard = threading.Event()
    side.lane._reactor.call(heard.set)  # type: ignore[attr-defined]
    assert heard.wait(WAIT_S)
    fabric.is_holding = False
    assert [peer.next() for _ in range(3)] == [Landed(1, b"urgent"), Landed(1, b"big"), Landed(1, b"behind")]
    assert side.wait_end(big) == PutDone(big) and side.wait_end(urgent) == PutDone(urgent)
    assert [[copy.length for copy in piece] for piece in fabric.written] == [
        [1000], [10], [500, 500], [1000], [1000], [1000],
    ]  # fmt: skip
    assert target.memory[2000:5500] == side.memory[2000:5500] and target.memory[:1500] == side.memory[:1500]


@pytest.mark.parametrize("by", ["cancel", "shut"])
def test_what_has_begun_ends_with_its_piece(way: Way, fabric: HeldFabric, by: str) -> None:
    side, _, peer, channel = way
    begun = post(way, fabric)
    waiting = side.put(channel, 1, BIG, notice=b"waits", queue=b"big")
    if by == "cancel":
        side.lane.cancel(b"big")
    else:
        peer.link.send(Shut(1))
    assert isinstance(side.wait_end(waiting), PutFailed)
    assert not ends_of(side.events, begun), "its source may be read"
    fabric.is_holding = False
    assert isinstance(side.wait_end(begun), PutFailed)
    assert len(fabric.written) == 1
    if by == "shut":
        assert peer.next() == Drained(1)


def test_a_shut_window_takes_nothing_more(way: Way, fabric: HeldFabric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onesided_sender, "FLYING_PIECES_MAX", 5)
    side, _, peer, channel = way
    big = post(way, fabric, pieces=5)
    queued = side.put(channel, 1, [], queue=b"other")
    peer.link.send(Shut(1))
    assert isinstance(side.wait_end(queued), PutFailed)
    monkeypatch.setattr(onesided_sender, "FLYING_PIECES_MAX", 8)
    late = side.put(channel, 1, [Copy(0, 0, 10)], queue=b"another")
    assert isinstance(side.wait_end(late), PutFailed)
    assert not ends_of(side.events, big) and len(fabric.written) == 5
    fabric.is_holding = False
    assert peer.next() == Landed(1, b"big")
    assert peer.next() == Drained(1)
    assert side.wait_end(big) == PutDone(big) and not losses_of(side.events, channel)
