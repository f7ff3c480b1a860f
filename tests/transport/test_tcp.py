"""The tcp lane against peers that are not what they should be. They speak through raw sockets."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from pdx.errors import ConfigError, PeerGone
from pdx.transport import tcp_receiver, tcp_stream
from pdx.transport.api import Arrived, Copy, Event, LaneFailed, PutDone, PutFailed, Span, WindowClosed
from pdx.transport.frames import GREETING_BYTES, LANE_VERSION, Head, encode_frame_start
from pdx.transport.handshake import greet_as_connector
from pdx.transport.side import WAIT_S, Side, arrivals_of, losses_of
from pdx.transport.sockets import parse_endpoint
from pdx.transport.tcp import TcpLane

KEY = b"0123456789abcdef"


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


@contextlib.contextmanager
def opened(key: bytes | None = KEY, *, seed: int = 2, stall_s: float = 5.0) -> Iterator[Side]:
    side = Side(TcpLane("tcp://127.0.0.1:0", key=key, name=f"side{seed}", stall_s=stall_s), seed=seed)
    try:
        yield side
    finally:
        side.lane.abort()


@contextlib.contextmanager
def raw_peer(side: Side, *, greets: bool = True) -> Iterator[socket.socket]:
    with socket.create_connection(parse_endpoint(side.lane.endpoint), timeout=WAIT_S) as connection:
        if greets:
            greet_as_connector(connection, KEY)
        yield connection


def is_dropped(connection: socket.socket) -> bool:
    """Waits until the other side hangs up."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def frame_of(window: int, span: Span, *, notice: bytes = b"", is_last: bool = True) -> bytes:
    return encode_frame_start(Head(is_last, window, 1, 1, span.length, len(notice)), [span])


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [(KEY, None, "has none"), (None, KEY, "has one"), (KEY, b"another key 0123", "same key file")],
)
def test_keys_must_agree(ours: bytes | None, theirs: bytes | None, why: str) -> None:
    with opened(ours, seed=1) as near, opened(theirs) as far:
        window = far.region.open_window([Span(0, 10)])
        channel = near.lane.connect(far.lane.endpoint)
        ticket = near.put(channel, window, [Copy(0, 0, 10)], notice=b"no")
        near.wait_lost(channel)
        end = near.wait_end(ticket)
        assert isinstance(end, PutFailed)
        assert why in losses_of(near.events, channel)[0].reason
        assert far.lane.take_events() == []


def test_a_false_acceptor_gets_no_put() -> None:
    """Proof is mutual: who takes the connector's proof but has none of its own is not sent a byte more."""
    with socket.create_server(("127.0.0.1", 0)) as impostor, opened(seed=1) as near:
        impostor.settimeout(WAIT_S)
        channel = near.lane.connect(f"tcp://127.0.0.1:{impostor.getsockname()[1]}")
        near.put(channel, 1, [Copy(0, 0, 10)], notice=b"secret")
        connection, _ = impostor.accept()
        with connection:
            connection.settimeout(WAIT_S)
            header = b"PDXL" + bytes([LANE_VERSION])
            connection.recv(GREETING_BYTES, socket.MSG_WAITALL)
            connection.sendall(header + b"\x02\x01\x00" + bytes(32))
            connection.recv(GREETING_BYTES, socket.MSG_WAITALL)
            connection.sendall(header + b"\x03\x01\x00" + bytes(32))
            assert connection.recv(1) == b""
        near.wait_lost(channel)


def test_other_version_is_told() -> None:
    with opened() as far, raw_peer(far, greets=False) as connection:
        connection.sendall(b"PDXL" + bytes([LANE_VERSION + 1]) + bytes(GREETING_BYTES - 5))
        answer = connection.recv(GREETING_BYTES, socket.MSG_WAITALL)
        assert answer[:5] == b"PDXL" + bytes([LANE_VERSION])
        assert connection.recv(1) == b""


