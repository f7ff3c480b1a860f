"""How channels of a one-sided lane end: not before the network has let go of what they had under way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from held_fabric import HeldFabric, wait_until
from raw_peers import opened, reader

from pdx.errors import PeerGone
from pdx.transport import attention, onesided_ending, onesided_sender, reactor
from pdx.transport.api import Copy, LaneFailed, PutDone, PutFailed, Span, WindowClosed
from pdx.transport.link_messages import Ask, Landed
from pdx.transport.side import WAIT_S, Side, ends_of, losses_of

SOME = [Copy(0, 0, 10)]


@contextmanager
def writing(fabric: HeldFabric) -> Iterator[tuple[Side, Side, int, int, int]]:
    """Near, far, near's channel to far, a window of far's and the ticket of a put that is under way into it."""
    with opened(seed=1, make_fabric=lambda: fabric) as near, opened(settle_s=1e9) as far:
        window = far.region.open_window([Span(0, 10)])
        channel = near.lane.connect(far.lane.endpoint)
        ticket = near.put(channel, window, SOME, notice=b"n")
        wait_until(lambda: bool(fabric.under_way))
        yield near, far, channel, window, ticket


def go_on(near: Side, far: Side) -> None:
    """Both lanes do something else meanwhile, from beginning to end."""
    window = far.region.open_window([])
    with reader(near) as (peer, channel):
        ticket = near.put(channel, 7, [], notice=b"")
        assert peer.next() == Ask(7)
        peer.grant_nothing(7)
        assert peer.next() == Landed(7, b"")
        assert near.wait_end(ticket) == PutDone(ticket)
    back = far.lane.connect(far.lane.endpoint)
    far.put(back, window, [], notice=b"on")
    far.wait_arrived(b"on")


def test_a_lost_channel_ends_with_its_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onesided_sender, "FLYING_PIECES_MAX", 1)
    fabric = HeldFabric()
    with writing(fabric) as (near, far, channel, window, ticket):
        waiting = near.put(channel, window, SOME)
        near.lane.break_channel(channel, "cut")  # type: ignore[attr-defined]
        assert near.wait_end(waiting) == PutFailed(waiting, "cut")
        far.region.close_window(window)
        go_on(near, far)
        assert not ends_of(near.events, ticket) and WindowClosed(window) not in far.events
        fabric.is_holding = False
        assert near.wait_end(ticket) == PutFailed(ticket, "cut")
        far.wait_closed(window)


def test_what_cannot_be_cut_off_stays_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is told, so that others take another lane; the memory is not to be reused at either end."""
    monkeypatch.setattr(onesided_ending, "PATIENCE_S", 0.0)
    monkeypatch.setattr(onesided_ending, "RETRY_S", 0.0)
    fabric = HeldFabric()
    with writing(fabric) as (near, far, channel, window, ticket):
        far.region.close_window(window)
        near.lane.break_channel(channel, "cut")  # type: ignore[attr-defined]
        near.wait_lost(channel)
        assert near.lane.connect(far.lane.endpoint) != channel
        go_on(near, far)
        assert not ends_of(near.events, ticket) and WindowClosed(window) not in far.events
        fabric.is_holding = False
        assert near.wait_end(ticket) == PutFailed(ticket, "cut")
        far.wait_closed(window)
        assert len(losses_of(near.events, channel)) == 1


def test_a_loss_is_told_before_what_is_under_way_ends() -> None:
    """At once: for as long as it is not, new handoffs take the channel."""
    fabric = HeldFabric()
    with writing(fabric) as (near, far, channel, _, ticket):
        near.lane.break_channel(channel, "cut")  # type: ignore[attr-defined]
        go_on(near, far)
        assert losses_of(near.events, channel) and not ends_of(near.events, ticket)
        assert near.lane.connect(far.lane.endpoint) != channel
        fabric.is_holding = False
        assert near.wait_end(ticket) == PutFailed(ticket, "cut")
        assert len(losses_of(near.events, channel)) == 1


