"""A worker's voice: the sending side of its connection to pdxd, without ZeroMQ.

One system call a message, where ZeroMQ wakes a thread of its own on either side, on cores that compute. Each thread
that speaks has a voice of its own; all of them speak on one connection, and the daemon sees its end when the last of
them is closed. So whoever still touches the arena keeps a voice, and the daemon knows that its slots are in use.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import deque

from pdx.errors import DaemonGone
from pdx.wire import Message, encode

UNSENT_MAX = 10_000


class Voice:
    """One thread only. Takes over `connection`, which must not block."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unsent: deque[bytes] = deque()  # for which the connection had no room
        self._alive = True
        self._ending = select.poll()
        self._ending.register(connection, select.POLLIN)

    @property
    def alive(self) -> bool:
        """False once the daemon's end of the connection is closed. Checked on every call: microseconds."""
        if self._alive and self._ending.poll(0):
            self._alive = False  # the daemon never writes here after its answer: readable means EOF
        return self._alive

    def another(self) -> Voice:
        """For another thread. What the two say may overtake each other."""
        return Voice(self._connection.dup())

    def send(self, message: Message) -> None:
        """Queues a message; never blocks. Raises DaemonGone if the daemon died or stopped reading long ago."""
        if not self.alive:
            raise DaemonGone("pdxd has died")
        if len(self._unsent) >= UNSENT_MAX:
            raise DaemonGone("pdxd does not read its messages")
        self._unsent.append(encode(message))
        self._flush()

    def finish_sending(self, *, timeout_s: float) -> None:
        """At the end of a step: the engine may be idle after it, and nothing else would send what is left.

        Costs nothing when all is sent, as it is unless the daemon has not read for a hundred messages and more.
        """
        until = time.monotonic() + timeout_s
        room = select.poll()
        room.register(self._connection, select.POLLOUT)
        with contextlib.suppress(DaemonGone):
            while self._unsent and self.alive and (left := until - time.monotonic()) > 0:
                room.poll(left * 1000)
                self._flush()

    def watched(self) -> int:
        """A descriptor of the caller's own that becomes readable when the daemon is gone."""
        return self._connection.dup().detach()

    def close(self) -> None:
        self._alive = False
        self._connection.close()

    def _flush(self) -> None:
        """As much as finds room."""
        try:
            while self._unsent:
                self._connection.send(self._unsent[0], socket.MSG_DONTWAIT)
                self._unsent.popleft()
        except BlockingIOError:
            pass
        except OSError as error:
            raise DaemonGone("pdxd has died") from error
