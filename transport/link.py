"""The connection over which two one-sided lanes talk: an authenticated socket that never blocks its owner."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from pdx.errors import ConfigError, PeerGone, TransportError, WireError
from pdx.transport.handshake import greet_as_acceptor, greet_as_connector
from pdx.transport.link_messages import LinkMessage, MessageStream, encode
from pdx.transport.sockets import parse_endpoint, shut, tune

READ_BYTES = 256 << 10
# Past this, a peer that takes no messages is sent no more data either: each put means a message.
CONGESTED_BYTES = 1 << 20


class Link:
    """Owned by the reactor's thread, after the greeting."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._stream = MessageStream()
        self._unsent = bytearray()
        self._is_finished = False

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def unsent_bytes(self) -> int:
        return len(self._unsent)

    @property
    def is_congested(self) -> bool:
        return len(self._unsent) > CONGESTED_BYTES

    def send(self, message: LinkMessage) -> None:
        """Now, or as soon as flush() can; after finish() never. Raises OSError."""
        if self._is_finished:
            return
        self._unsent += encode(message)
        self.flush()

    def flush(self) -> None:
        while self._unsent:
            try:
                sent_bytes = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            del self._unsent[:sent_bytes]

    def receive(self) -> list[LinkMessage]:
        """What is there. Raises PeerGone at the end of the stream, WireError, OSError."""
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise PeerGone("peer closed the connection")
        return self._stream.feed(data)

    def discard(self) -> None:
        """Waits for the end of the stream like receive(), whatever comes before it."""
        try:
            if not self._socket.recv(READ_BYTES):
                raise PeerGone("peer closed the connection")
        except BlockingIOError:
            return

    def finish(self) -> None:
        """No more from us, nor what is unsent yet; the peer may still talk, and write. Raises OSError."""
        self._is_finished = True
        self._unsent.clear()
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()


class Greeting:
    """A thread that connects, or was connected to, and makes sure of the peer; its waits end after `stall_s` each.

    `at_end` is called on that thread, with the connection or with why there is none.
    """

    def __init__(
        self,
        peer: str | socket.socket,
        *,
        scheme: str,
        key: bytes | None,
        stall_s: float,
        at_end: Callable[[Greeting, socket.socket | str], None],
        name: str,
    ) -> None:
        self._peer = peer
        self._scheme = scheme
        self._key = key
        self._stall_s = stall_s
        self._at_end = at_end
        self._lock = threading.RLock()
        self._socket = peer if isinstance(peer, socket.socket) else None
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name=f"{name}-greet", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            if self._socket is not None:
                shut(self._socket)

    def join(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        outcome: socket.socket | str
        try:
            outcome = self._greet()
        except (OSError, TransportError, WireError, ConfigError) as error:
            outcome = str(error)
            if self._socket is not None:
                self._socket.close()
        self._at_end(self, outcome)

    def _greet(self) -> socket.socket:
        if isinstance(self._peer, socket.socket):
            tune(self._peer, self._stall_s)
            greet_as_acceptor(self._peer, self._key)
            return self._peer
        connection = self._connect(self._peer)
        greet_as_connector(connection, self._key)
        return connection

    def _connect(self, endpoint: str) -> socket.socket:
        host, port = parse_endpoint(endpoint, scheme=self._scheme)
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        connection = socket.socket(family, kind, protocol)
        with self._lock:
            self._socket = connection
        tune(connection, self._stall_s)
        try:
            connection.connect(address)
        except BlockingIOError as error:
            raise PeerGone(f"no answer from {endpoint}") from error
        with self._lock:
            if self._is_stopped:  # a stop before connect() had begun could not interrupt it
                raise PeerGone("the lane was closed")
        return connection