def test_who_was_cut_off_says_no_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last bytes may be on their way: the window closes when they had time to come."""
    monkeypatch.setattr(onesided_ending, "PATIENCE_S", 0.0)
    fabric = HeldFabric()
    fabric.can_cut = True
    with writing(fabric) as (near, far, channel, window, ticket):
        far.region.close_window(window)
        near.lane.break_channel(channel, "cut")  # type: ignore[attr-defined]
        assert near.wait_end(ticket) == PutFailed(ticket, "cut")
        near.wait_lost(channel)
        settling = far.lane._reactor._settling  # type: ignore[attr-defined]
        wait_until(lambda: bool(settling))
        assert WindowClosed(window) not in far.lane.take_events()
        settling.update(dict.fromkeys(settling, 0))
        far.wait_closed(window)


def test_a_lane_that_closes_ends_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reactor, "WIND_DOWN_S", 0.1)
    fabric = HeldFabric()
    with writing(fabric) as (near, _, channel, _, ticket):
        near.lane.close(drain_s=0.0)
        assert near.wait_end(ticket) == PutFailed(ticket, "the lane was closed")
        assert not losses_of(near.events, channel)
        assert not fabric.under_way, "the puts ended before the fabric was closed"


def test_a_put_that_was_posted_in_part_ends_when_the_fabric_has_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can say what of it still reads the source."""
    monkeypatch.setattr(onesided_ending, "RETRY_S", 0.0)
    fabric, lets_go = HeldFabric(), threading.Event()
    fabric.failure = PeerGone("the second copy could not be posted")
    monkeypatch.setattr(fabric, "drop_peer", lambda *_: lets_go.is_set())
    with opened(seed=1, make_fabric=lambda: fabric) as near, opened() as far:
        window = far.region.open_window([Span(0, 10)])
        channel = near.lane.connect(far.lane.endpoint)
        ticket = near.put(channel, window, SOME)
        near.wait_lost(channel)
        assert not ends_of(near.events, ticket)
        lets_go.set()
        assert isinstance(near.wait_end(ticket), PutFailed)


@pytest.mark.parametrize("failure", [PeerGone("no way"), KeyError("a bug")], ids=repr)
def test_peers_that_cannot_be_written_to_cost_nobody_else_anything(failure: Exception) -> None:
    """Each is lost at once, so that the lane is never away from the others for as long as they may be silent."""
    fabric = HeldFabric()
    fabric.is_holding, fabric.failure = False, failure
    with opened(seed=1, stall_s=1.0, make_fabric=lambda: fabric) as near, opened() as far:
        window = far.region.open_window([Span(0, 10)])
        with reader(near) as (healthy, channel), reader(near) as (one, first), reader(near) as (two, second):
            asked = near.put(channel, 1, [], notice=b"n")
            assert healthy.next() == Ask(1)
            tickets = [near.put(lost, window, SOME) for lost in (first, second)]
            for peer in (one, two):
                peer.grant(window, at=far, span=Span(0, 10))
            for lost, ticket in zip((first, second), tickets, strict=True):
                near.wait_lost(lost)
                assert isinstance(near.wait_end(ticket), PutFailed)
            healthy.grant_nothing(1)
            assert near.wait_end(asked) == PutDone(asked)


def test_a_peer_that_cannot_be_served_costs_nobody_else_anything() -> None:
    fabric = HeldFabric()
    fabric.is_holding = False
    with opened(seed=1) as near, opened(make_fabric=lambda: fabric) as far:
        window = far.region.open_window([Span(0, 10)])
        channel = near.lane.connect(far.lane.endpoint)
        metadata, fabric.metadata = fabric.metadata, lambda: b"".join([0])  # type: ignore[list-item]
        ticket = near.put(channel, window, SOME)
        near.wait_lost(channel)
        assert isinstance(near.wait_end(ticket), PutFailed)
        fabric.metadata = metadata
        near.put(near.lane.connect(far.lane.endpoint), window, SOME, notice=b"again")
        far.wait_arrived(b"again")