@pytest.mark.parametrize("greets", [False, True], ids=["before", "after handshake"])
def test_hostile_bytes(greets: bool) -> None:
    """Garbage costs its sender the connection and nobody else anything."""
    rng = random.Random(6)
    with opened() as far, opened(seed=1) as near:
        before = bytes(far.memory)
        window = far.region.open_window([Span(0, 100)])
        for _ in range(20):
            with raw_peer(far, greets=greets) as connection:
                with contextlib.suppress(OSError):
                    connection.sendall(rng.randbytes(100))
                assert is_dropped(connection)
        assert far.memory == before
        near.put(near.lane.connect(far.lane.endpoint), window, [Copy(0, 0, 100)], notice=b"fine")
        far.wait_arrived(b"fine")
        assert arrivals_of(far.events) == [b"fine"]


def test_mutated_frames_write_nothing_outside_the_window() -> None:
    rng = random.Random(8)
    with opened(stall_s=0.2) as far:
        before = bytes(far.memory)
        window = far.region.open_window([Span(1000, 100)])
        for _ in range(30):
            raw = bytearray(frame_of(window, Span(1000, 100), notice=b"n") + bytes(101))
            raw[rng.randrange(44)] ^= 1 << rng.randrange(8)
            with raw_peer(far) as connection:
                with contextlib.suppress(OSError):  # may be dropped before all is sent
                    connection.sendall(raw)
                    connection.shutdown(socket.SHUT_WR)
                assert is_dropped(connection)
        assert far.memory[:1000] == before[:1000]
        assert far.memory[1100:] == before[1100:]


def test_window_closes_when_the_frame_under_way_ends() -> None:
    with opened() as far:
        window = far.region.open_window([Span(0, 4096)])
        with raw_peer(far) as connection:
            connection.sendall(frame_of(window, Span(0, 4096), notice=b"n", is_last=True) + b"\xee" * 4095)
            wait_until_written(far, offset=4094, value=0xEE)
            far.region.close_window(window)
            assert far.lane.take_events() == []
            connection.sendall(b"\xeen")
            far.wait_closed(window)
            assert far.events == [Arrived(window, b"n"), WindowClosed(window)]


def test_window_closes_when_the_connection_dies_in_mid_frame() -> None:
    with opened() as far:
        window = far.region.open_window([Span(0, 4096)])
        with raw_peer(far) as connection:
            connection.sendall(frame_of(window, Span(0, 4096)) + b"\xee" * 10)
            wait_until_written(far, offset=9, value=0xEE)
            far.region.close_window(window)
            assert far.lane.take_events() == []
        far.wait_closed(window)
        assert far.events == [WindowClosed(window)]


def test_a_stalled_sender_does_not_hold_a_window() -> None:
    with opened(stall_s=0.3) as far:
        window = far.region.open_window([Span(0, 4096)])
        with raw_peer(far) as connection:
            connection.sendall(frame_of(window, Span(0, 4096)) + b"\xee" * 10)
            wait_until_written(far, offset=9, value=0xEE)
            far.region.close_window(window)
            far.wait_closed(window)
            assert is_dropped(connection)


def test_an_idle_connection_lives_on() -> None:
    with opened(stall_s=0.05) as far, opened(seed=1) as near:
        window = far.region.open_window([Span(0, 10)])
        channel = near.lane.connect(far.lane.endpoint)
        near.wait_end(near.put(channel, window, [], notice=b"one"))
        far.wait_arrived(b"one")
        select.select([near.lane.fileno()], [], [], 0.3)
        near.events += near.lane.take_events()
        assert not losses_of(near.events, channel), "six silent stall times cost the channel"
        near.put(channel, window, [], notice=b"two")
        far.wait_arrived(b"two")


