"""One-sided lanes against peers that are not what they should be. They speak through raw links, without any library."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
from held_fabric import HeldFabric, wait_until
from lane_pairs import KEY, example_fabric
from raw_peers import opened, reader, writer

from pdx.errors import ConfigError, TransportError, WireError
from pdx.transport import link, onesided_door, onesided_ending, reactor
from pdx.transport.api import Arrived, Copy, PutDone, PutFailed, Span, WindowClosed
from pdx.transport.link import Link
from pdx.transport.link_messages import (
    MESSAGE_BYTES_MAX,
    Ask,
    Bye,
    Drained,
    Granted,
    Landed,
    LinkMessage,
    MessageStream,
    Shut,
    Unknown,
    encode,
)
from pdx.transport.onesided import OneSidedLane
from pdx.transport.side import WAIT_S, losses_of
from pdx.transport.sockets import parse_endpoint

SAMPLES: list[LinkMessage] = [
    Ask(1),
    Granted(2, 4096, 100, "DRAM", 0, [Span(0, 10), Span(50, 50)], b"key"),
    Unknown(3),
    Landed((1 << 64) - 1, b"notice"),
    Shut(0),
    Drained(7),
    Bye(),
]


def test_nothing_is_told_but_to_who_names_an_open_window() -> None:
    with opened() as side, writer(side) as peer:
        window = side.region.open_window([Span(100, 50), Span(150, 50)])
        peer.link.send(Ask(window ^ 1))
        assert peer.next() == Unknown(window ^ 1)
        peer.link.send(Ask(window))
        granted = peer.next()
        assert isinstance(granted, Granted) and granted.spans == [Span(100, 100)] and granted.metadata


def test_a_window_stays_until_its_writer_has_drained() -> None:
    with opened() as side, writer(side) as peer:
        window = side.region.open_window([Span(0, 100)])
        peer.link.send(Ask(window))
        peer.next()
        side.region.close_window(window)
        assert peer.next() == Shut(window)
        peer.link.send(Landed(window, b"last"))
        side.wait_arrived(b"last")
        assert WindowClosed(window) not in side.events
        peer.link.send(Drained(window))
        side.wait_closed(window)
        assert side.events == [Arrived(window, b"last"), WindowClosed(window)]
        peer.link.send(Landed(window, b"too late"))
        assert peer.is_dropped()


@pytest.mark.parametrize("settle_s", [1e9, 0.0, 0.2], ids=["orderly", "without a word", "after a while"])
def test_a_window_closes_when_its_writer_is_gone(settle_s: float) -> None:
    with opened(settle_s=settle_s) as side:
        window = side.region.open_window([Span(0, 100)])
        with writer(side) as peer:
            peer.link.send(Ask(window))
            peer.next()
            side.region.close_window(window)
            if settle_s == 1e9:
                peer.link.send(Bye())
        side.wait_closed(window)
        assert side.events == [WindowClosed(window)]


@pytest.mark.parametrize("message", [Ask(1), Drained(1), Bye()], ids=repr)
def test_who_says_more_than_bye_may_still_write(message: LinkMessage) -> None:
    with opened(settle_s=1e9) as side:
        window = side.region.open_window([Span(0, 100)])
        with writer(side) as peer:
            peer.link.send(Ask(window))
            assert isinstance(peer.next(), Granted)
            peer.link.send(Bye())
            peer.link.send(message)
            assert peer.is_dropped()
        side.region.close_window(window)
        wait_until(lambda: bool(side.lane._reactor._settling))  # type: ignore[attr-defined]
        assert side.lane.take_events() == []


def test_a_dropped_writer_keeps_its_window_until_it_has_hung_up_too() -> None:
    with opened() as side:
        window = side.region.open_window([Span(0, 100)])
        with writer(side) as peer:
            peer.link.send(Ask(window))
            peer.next()
            peer.link.send(Shut(window))
            assert peer.is_dropped()
            side.region.close_window(window)
            peer.link.send(Drained(window))  # not heard any more
            # For longer than a peer that has left is waited for: this one has not, and may be writing.
            deadline_s = time.monotonic() + 3 * reactor.TICK_S
            while (left_s := deadline_s - time.monotonic()) > 0:
                select.select([side.lane.fileno()], [], [], left_s)
                side.events += side.lane.take_events()
            assert side.events == []
        side.wait_closed(window)


def test_what_a_peer_did_not_take_at_once_is_sent_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else happens meanwhile that would wake the lane."""
    with opened() as side, writer(side) as peer:
        flush, held = Link.flush, []

        def full_at_first(link: Link) -> None:
            if link is not peer.link and link.unsent_bytes and not held:
                held.append(link.unsent_bytes)
                return
            flush(link)

        window = side.region.open_window([Span(100, 50)])
        monkeypatch.setattr(Link, "flush", full_at_first)
        peer.link.send(Ask(window))
        assert isinstance(peer.next(), Granted)
        assert held > [0]


