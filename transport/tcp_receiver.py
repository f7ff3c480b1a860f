"""The receiving side of the tcp lane: who may connect, and where their bytes may go.

One thread accepts and owns all accepted connections; each of these has a thread that greets the peer and then, frame
by frame, checks window and spans **before** it lets the kernel write the payload straight into the region.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from pdx.errors import PeerGone, TransportError, WireError
from pdx.limits import within_descriptors
from pdx.transport.api import LaneFailed
from pdx.transport.frames import (
    FRAME_BYTES_MAX,
    HEAD_BYTES,
    NOTICE_BYTES_MAX,
    SPAN_BYTES,
    SPANS_MAX,
    Head,
    decode_head,
    decode_spans,
)
from pdx.transport.handshake import greet_as_acceptor
from pdx.transport.mailbox import Mailbox
from pdx.transport.sockets import Pipe, receive_exactly, receive_some, reset_on_close, shut, tune
from pdx.transport.tls import LaneTls, TlsPipe
from pdx.transport.windows import WindowTable

logger = logging.getLogger(__name__)

# A few connections a peer, who keeps them for as long as it lives; each costs a descriptor, a thread and, once it needs
# them, a MiB of buffers. So this is how many hosts may put into one: 512 of the largest. With few descriptors, fewer.
CONNECTIONS_MAX, CONNECTIONS_LEAST = 2048, 512
# Who has not proved the key may be anybody: they have places of their own, and of those the oldest goes first.
STRANGERS_MAX = 64
# Out of descriptors, accept() fails at once and for ever: don't spin on it.
ACCEPT_RETRY_S = 0.1
# Ends of connection threads are waited for no longer than this; shutdown() wakes them at once.
JOIN_S = 5.0


class TcpListener:
    """Constructor, stop() and join() are the control thread's; `listening` belongs to the listener from now on."""

    def __init__(
        self,
        listening: socket.socket,
        *,
        key: bytes | None,
        windows: WindowTable,
        mailbox: Mailbox,
        name: str,
        stall_s: float,
        tls: LaneTls | None = None,
    ) -> None:
        self._tls = tls
        self._stall_s = stall_s
        self._listening = listening
        self._key = key
        self._windows = windows
        self._mailbox = mailbox
        self._name = name
        self._connections: dict[_Connection, None] = {}  # the oldest first
        self._ended: deque[_Connection] = deque()
        self._is_stopped = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name=f"{name}-accept", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends all connections now. Takes no time; join() waits for the end."""
        self._is_stopped = True
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def join(self, timeout_s: float) -> bool:
        """Whether all threads ended in time. Frees what they used."""
        self._thread.join(max(0.0, timeout_s))
        if self._thread.is_alive() or self._connections:
            return False
        wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)
        return True

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listening, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        try:
            while not self._is_stopped:
                ready = {descriptor for descriptor, _ in poll.poll()}
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                self._sweep()
                if self._listening.fileno() in ready:
                    self._accept()
        except Exception:
            logger.exception("%s: accepting failed", self._name)
            self._mailbox.add(LaneFailed("no new peer can connect any more"))
        finally:
            self._listening.close()
            self._end_connections()

    def _accept(self) -> None:
        try:
            accepted, address = self._listening.accept()
        except OSError as error:  # the peer has gone already, or descriptors ran out: neither is the end of the lane
            logger.warning("%s: accept failed: %s", self._name, error)
            select.select([self._wake], [], [], ACCEPT_RETRY_S)
            return
        strangers = [connection for connection in self._connections if not connection.is_proven]
        most = within_descriptors(CONNECTIONS_MAX, least=CONNECTIONS_LEAST)
        if len(self._connections) - len(strangers) >= most:
            logger.warning("%s: refused %s: %d connections are open", self._name, address, most)
            reset_on_close(accepted)  # the peer is told why that may be (handshake)
            accepted.close()
            return
        if len(strangers) >= STRANGERS_MAX:
            strangers[0].shut()
            strangers[0].join(JOIN_S)  # so that there are never more
        peer = f"{address[0]}:{address[1]}"
        connection = _Connection(accepted, peer, self._key, self._windows, self._mailbox, self._stall_s, self._tls)
        try:
            connection.start(f"{self._name}-receive", at_end=self._note_end)
        except RuntimeError as error:  # no more threads
            logger.warning("%s: refused %s: %s", self._name, peer, error)
            connection.close()
            return
        self._connections[connection] = None

    def _note_end(self, connection: _Connection) -> None:
        """The last act of a connection's thread: what follows is the listener's."""
        self._ended.append(connection)
        os.eventfd_write(self._wake, 1)

    def _sweep(self) -> None:
        while self._ended:
            connection = self._ended.popleft()
            connection.join(JOIN_S)  # it has nothing left to do
            connection.close()
            self._connections.pop(connection, None)

    def _end_connections(self) -> None:
        deadline_s = time.monotonic() + JOIN_S
        for connection in self._connections:
            connection.shut()
        for connection in self._connections:
            connection.join(deadline_s - time.monotonic())
        self._sweep()


class _Connection:
    """One accepted connection. Made, shut and closed by the listener's thread; run by its own."""

    def __init__(
        self,
        accepted: socket.socket,
        peer: str,
        key: bytes | None,
        windows: WindowTable,
        mailbox: Mailbox,
        stall_s: float,
        tls: LaneTls | None,
    ) -> None:
        self.is_proven = False
        self._socket = accepted
        self._pipe: Pipe = accepted if tls is None else tls.pipe(accepted, is_acceptor=True)
        self._peer = peer
        self._key = key
        self._windows = windows
        self._mailbox = mailbox
        self._stall_s = stall_s
        self._head = memoryview(bytearray(HEAD_BYTES))
        self._spans = memoryview(bytearray(SPANS_MAX * SPAN_BYTES))
        self._notice = memoryview(bytearray(NOTICE_BYTES_MAX))
        self._scratch: memoryview | None = None

    def start(self, name: str, *, at_end: Callable[[_Connection], None]) -> None:
        self._thread = threading.Thread(target=self._run, args=(at_end,), name=name, daemon=True)
        self._thread.start()

    def shut(self) -> None:
        shut(self._socket)

    def join(self, timeout_s: float) -> None:
        self._thread.join(max(0.0, timeout_s))

    def close(self) -> None:
        self._socket.close()

    def _run(self, at_end: Callable[[_Connection], None]) -> None:
        try:
            tune(self._socket, self._stall_s)
            if isinstance(self._pipe, TlsPipe):
                self._pipe.shake_hands(self._stall_s)
            greet_as_acceptor(self._pipe, self._key)
            self.is_proven = True
            reset_on_close(self._socket)
            while self._wait_for_head():
                self._receive_frame(decode_head(self._head))
        except (WireError, TransportError) as error:
            # As text: who keeps a log's records would keep, with the error's frames, our views of the memory.
            logger.warning("dropped the connection from %s: %s", self._peer, str(error))
        except OSError as error:
            logger.info("connection from %s broke: %s", self._peer, str(error))
        except Exception:
            logger.exception("connection from %s failed", self._peer)
        finally:
            at_end(self)

    def _wait_for_head(self) -> bool:
        """False at the end of the stream. Idle connections may be silent for ever; a head once begun must end soon."""
        if not self._mailbox.wait_for_room(self._stall_s):
            raise PeerGone("we are too far behind to take its notices")
        while (received_bytes := receive_some(self._pipe, self._head)) < 0:
            pass
        if 0 < received_bytes < HEAD_BYTES:
            self._receive([self._head[received_bytes:]], HEAD_BYTES - received_bytes)
        return received_bytes > 0

    def _receive_frame(self, head: Head) -> None:
        raw_spans = self._spans[: head.span_count * SPAN_BYTES]
        if raw_spans:
            self._receive([raw_spans], len(raw_spans))
        targets = self._windows.admit(head.window, decode_spans(raw_spans, head))
        if targets is None:
            self._receive_body(head, [self._scratch_of(head.payload_bytes)])
            return
        notice = None
        try:
            notice = self._receive_body(head, targets)
        finally:
            self._windows.end_frame(head.window, notice=notice)

    def _receive_body(self, head: Head, targets: list[memoryview]) -> bytes | None:
        """Payload to the targets; the notice, if this is a put's last frame, is returned."""
        notice = self._notice[: head.notice_bytes]
        total_bytes = head.payload_bytes + head.notice_bytes
        if total_bytes:
            self._receive([*targets, notice], total_bytes)
        return bytes(notice) if head.is_last else None

    def _receive(self, buffers: list[memoryview], total_bytes: int) -> None:
        receive_exactly(self._pipe, buffers, total_bytes, self._stall_s)

    def _scratch_of(self, length_bytes: int) -> memoryview:
        if self._scratch is None:
            self._scratch = memoryview(bytearray(FRAME_BYTES_MAX))
        return self._scratch[:length_bytes]