def test_a_lane_that_fails_says_so_and_ends_every_put(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the fabric fails too; who is being greeted is hung up on."""
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    fabric = HeldFabric()
    monkeypatch.setattr(fabric, "close", lambda: 1 / 0)
    monkeypatch.setattr(fabric, "drop_peer", lambda *_: 1 / 0)
    with writing(fabric) as (near, far, channel, _, ticket), socket.create_server(("127.0.0.1", 0)) as silent:
        near.lane.connect(f"raw://127.0.0.1:{silent.getsockname()[1]}")
        greeted, _ = silent.accept()
        near.lane._reactor.call(lambda: 1 / 0)  # type: ignore[attr-defined]
        late = near.put(channel, 1, SOME)
        near.wait("the failure", lambda events: any(isinstance(event, LaneFailed) for event in events))
        assert len(losses_of(near.events, channel)) == 1
        for put in (ticket, late, near.put(channel, 1, SOME)):
            assert isinstance(near.wait_end(put), PutFailed)
        with greeted:
            greeted.settimeout(WAIT_S)
            while greeted.recv(4096):
                pass
        near.wait_lost(near.lane.connect(far.lane.endpoint))
    wait_until(lambda: not any(thread.name.endswith("-greet") for thread in threading.enumerate()))
    assert raised == []


def test_who_stood_still_does_not_say_that_others_did() -> None:
    """The lane's thread is held up for longer than a peer may take: the peer has its time from then on."""
    with opened(seed=1, stall_s=0.3) as near, reader(near) as (peer, channel):
        ticket = near.put(channel, 1, [], notice=b"n")
        assert peer.next() == Ask(1)
        held = threading.Event()
        near.lane._reactor.call(lambda: held.wait(1.0))  # type: ignore[attr-defined]
        near.lane._reactor.call(held.set)  # type: ignore[attr-defined]
        assert held.wait(10.0)
        peer.grant_nothing(1)
        assert near.wait_end(ticket) == PutDone(ticket)


class Away:
    """The clock that also counts while the host is suspended, as this lane sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._later_s = 0.0
        boot_s = attention._boot_s
        monkeypatch.setattr(attention, "_boot_s", lambda: boot_s() + self._later_s)

    def suspend(self) -> None:
        self._later_s += 10 * attention.AWAY_S


@pytest.mark.parametrize("in_mid_turn", [False, True])
def test_who_was_away_posts_nothing_more_through_what_it_was_granted(
    in_mid_turn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peers may have taken it for dead, and use their slots for others."""
    monkeypatch.setattr(onesided_sender, "FLYING_PIECES_MAX", 1)
    monkeypatch.setattr(onesided_sender, "PIECE_BYTES", 4)
    away, fabric = Away(monkeypatch), HeldFabric()
    with writing(fabric) as (near, far, channel, _, ticket):

        def resume() -> None:
            away.suspend()
            fabric.is_holding = False

        if in_mid_turn:
            near.lane._reactor.call(resume)  # type: ignore[attr-defined]
        else:
            resume()
        assert isinstance(near.wait_end(ticket), PutFailed)
        near.wait_lost(channel)
        assert "stood still" in losses_of(near.events, channel)[0].reason
        assert len(fabric.written) == 1
        assert near.lane.connect(far.lane.endpoint) != channel


def test_an_idle_channel_that_holds_a_window_is_lost_too_and_one_that_holds_none_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    away, fabric = Away(monkeypatch), HeldFabric()
    fabric.is_holding = False
    with (
        opened(seed=1, make_fabric=lambda: fabric) as near, opened() as far,
        reader(near) as (holds, first), reader(near) as (idle, second),
    ):  # fmt: skip
        done = near.put(first, 1, SOME, notice=b"n")
        holds.grant(1, at=far, span=Span(0, 10))
        assert near.wait_end(done) == PutDone(done)
        away.suspend()
        late = near.put(first, 1, SOME, notice=b"late")
        assert isinstance(near.wait_end(late), PutFailed) and len(fabric.written) == 1
        near.wait_lost(first)
        done = near.put(second, 2, SOME, notice=b"n")
        idle.grant(2, at=far, span=Span(0, 10))
        assert near.wait_end(done) == PutDone(done)
