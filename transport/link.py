"""The connection over which two one-sided lanes talk: an authenticated socket that never blocks its owner."""

from __future__ import annotations

import socket
import time

from pdx.errors import PeerGone
from pdx.transport.link_messages import LinkMessage, MessageStream, encode

READ_BYTES = 256 << 10
# Past this, a peer that takes no messages is sent no more data either, and not listened to: both mean messages.
CONGESTED_BYTES = 1 << 20


class Link:
    """Owned by the reactor's thread, after the greeting."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._stream = MessageStream()
        self._unsent = bytearray()
        self._moved_s = 0.0  # when the peer last took something, or was first sent what it has not taken
        self._is_finished = False

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def unsent_bytes(self) -> int:
        return len(self._unsent)

    @property
    def is_congested(self) -> bool:
        return len(self._unsent) > CONGESTED_BYTES

    def is_stuck(self, now: float, stall_s: float) -> bool:
        """The peer was sent something and has taken nothing for so long."""
        return bool(self._unsent) and now > self._moved_s + stall_s

    def send(self, message: LinkMessage) -> None:
        """Now, or as soon as flush() can; after finish() never. Raises OSError."""
        if self._is_finished:
            return
        if not self._unsent:
            self._moved_s = time.monotonic()
        self._unsent += encode(message)
        self.flush()

    def flush(self) -> None:
        while self._unsent:
            try:
                sent_bytes = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            del self._unsent[:sent_bytes]
            self._moved_s = time.monotonic()

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
