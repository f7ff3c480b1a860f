"""The Unix socket by which processes of this host attach: hello in, answer and the arena's descriptor out.

One SEQPACKET message each way; then the connection stands for the client's life (see `sessions`), and an engine's
worker says on it what it has to say.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from pdx.config import SOCKET_NAME
from pdx.errors import ConfigError, WireError
from pdx.wire import ATTACH, Attach, Message, decoder_of, encode

FRAME_BYTES_MAX = 64 << 10  # of all that comes here

_decode = decoder_of(ATTACH)


class Door:
    """Listens, and reads hellos without ever waiting for one. Owned by the control thread."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / SOCKET_NAME
        if len(os.fsencode(self._path)) > 100:
            raise ConfigError(f"run directory path is too long for a Unix socket: {run_dir}")
        self._path.unlink(missing_ok=True)  # we hold the lock: whoever made it is dead
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.listener.bind(str(self._path))
        self.listener.listen(64)

    def accept(self) -> socket.socket | None:
        """A new connection of our own uid, or None."""
        try:
            connection, _ = self.listener.accept()
        except OSError:  # it left again, or descriptors ran out: the next turn may fare better
            return None
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        uid = int.from_bytes(credentials[4:8], "little")
        if uid != os.getuid():
            connection.close()
            return None
        connection.setblocking(False)
        return connection

    @staticmethod
    def read_hello(connection: socket.socket) -> Attach | None:
        """The hello, or None at EOF. Raises WireError, BlockingIOError."""
        try:
            frame = connection.recv(FRAME_BYTES_MAX)
        except ConnectionError:
            return None
        return _decode(frame) if frame else None

    @staticmethod
    def read(connection: socket.socket) -> bytes:
        """An attached client's next frame; empty when it has left. Raises BlockingIOError if there is none now."""
        try:
            return connection.recv(FRAME_BYTES_MAX)
        except BlockingIOError:
            raise
        except OSError:
            return b""

    @staticmethod
    def answer(connection: socket.socket, message: Message, descriptor: int | None = None) -> None:
        """Raises WireError if the client is not there to take it."""
        try:
            socket.send_fds(connection, [encode(message)], [] if descriptor is None else [descriptor])
        except OSError as error:
            raise WireError(f"client left before the answer: {error}") from error

    def close(self) -> None:
        self.listener.close()
        self._path.unlink(missing_ok=True)