def test_no_thread_for_one_more_peer_costs_that_peer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with opened() as side, reader(side) as (_, channel):
        with monkeypatch.context() as exhausted:
            exhausted.setattr(threading.Thread, "start", start)
            lost = side.lane.connect("raw://127.0.0.1:9")
            side.wait_lost(lost)
        assert "no more connections" in losses_of(side.events, lost)[0].reason
        assert not losses_of(side.events, channel)


@pytest.mark.parametrize(
    "message", [Landed(5, b"never granted"), Granted(1, 0, 1, "DRAM", 0, [], b""), Unknown(1), Shut(1)], ids=repr
)
def test_a_writer_that_says_what_it_may_not_is_dropped(message: LinkMessage) -> None:
    with opened() as side, writer(side) as peer:
        peer.link.send(message)
        assert peer.is_dropped()
        assert side.lane.take_events() == []


@pytest.mark.parametrize(
    "message",
    [
        Ask(1),
        Landed(1, b""),
        Shut(1),
        Shut(99),
        Granted(99, 0, 10, "DRAM", 0, [], b"1"),  # not asked for
        Granted(1, 4096, 10, "DRAM", 0, [Span(5, 6)], b"1"),
        Granted(1, (1 << 64) - 1, 10, "DRAM", 0, [], b"1"),
        Granted(1, 4096, 10, "DRAM", 0, [Span(0, 10)], b"no such process"),
        Granted(1, 4096, 10, "DRAM", 0, [Span(0, 10)], b""),
    ],
    ids=["ask", "landed", "shut", "shut unasked", "unasked", "outside", "overflow", "metadata", "no metadata"],
)
def test_a_reader_that_says_what_it_may_not_costs_only_its_channel(message: LinkMessage) -> None:
    with opened() as side, reader(side) as (peer, channel):
        ticket = side.put(channel, 1, [Copy(0, 0, 10)], notice=b"n")
        assert peer.next() == Ask(1)
        peer.link.send(message)
        side.wait_lost(channel)
        assert isinstance(side.wait_end(ticket), PutFailed)


def test_a_reader_that_does_not_answer_costs_a_stall_time() -> None:
    with opened(stall_s=0.3) as side, reader(side) as (peer, channel):
        ticket = side.put(channel, 1, [Copy(0, 0, 10)], notice=b"n")
        assert peer.next() == Ask(1)
        side.wait_lost(channel)
        assert isinstance(side.wait_end(ticket), PutFailed)
        assert "did not move" in losses_of(side.events, channel)[0].reason


def test_the_sender_asks_once_and_says_when_it_has_drained() -> None:
    with opened(seed=1) as side, opened() as target, reader(side) as (peer, channel):
        tickets = [side.put(channel, 1, [Copy(0, 0, 10)], notice=b"%d" % n) for n in range(3)]
        peer.grant(1, at=target, span=Span(0, 10))
        assert [peer.next() for _ in tickets] == [Landed(1, b"%d" % n) for n in range(3)]
        assert [side.wait_end(ticket) for ticket in tickets] == [PutDone(ticket) for ticket in tickets]
        assert target.memory[:10] == side.memory[:10]
        peer.link.send(Shut(1))
        assert peer.next() == Drained(1)
        late = side.put(channel, 1, [Copy(0, 0, 10)], notice=b"late")
        assert peer.next() == Ask(1)
        peer.link.send(Unknown(1))
        assert isinstance(side.wait_end(late), PutFailed)
        assert not losses_of(side.events, channel)


