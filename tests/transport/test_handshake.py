"""Who gets in: nothing is said to, taken from or named by a peer that has not proved the cluster key."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from lane_pairs import KEY

from pdx.errors import ConfigError
from pdx.transport.api import Copy, PutFailed, Span
from pdx.transport.frames import (
    CHALLENGE,
    GREETING_BYTES,
    HELLO,
    PROOF,
    Greeting,
    Head,
    decode_greeting,
    encode_frame_start,
    encode_greeting,
)
from pdx.transport.handshake import greet_as_connector
from pdx.transport.side import MEMORY_BYTES, WAIT_S, Side
from pdx.transport.sockets import KEEPALIVE_IDLE_S, USER_TIMEOUT_MS, parse_endpoint, tune
from pdx.transport.tcp import TcpLane

NONCE = bytes(range(32))


@contextlib.contextmanager
def opened(url: str = "tcp://127.0.0.1:0", key: bytes | None = KEY, *, seed: int = 2) -> Iterator[Side]:
    side = Side(TcpLane(url, key=key, name=f"side{seed}"), seed=seed)
    try:
        yield side
    finally:
        side.lane.abort()


def connected(side: Side) -> socket.socket:
    return socket.create_connection(parse_endpoint(side.lane.endpoint), timeout=WAIT_S)


def all_of(connection: socket.socket) -> bytes:
    """Everything that comes until the other side hangs up."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(4096):
            said += data
    return said


def frame_into(window: int) -> bytes:
    return encode_frame_start(Head(True, window, 1, 1, 100, 1), [Span(0, 100)]) + bytes(101)


def test_a_stranger_hears_a_nonce_and_no_more() -> None:
    with opened() as side:
        side.region.open_window([Span(0, 100)])
        said = []
        for _ in range(2):
            with connected(side) as connection:
                connection.sendall(encode_greeting(Greeting(HELLO, True, NONCE)))
                connection.sendall(encode_greeting(Greeting(PROOF, True, bytes(32))))
                said.append(all_of(connection))
        challenges = [decode_greeting(raw, kind=CHALLENGE) for raw in said]
        assert challenges[0].secret != challenges[1].secret


def test_frames_without_a_proof_are_not_taken() -> None:
    with opened() as side:
        before = bytes(side.memory)
        window = side.region.open_window([Span(0, MEMORY_BYTES)])
        for greeting in (b"", encode_greeting(Greeting(HELLO, True, NONCE))):
            with connected(side) as connection:
                connection.sendall(greeting + 3 * frame_into(window))
                assert len(all_of(connection)) <= GREETING_BYTES
        assert (side.lane.take_events(), side.memory) == ([], before)


def test_a_session_that_was_listened_to_cannot_be_repeated() -> None:
    with opened() as side:
        window = side.region.open_window([Span(0, 100)])
        with connected(side) as connection:
            recorded = Recorder(connection)
            greet_as_connector(recorded, KEY)  # type: ignore[arg-type]
            connection.sendall(frame_into(window))
            side.wait_arrived(b"\0")
        side.events.clear()
        side.memory[:100] = b"\xee" * 100
        with connected(side) as connection:
            connection.sendall(recorded.sent + frame_into(window))
            all_of(connection)
        assert (side.lane.take_events(), side.memory[:100]) == ([], b"\xee" * 100)


def test_a_proof_that_is_sent_back_proves_nothing() -> None:
    """Roles are in what is signed."""
    with socket.create_server(("127.0.0.1", 0)) as mirror, opened(seed=1) as near:
        mirror.settimeout(WAIT_S)
        channel = near.lane.connect(f"tcp://127.0.0.1:{mirror.getsockname()[1]}")
        ticket = near.put(channel, 1, [Copy(0, 0, 10)], notice=b"secret")
        connection, _ = mirror.accept()
        with connection:
            connection.settimeout(WAIT_S)
            hello = decode_greeting(connection.recv(GREETING_BYTES, socket.MSG_WAITALL), kind=HELLO)
            connection.sendall(encode_greeting(Greeting(CHALLENGE, True, hello.secret)))
            connection.sendall(connection.recv(GREETING_BYTES, socket.MSG_WAITALL))
            assert all_of(connection) == b""
        assert isinstance(near.wait_end(ticket), PutFailed)


@pytest.mark.parametrize("url", ["tcp://0.0.0.0:0", "tcp://[::]:0", "tcp://192.0.2.1:0", "tcp://localhost.example:0"])
def test_off_loopback_nothing_starts_without_a_key(url: str) -> None:
    with pytest.raises(ConfigError, match="cluster key"):
        TcpLane(url, key=None, name="test")


def test_ipv6() -> None:
    with contextlib.ExitStack() as stack:
        try:
            near, far = (stack.enter_context(opened("tcp://[::1]:0", None, seed=seed)) for seed in (1, 2))
        except ConfigError as error:
            pytest.skip(f"this machine has no IPv6: {error}")
        assert far.lane.endpoint.startswith("tcp://[::1]:")
        window = far.region.open_window([Span(0, MEMORY_BYTES)])
        near.put(near.lane.connect(far.lane.endpoint), window, [Copy(0, 0, MEMORY_BYTES)], notice=b"six")
        far.wait_arrived(b"six")
        assert far.memory == near.memory


def test_dead_hosts_are_noticed_by_the_kernel() -> None:
    with socket.socket() as connection:
        tune(connection, 1.5)
        tcp = socket.IPPROTO_TCP
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert connection.getsockopt(tcp, socket.TCP_KEEPIDLE) == KEEPALIVE_IDLE_S
        assert connection.getsockopt(tcp, socket.TCP_USER_TIMEOUT) == USER_TIMEOUT_MS


class Recorder:
    """A connection that keeps what is sent through it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.sent = b""

    def sendall(self, data: bytes) -> None:
        self.sent += data
        self._connection.sendall(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._connection, name)
