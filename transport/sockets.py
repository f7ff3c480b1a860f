"""TCP sockets as the lanes want them: options, and exact reads and writes under kernel timeouts.

Sockets stay blocking and the kernel keeps the time (SO_RCVTIMEO, SO_SNDTIMEO, MSG_WAITALL): a frame costs two or
three system calls and holds the GIL in none of them. shutdown() from another thread ends any call at once. What is
encrypted goes through the same functions (see tls).
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from pdx.addresses import authority
from pdx.config import is_loopback
from pdx.errors import ConfigError, PeerGone
from pdx.transport.pace import FIRST_FRAME_BYTES
from pdx.transport.tls import TlsPipe

Pipe = socket.socket | TlsPipe

# A peer that moves no byte in mid-frame for so long holds a window, or our memory, that others wait for.
STALL_S = 5.0
# A frame as a whole has one such time at its receiver, who may have waited as long for room to take its notice.
SEND_STALLS = 2
# Unacknowledged bytes, or silence on an idle connection, for about so long mean that the peer's host is gone.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 5, 2, 4
USER_TIMEOUT_MS = 10_000
ACCEPT_BACKLOG = 64


def tune(connection: socket.socket, stall_s: float = STALL_S) -> None:
    """Every single connect, send and receive call on it ends after `stall_s` at the latest."""
    connection.settimeout(None)
    timeval = struct.pack("@ll", int(stall_s), int(stall_s % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    limit_unsent(connection, FIRST_FRAME_BYTES)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


def connect(endpoint: str, *, scheme: str, stall_s: float, check: Callable[[socket.socket], None]) -> socket.socket:
    """A tuned connection. `check` sees it before and after connect(), which a stop in between can only thereby end: it
    keeps the socket for shut(), and raises if there was a stop already.

    Raises ConfigError, PeerGone or OSError; the socket, once checked, is the caller's to close.
    """
    host, port = parse_endpoint(endpoint, scheme=scheme)
    family, kind, protocol, address = resolve(endpoint, host, port)
    connection = socket.socket(family, kind, protocol)
    check(connection)
    tune(connection, stall_s)
    try:
        connection.connect(address)
    except BlockingIOError as error:
        raise PeerGone(f"no answer from {endpoint}") from error
    check(connection)
    return connection


def limit_unsent(connection: socket.socket, unsent_bytes: int) -> None:
    """Queued but unsent bytes are bytes that an urgent put cannot overtake: so one frame's worth.

    The kernel sizes the socket buffers itself, since fixed ones of 0.4 to 4 MiB were measured no faster on loopback and
    would cap links of high latency.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, unsent_bytes)


def listen_at(url: str, *, scheme: str, key: bytes | None) -> tuple[socket.socket, str]:
    """A listening socket and the endpoint to publish; port 0 takes a free one.

    Raises ConfigError if the address cannot be had, or is off loopback and there is no cluster key.
    """
    host, port = parse_endpoint(url, scheme=scheme)
    if key is None and not is_loopback(host):
        raise ConfigError(f"{url}: lanes off loopback need the cluster key; set PDX_KEY_FILE")
    try:
        family, kind, protocol, address = resolve(url, host, port)
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"can't listen at {url}: {error.strerror or error}; see --host") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(ACCEPT_BACKLOG)
        listening.setblocking(False)  # poll() may announce a peer that is gone before accept()
    except OSError as error:
        listening.close()
        see = "--host must be an address of this host" if error.errno == errno.EADDRNOTAVAIL else "see --lane-port"
        raise ConfigError(f"can't listen at {url}: {error.strerror or error}; {see}") from error
    return listening, f"{scheme}://{authority(host, listening.getsockname()[1])}"