def test_what_a_peer_has_registered_since_is_told_to_the_fabric(monkeypatch: pytest.MonkeyPatch) -> None:
    """One add_peer() a channel, since its end is one drop_peer()."""
    fabric, calls = HeldFabric(), []
    fabric.is_holding = False
    add_peer = fabric.add_peer
    monkeypatch.setattr(fabric, "add_peer", lambda metadata: (calls.append("add"), add_peer(metadata))[1])
    monkeypatch.setattr(fabric, "update_peer", lambda peer, metadata: calls.append("update"))
    with opened(seed=1, make_fabric=lambda: fabric) as side, opened() as target, reader(side) as (peer, channel):
        for window in (1, 2):
            ticket = side.put(channel, window, [Copy(0, 0, 10)], notice=b"n")
            peer.grant(window, at=target, span=Span(0, 10))
            assert side.wait_end(ticket) == PutDone(ticket)
            assert peer.next() == Landed(window, b"n")
        assert calls == ["add", "update"]


@pytest.mark.parametrize("flies", [False, True])
def test_a_window_that_was_granted_is_not_unknown(flies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A put may be under way through it: this costs the channel, and the channel only."""
    monkeypatch.setattr(onesided_ending, "PATIENCE_S", 0.0)
    fabric = HeldFabric()
    fabric.is_holding, fabric.can_cut = flies, True
    with opened(seed=1, make_fabric=lambda: fabric) as side, opened() as target, reader(side) as (peer, channel):
        side.put(channel, 1, [Copy(0, 0, 10)], notice=b"n")
        peer.grant(1, at=target, span=Span(0, 10))
        if flies:
            wait_until(lambda: bool(fabric.under_way))
        else:
            assert peer.next() == Landed(1, b"n")
        peer.link.send(Unknown(1))
        side.wait_lost(channel)
        with reader(side) as (other, another):
            side.put(another, 2, [Copy(0, 0, 10)], notice=b"m")
            assert other.next() == Ask(2), "the lane lives"


@pytest.mark.parametrize(("ours", "theirs"), [(KEY, None), (None, KEY), (KEY, b"another key 0123")])
def test_keys_must_agree(ours: bytes | None, theirs: bytes | None) -> None:
    with opened(ours, seed=1) as near, opened(theirs) as far:
        window = far.region.open_window([Span(0, 10)])
        channel = near.lane.connect(far.lane.endpoint)
        ticket = near.put(channel, window, [Copy(0, 0, 10)], notice=b"no")
        near.wait_lost(channel)
        assert isinstance(near.wait_end(ticket), PutFailed)
        assert far.lane.take_events() == []


def test_off_loopback_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="cluster key"):
        OneSidedLane("raw://192.0.2.1:0", scheme="raw", key=None, name="test", make_fabric=example_fabric)


def test_a_fabric_that_cannot_be_had_leaves_nothing_behind() -> None:
    def absent() -> None:
        raise TransportError("no such library")

    with pytest.raises(TransportError, match="no such library"):
        OneSidedLane("raw://127.0.0.1:0", scheme="raw", key=None, name="test", make_fabric=absent)  # type: ignore


@pytest.mark.parametrize("has_drained", [False, True])
def test_who_asks_again_for_what_it_was_granted_is_dropped(has_drained: bool) -> None:
    """The answer may be a thousand times as large as the question."""
    with opened() as side, writer(side) as peer:
        window = side.region.open_window([Span(0, 100)])
        peer.link.send(Ask(window))
        assert isinstance(peer.next(), Granted)
        if has_drained:
            peer.link.send(Drained(window))
        peer.link.send(Ask(window))
        assert peer.is_dropped()


def test_who_has_drained_may_ask_for_a_window_that_others_keep_from_closing() -> None:
    """As a sender does that has one more put for it."""
    with opened() as side, writer(side) as peer, writer(side) as other:
        window = side.region.open_window([Span(0, 100)])
        for one in (peer, other):
            one.link.send(Ask(window))
            assert isinstance(one.next(), Granted)
        side.region.close_window(window)
        assert peer.next() == Shut(window)
        peer.link.send(Drained(window))
        peer.link.send(Ask(window))
        assert peer.next() == Unknown(window)


def limit_buffers(end: socket.socket) -> None:
    for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        end.setsockopt(socket.SOL_SOCKET, buffer, 32 << 10)


def test_who_takes_no_answers_is_not_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CONGESTED_BYTES", 1000)
    question, asked_bytes = encode(Ask(1)), 0
    with opened() as side, contextlib.ExitStack() as stack:
        listening = side.lane._reactor._door._listening  # type: ignore[attr-defined]
        limit_buffers(listening)  # and those of all that are accepted
        peer = stack.enter_context(writer(side))
        connection, rest, answers = peer.link._socket, b"", 0
        limit_buffers(connection)
        while select.select([], [connection], [], 0.3)[1]:
            rest = rest or question * 4096
            sent_bytes = connection.send(rest)
            rest, asked_bytes = rest[sent_bytes:], asked_bytes + sent_bytes
            assert asked_bytes < 8 << 20, "it takes whatever it is asked"
        while answers < asked_bytes // len(question):
            assert select.select([connection], [], [], WAIT_S)[0], "it does not go on"
            answers += len(peer.link.receive())
        window = side.region.open_window([Span(0, 100)])
        other = stack.enter_context(writer(side))
        other.link.send(Ask(window))
        assert isinstance(other.next(), Granted)


def test_who_takes_a_little_now_and_then_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there is always something that it has not taken yet."""
    clock = SimpleNamespace(now_s=0.0, monotonic=lambda: clock.now_s)
    monkeypatch.setattr(link, "time", clock)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        limit_buffers(ours)
        theirs.settimeout(WAIT_S)
        sending = Link(ours)
        for _ in range(16):
            sending.send(Landed(1, bytes(60_000)))
        for clock.now_s in range(4, 40, 4):
            assert theirs.recv(60_000)
            sending.flush()
            assert sending.unsent_bytes and not sending.is_stuck(clock.now_s + 4, 5.0)
        assert sending.is_stuck(clock.now_s + 6, 5.0)
        while sending.unsent_bytes:
            assert theirs.recv(60_000)
            sending.flush()
        assert not sending.is_stuck(clock.now_s + 6, 5.0)


def test_who_comes_when_all_places_are_taken_learns_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onesided_door, "LINKS_MAX", 1)
    with opened() as side, opened(seed=1) as late, writer(side) as peer:
        peer.link.send(Ask(1))
        assert peer.next() == Unknown(1)
        channel = late.lane.connect(side.lane.endpoint)
        late.wait_lost(channel)
        assert "too many peers" in losses_of(late.events, channel)[0].reason