def test_no_descriptor_for_one_more_peer_costs_that_peer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with opened() as far, opened(seed=1) as near:
        with monkeypatch.context() as exhausted:
            exhausted.setattr(os, "eventfd", none_left)
            with pytest.raises(PeerGone, match="Too many open files"):
                near.lane.connect(far.lane.endpoint)
        window = far.region.open_window([Span(0, 10)])
        near.put(near.lane.connect(far.lane.endpoint), window, [Copy(0, 0, 10)], notice=b"n")
        far.wait_arrived(b"n")


def test_a_put_that_ended_is_announced_though_the_next_one_was_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sending thread has seen that more is to come, and is held up before it tells of the put's end."""
    monkeypatch.setattr(tcp_stream, "ANNOUNCE_EVERY_S", 1e9)
    with opened() as far, opened(seed=1) as near:
        window = far.region.open_window([Span(0, 10)])
        mailbox = near.lane._mailbox  # type: ignore[attr-defined]
        add_quietly, is_at_the_end, may_go_on = mailbox.add_quietly, threading.Event(), threading.Event()

        def held_up(event: Event) -> None:
            if isinstance(event, PutDone):
                is_at_the_end.set()
                assert may_go_on.wait(WAIT_S)
            add_quietly(event)

        monkeypatch.setattr(mailbox, "add_quietly", held_up)
        channel = near.lane.connect(far.lane.endpoint)
        first, second = (near.put(channel, window, [Copy(0, 0, 10)], queue=b"q") for _ in range(2))
        assert is_at_the_end.wait(WAIT_S)
        near.lane.cancel(b"q")
        assert near.wait_end(second) == PutFailed(second, "cancelled")
        may_go_on.set()
        assert select.select([near.lane.fileno()], [], [], WAIT_S)[0], "nothing says so"
        assert near.wait_end(first) == PutDone(first)


def test_strangers_keep_out_each_other_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_receiver, "STRANGERS_MAX", 3)
    with opened() as far, opened(seed=1) as near, contextlib.ExitStack() as stack:
        window = far.region.open_window([Span(0, 10)])
        channel = near.lane.connect(far.lane.endpoint)
        near.put(channel, window, [], notice=b"before")
        far.wait_arrived(b"before")
        silent = [stack.enter_context(raw_peer(far, greets=False)) for _ in range(4)]
        assert is_dropped(silent[0])
        with raw_peer(far) as another:
            near.put(channel, window, [], notice=b"after")
            another.sendall(frame_of(window, Span(0, 10)) + bytes(10))
            far.wait_arrived(b"after", b"")
        assert not losses_of(near.events, channel)


def test_who_comes_when_all_places_are_taken_learns_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_receiver, "CONNECTIONS_MAX", 1)
    with opened() as far, opened(seed=1) as near, opened(seed=3) as late:
        near.put(near.lane.connect(far.lane.endpoint), far.region.open_window([]), [], notice=b"first")
        far.wait_arrived(b"first")
        channel = late.lane.connect(far.lane.endpoint)
        late.wait_lost(channel)
        assert "too many peers" in losses_of(late.events, channel)[0].reason


def test_a_listener_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as far:
        monkeypatch.setattr(tcp_receiver.TcpListener, "_accept", lambda listener: 1 / 0)
        with contextlib.suppress(ConnectionResetError), raw_peer(far, greets=False):
            pass
        far.wait("the failure", lambda events: any(isinstance(event, LaneFailed) for event in events))


def test_a_name_that_is_none_is_a_lost_peer() -> None:
    with opened() as near:
        near.wait_lost(near.lane.connect(f"tcp://{'a' * 70}:1"))
    with pytest.raises(ConfigError):
        TcpLane(f"tcp://{'a' * 70}:1", key=KEY, name="nowhere")


def wait_until_written(side: Side, *, offset: int, value: int) -> None:
    """Until the lane's thread has written this byte; there is no event for that, so ask under a deadline."""
    pause = threading.Event()
    for _ in range(int(WAIT_S / 0.005)):
        if side.memory[offset] == value:
            return
        pause.wait(0.005)
    raise AssertionError("the byte was not written in time")