def resolve(endpoint: str, host: str, port: int) -> tuple[int, int, int, Any]:
    """Family, kind, protocol and address to connect to. Raises ConfigError for what no name is, OSError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except UnicodeError as error:  # a label of more than 63 letters
        raise ConfigError(f"{endpoint}: {error}") from error
    return family, kind, protocol, address


def parse_endpoint(endpoint: str, *, scheme: str = "tcp") -> tuple[str, int]:
    """Host and port of scheme://host:port. Raises ConfigError."""
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{endpoint!r} is not {scheme}://host:port: {error}") from error
    if parts.scheme != scheme or not host or port is None or parts.path or parts.query:
        raise ConfigError(f"{endpoint!r} is not {scheme}://host:port")
    return host, port


def send_exactly(
    connection: Pipe, buffers: Sequence[bytes | memoryview], total_bytes: int, stall_s: float = STALL_S
) -> None:
    """Raises PeerGone if the peer takes not a byte for the socket's stall time (twice that at worst: a call that stalls
    in its middle still returns what it had sent), or not all within SEND_STALLS of them (one more at worst). OSError if
    the connection breaks."""
    deadline_s = time.monotonic() + SEND_STALLS * stall_s
    try:
        if isinstance(connection, TlsPipe):
            connection.send(buffers, deadline_s)
            return
        sent_bytes = connection.sendmsg(buffers)
        while sent_bytes < total_bytes:
            if time.monotonic() >= deadline_s:
                raise BlockingIOError("not all within its time")
            buffers = _without_first(buffers, sent_bytes)
            total_bytes -= sent_bytes
            sent_bytes = connection.sendmsg(buffers)
    except BlockingIOError as error:
        raise PeerGone("peer takes no bytes any more") from error


def receive_exactly(
    connection: Pipe, buffers: Sequence[memoryview], total_bytes: int, stall_s: float = STALL_S
) -> None:
    """Fills the buffers. Raises PeerGone at the end of the stream, or after `stall_s` (twice that at worst)."""
    started_s = time.monotonic()
    if isinstance(connection, TlsPipe):
        for buffer in buffers:
            _receive_records(connection, buffer, started_s, stall_s)
        return
    try:
        received_bytes = connection.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0]
        while received_bytes < total_bytes:
            if received_bytes == 0:
                raise PeerGone("peer closed the connection in mid-frame")
            if time.monotonic() >= started_s + stall_s:
                raise PeerGone(f"peer did not finish its frame in {stall_s:g} s")
            buffers = _without_first(buffers, received_bytes)
            total_bytes -= received_bytes
            received_bytes = connection.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0]
    except BlockingIOError as error:
        raise PeerGone(f"peer did not finish its frame in {stall_s:g} s") from error


def _receive_records(connection: TlsPipe, buffer: memoryview, started_s: float, stall_s: float) -> None:
    filled_bytes = 0
    while filled_bytes < len(buffer):
        received_bytes = receive_some(connection, buffer[filled_bytes:])
        if received_bytes == 0:
            raise PeerGone("peer closed the connection in mid-frame")
        filled_bytes += received_bytes
        if received_bytes < 0 or (filled_bytes < len(buffer) and time.monotonic() >= started_s + stall_s):
            raise PeerGone(f"peer did not finish its frame in {stall_s:g} s")


def receive_some(connection: Pipe, buffer: memoryview) -> int:
    """What comes next, as much as there is of it; 0 at the end of the stream, -1 if nothing came for the stall time."""
    try:
        return connection.recv_into(buffer)
    except BlockingIOError:
        return -1


def reset_on_close(connection: socket.socket) -> None:
    """Makes close() tell the peer by a reset. A mere FIN would not wake a peer whose send waits for our window."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))


def shut(connection: socket.socket) -> None:
    """Ends the connection and wakes whoever is blocked on it. The descriptor stays its owner's to close."""
    with contextlib.suppress(OSError):  # not connected any more is what was asked for
        connection.shutdown(socket.SHUT_RDWR)


def _without_first(buffers: Sequence[bytes | memoryview], skip_bytes: int) -> list[memoryview]:
    rest: list[memoryview] = []
    for buffer in buffers:
        if skip_bytes >= len(buffer):
            skip_bytes -= len(buffer)
        else:
            rest.append(memoryview(buffer)[skip_bytes:])
            skip_bytes = 0
    return rest