def test_strangers_keep_out_each_other_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onesided_door, "STRANGERS_MAX", 3)
    with opened() as side, writer(side) as peer, contextlib.ExitStack() as stack:
        peer.link.send(Ask(1))
        assert peer.next() == Unknown(1)
        address = parse_endpoint(side.lane.endpoint, scheme="raw")
        silent = [stack.enter_context(socket.create_connection(address, timeout=WAIT_S)) for _ in range(4)]
        assert silent[0].recv(1) == b""
        with writer(side) as other:
            for one in (peer, other):
                one.link.send(Ask(1))
                assert one.next() == Unknown(1)


def test_a_name_that_is_none_is_a_lost_peer() -> None:
    with opened() as side:
        for endpoint in (f"raw://{'a' * 70}:1", "raw://a..b:1"):
            side.wait_lost(side.lane.connect(endpoint))


def test_messages_survive_any_cut() -> None:
    raw = b"".join(encode(message) for message in SAMPLES)
    rng = random.Random(1)
    for _ in range(50):
        cuts = [0, *sorted(rng.sample(range(len(raw)), 5)), len(raw)]
        stream = MessageStream()
        got = [message for start, end in pairwise(cuts) for message in stream.feed(raw[start:end])]
        assert got == SAMPLES


def test_garbage_is_a_wire_error_and_nothing_else() -> None:
    rng = random.Random(2)
    raw = b"".join(encode(message) for message in SAMPLES)
    for _ in range(2000):
        spoilt = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        with contextlib.suppress(WireError):
            MessageStream().feed(bytes(spoilt))
    for length in (0, MESSAGE_BYTES_MAX + 1, 0xFFFFFFFF):
        with pytest.raises(WireError):
            MessageStream().feed(length.to_bytes(4, "little"))
