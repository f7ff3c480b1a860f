"""What a one-sided lane does in one turn: what its owner has asked for comes before what a peer says."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from held_fabric import wait_until
from raw_peers import RawPeer, opened, writer

from pdx.transport.api import Span, WindowClosed
from pdx.transport.link import Link
from pdx.transport.link_messages import Ask, Granted, LinkMessage, Shut, Unknown, encode
from pdx.transport.side import WAIT_S, Side


@contextlib.contextmanager
def in_one_turn(side: Side, peer: RawPeer) -> Iterator[Callable[[LinkMessage], None]]:
    """What is done in here, and what the peer says by this, the lane finds together, when the turn's commands ran."""
    lane, ran, may_go_on = side.lane._reactor, threading.Event(), threading.Event()  # type: ignore[attr-defined]
    run_commands, said = lane._run_commands, encode(Ask(2))

    def held_up() -> None:
        run_commands()
        ran.set()
        assert may_go_on.wait(WAIT_S)

    def say(message: LinkMessage) -> None:
        nonlocal said
        said += encode(message)
        peer.link.send(message)
        wait_until(lambda: connection.recv(1 << 16, socket.MSG_PEEK) == said)

    peer.link.send(Ask(1))
    assert peer.next() == Unknown(1)
    (party,) = lane._inbound.values()
    connection = party.link._socket
    lane._run_commands = held_up
    try:
        peer.link.send(Ask(2))
        assert ran.wait(WAIT_S)
        yield say
    finally:
        lane._run_commands = run_commands
        may_go_on.set()


def test_a_window_is_open_for_who_asks_in_the_turn_in_which_it_was_opened() -> None:
    with opened() as side, writer(side) as peer:
        with in_one_turn(side, peer) as say:
            window = side.region.open_window([Span(0, 100)])
            say(Ask(window))
        assert peer.next() == Unknown(2)
        assert isinstance(peer.next(), Granted)


def test_who_is_lost_in_that_turn_is_not_heard_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    send = Link.send

    def broken(link: Link, message: LinkMessage) -> None:
        if isinstance(message, Shut):
            raise BrokenPipeError
        send(link, message)

    # The first is closed when that peer is sure to write no more: behind the second, which nobody may write into.
    with opened(settle_s=2.0) as side, writer(side) as peer:
        first, second = (side.region.open_window([Span(0, 100)]) for _ in range(2))
        peer.link.send(Ask(first))
        assert isinstance(peer.next(), Granted)
        monkeypatch.setattr(Link, "send", broken)
        with in_one_turn(side, peer) as say:
            side.region.close_window(first)
            say(Ask(second))
        assert peer.is_dropped()
        side.region.close_window(second)
        for window in (first, second):
            side.wait_closed(window)
        assert side.events == [WindowClosed(second), WindowClosed(first)]
