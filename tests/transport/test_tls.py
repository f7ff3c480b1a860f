"""The tcp lane under TLS 1.3: the whole suite, and who is turned away."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from lane_pairs import KEY, OpenPair

pytest.importorskip("cryptography", reason="cryptography is not installed: it makes the certificates of these tests")

from benchmarks.harness.certificates import Authority
from pdx import config
from pdx.errors import ConfigError, PeerGone, WireError
from pdx.transport.api import Copy, PutFailed, Span
from pdx.transport.conformance import CHECKS, Check
from pdx.transport.frames import FRAME_BYTES_MAX, Head, encode_frame_start
from pdx.transport.handshake import greet_as_connector
from pdx.transport.registry import open_lane
from pdx.transport.side import MEMORY_BYTES, WAIT_S, Side, losses_of
from pdx.transport.sockets import Pipe, parse_endpoint, send_exactly, tune
from pdx.transport.tcp import TcpLane
from pdx.transport.tls import LaneTls, TlsFiles

URL = "tcp://127.0.0.1:0"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return Authority(tmp_path_factory.mktemp("ours")).issue("host")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """Of another authority."""
    return Authority(tmp_path_factory.mktemp("theirs")).issue("host")


@contextlib.contextmanager
def opened(tls: LaneTls | None, *, seed: int = 2, stall_s: float = 5.0) -> Iterator[Side]:
    side = Side(TcpLane(URL, key=KEY, name=f"side{seed}", tls=tls, stall_s=stall_s), seed=seed)
    try:
        yield side
    finally:
        side.lane.abort()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_lane(files: TlsFiles, check: Check) -> None:
    @contextlib.contextmanager
    def pair() -> Iterator[OpenPair]:
        open_one: Callable[[str], TcpLane] = partial(TcpLane, key=KEY, name="test", tls=LaneTls(files), streams=2)
        opened_pair = OpenPair(open_one, near=URL, far=URL)
        try:
            yield opened_pair
        finally:
            opened_pair.abort()

    check(pair)


@pytest.mark.parametrize("who", ["plain near", "plain far", "stranger near", "stranger far"])
def test_who_has_no_certificate_of_ours_moves_nothing(files: TlsFiles, strangers: TlsFiles, who: str) -> None:
    ours, other = LaneTls(files), None if "plain" in who else LaneTls(strangers)
    near_tls, far_tls = (other, ours) if "near" in who else (ours, other)
    with opened(near_tls, seed=1) as near, opened(far_tls) as far:
        window = far.region.open_window([Span(0, 10)])
        before = bytes(far.memory[:10])
        channel = near.lane.connect(far.lane.endpoint)
        ticket = near.put(channel, window, [Copy(0, 0, 10)], notice=b"no")
        near.wait_lost(channel)
        assert isinstance(near.wait_end(ticket), PutFailed)
        assert (far.lane.take_events(), far.memory[:10]) == ([], before)
        if near_tls is not None and who != "stranger near":
            assert "TLS 1.3" in losses_of(near.events, channel)[0].reason


def test_older_versions_are_refused(files: TlsFiles) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(files.certificate, files.key)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with opened(LaneTls(files)) as far:
        with socket.create_connection(parse_endpoint(far.lane.endpoint), timeout=WAIT_S) as connection:
            with pytest.raises(ssl.SSLError, match=r"(?i)version"):
                context.wrap_socket(connection)


def test_without_a_certificate_of_its_own_a_client_is_refused(files: TlsFiles) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(files.authority)
    with opened(LaneTls(files)) as far:
        with socket.create_connection(parse_endpoint(far.lane.endpoint), timeout=WAIT_S) as connection:
            # A client of TLS 1.3 believes that it is done before the server has judged it.
            with pytest.raises(ssl.SSLError, match=r"(?i)certificate required"):
                with context.wrap_socket(connection) as wrapped:
                    wrapped.recv(1)


def test_bytes_on_the_wire_are_not_those_that_were_put(files: TlsFiles) -> None:
    with opened(LaneTls(files)) as far, opened(LaneTls(files), seed=1) as near, Tap(far.lane.endpoint) as tap:
        near.memory[: 1 << 20] = bytes(1 << 20)
        window = far.region.open_window([Span(0, MEMORY_BYTES)])
        near.put(near.lane.connect(tap.endpoint), window, [Copy(0, 0, 1 << 20)], notice=b"a notice in the clear")
        far.wait_arrived(b"a notice in the clear")
        seen = bytes(tap.seen)
    assert len(seen) > 1 << 20
    assert b"PDXL" not in seen and b"in the clear" not in seen and bytes(64) not in seen


def test_a_handshake_that_drips_ends_in_time(files: TlsFiles) -> None:
    """Each byte alone would come in time; the whole does not."""
    with opened(LaneTls(files), stall_s=0.3) as far:
        with socket.create_connection(parse_endpoint(far.lane.endpoint), timeout=WAIT_S) as connection:
            connection.settimeout(0.05)
            client_hello = b"\x16\x03\x01\x02\x00\x01" + bytes(200)
            for byte in client_hello:
                try:
                    connection.send(bytes([byte]))
                    if not connection.recv(64):
                        break
                except TimeoutError:
                    continue
                except ConnectionError:
                    break
            else:
                pytest.fail("200 bytes, 0.05 s apart, were waited for")


def test_a_record_that_drips_does_not_hold_a_window(files: TlsFiles) -> None:
    with opened(LaneTls(files), stall_s=0.3) as far:
        window = far.region.open_window([Span(0, 4096)])
        with socket.create_connection(parse_endpoint(far.lane.endpoint), timeout=WAIT_S) as connection:
            pipe = LaneTls(files).pipe(connection, is_acceptor=False)
            pipe.shake_hands(WAIT_S)
            greet_as_connector(pipe, KEY)
            pipe.sendall(encode_frame_start(Head(True, window, 1, 1, 4096, 0), [Span(0, 4096)]))
            pipe._tls.write(bytes(4096))
            for byte in pipe._outgoing.read():
                try:
                    connection.send(bytes([byte]))
                except ConnectionError:
                    break
                if select.select([connection], [], [], 0.05)[0]:
                    break
            else:
                pytest.fail("a record of 4 KiB, 0.05 s for each byte, was waited for")
            far.region.close_window(window)
            far.wait_closed(window)


@pytest.mark.parametrize("absent", ["certificate", "key", "authority"])
def test_files_that_are_not_there_are_named(files: TlsFiles, tmp_path: Path, absent: str) -> None:
    named = {name: getattr(files, name) for name in ("certificate", "key", "authority")} | {absent: tmp_path / "none"}
    with pytest.raises(ConfigError, match="none"):
        LaneTls(TlsFiles(**named))


def test_a_key_of_another_certificate_is_refused(files: TlsFiles, strangers: TlsFiles) -> None:
    with pytest.raises(ConfigError):
        LaneTls(TlsFiles(files.certificate, strangers.key, files.authority))


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    files = Authority(tmp_path).issue("host")
    files.key.chmod(0o640)
    with pytest.raises(ConfigError, match="readable by others"):
        LaneTls(files)


@pytest.mark.parametrize("given", ["tls_cert", "tls_key", "tls_ca"])
def test_settings_want_all_or_none(given: str) -> None:
    with pytest.raises(ConfigError, match="all of tls_cert"):
        config.load({given: "a.pem"}, environ={})


def test_only_tcp_encrypts(files: TlsFiles) -> None:
    with pytest.raises(ConfigError, match="only tcp"):
        open_lane("nixl://127.0.0.1:0", key=KEY, name="test", tls=LaneTls(files))


def test_a_peer_that_hangs_up_in_the_handshake_is_a_wire_error(files: TlsFiles) -> None:
    one, other = socket.socketpair()
    other.close()
    with one, pytest.raises(WireError, match="did not finish"):
        LaneTls(files).pipe(one, is_acceptor=True).shake_hands(1.0)


class Tap:
    """A listener between two lanes that passes on and keeps what comes."""

    def __init__(self, endpoint: str) -> None:
        self._target = parse_endpoint(endpoint)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self.seen = bytearray()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Tap:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()
        for connection in self._ends:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(WAIT_S)

    def _run(self) -> None:
        near, _ = self._listening.accept()
        far = socket.create_connection(self._target)
        self._ends = (near, far)
        with near, far, contextlib.suppress(ConnectionResetError):
            while True:
                ready, _, _ = select.select([near, far], [], [], WAIT_S)
                for source in ready:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    if source is near:
                        self.seen += data
                    (far if source is near else near).sendall(data)


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_a_reader_that_takes_a_frame_in_drips_is_not_waited_for(files: TlsFiles, is_encrypted: bool) -> None:
    """Every call moves some bytes; but a window, or a cancel, waits for the end of the frame."""
    has_ended = threading.Event()

    def pipe_of(connection: socket.socket, *, is_acceptor: bool) -> Pipe:
        tune(connection, 0.3)
        if not is_encrypted:
            return connection
        pipe = LaneTls(files).pipe(connection, is_acceptor=is_acceptor)
        pipe.shake_hands(WAIT_S)
        return pipe

    def drip() -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            pipe_of(connection, is_acceptor=True)
            deadline_s = time.monotonic() + 6.0
            while time.monotonic() < deadline_s and not has_ended.wait(0.01):
                connection.recv(8 << 10)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
        reader = threading.Thread(target=drip)
        reader.start()
        try:
            with socket.create_connection(listening.getsockname()) as connection:
                pipe = pipe_of(connection, is_acceptor=False)
                with pytest.raises(PeerGone, match="takes no bytes"):
                    send_exactly(pipe, [bytes(FRAME_BYTES_MAX)] * 8, 8 * FRAME_BYTES_MAX, 0.3)
        finally:
            has_ended.set()
            reader.join()
