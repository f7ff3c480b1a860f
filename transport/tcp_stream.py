"""One outgoing connection of the tcp lane: one socket, one thread, one outbox. See tcp_channel for its owner.

The control thread adds and cancels puts; the channel's own thread connects, greets, and sends frame after frame
straight from the region's memory. They share the outbox under one lock, held for microseconds and never while
sending. The thread waits in poll() only when there is nothing to send; then the peer's hanging up wakes it too.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable

from pdx.errors import PdxError, PeerGone, WireError
from pdx.transport.api import PutFailed
from pdx.transport.frames import Head, encode_frame_start
from pdx.transport.handshake import greet_as_connector
from pdx.transport.mailbox import Mailbox
from pdx.transport.outbox import Frame, Outbox, Put
from pdx.transport.pace import Pace
from pdx.transport.sockets import Pipe, connect, limit_unsent, receive_some, send_exactly, shut
from pdx.transport.tls import LaneTls

logger = logging.getLogger(__name__)

# While puts follow puts, the control thread is not woken for every PutDone: at full speed that cost 1 switch a put.
ANNOUNCE_EVERY_S = 0.001


class TcpStream:
    """Public methods are the control thread's; the rest runs in the thread that the constructor starts.

    The constructor raises PeerGone if descriptors or threads have run out.
    `at_end` is that thread's last call: why it ended, and the puts that thereby failed.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        key: bytes | None,
        tls: LaneTls | None,
        mailbox: Mailbox,
        name: str,
        stall_s: float,
        at_end: Callable[[str, list[PutFailed]], None],
    ) -> None:
        self.endpoint = endpoint
        self._at_end = at_end
        self._pace = Pace()
        self._key = key
        self._tls = tls
        self._stall_s = stall_s
        self._mailbox = mailbox
        # Reentrant, because abort() may come from a signal handler while the control thread is in put().
        self._lock = threading.RLock()
        self._outbox = Outbox()
        self._is_idle = False  # the thread waits, or will wait, for the wake descriptor
        self._is_ending = False  # stop when the outbox is empty
        self._stop_reason: str | None = None  # stop now; set once
        self._lost_reason: str | None = None
        self._announced_s = 0.0
        self._owes_announcement = False
        self._socket: socket.socket | None = None
        self._wake = -1
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._thread.start()
        except (OSError, RuntimeError) as error:
            if self._wake >= 0:
                os.close(self._wake)
            raise PeerGone(f"no more connections can be made here: {error}") from error

    def put(self, put: Put, urgency: float) -> None:
        with self._lock:
            failed = (
                PutFailed(put.ticket, self._lost_reason)
                if self._lost_reason is not None
                else self._outbox.add(put, urgency)
            )
            self._wake_if_idle()
        if failed is not None:
            self._mailbox.add(failed)

    def cancel(self, queue: bytes) -> None:
        with self._lock:
            failed = self._outbox.cancel(queue, "cancelled")
        self._mailbox.add_all(failed)

    def finish(self) -> None:
        """Ends once everything queued is sent."""
        with self._lock:
            self._is_ending = True
            self._wake_if_idle()

    def stop(self, reason: str) -> None:
        """Ends it now. Takes no time; join() waits for the end. Any thread may call this."""
        with self._lock:
            self._stop_reason = self._stop_reason or reason
            if self._socket is not None:
                shut(self._socket)
            self._wake_if_idle()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread ended in time. Frees what it used."""
        self._thread.join(max(0.0, timeout_s))
        if self._thread.is_alive():
            return False
        with self._lock:
            wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)
        return True

    def _wake_if_idle(self) -> None:
        if self._is_idle:
            self._is_idle = False
            os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        try:
            connection = connect(self.endpoint, scheme="tcp", stall_s=self._stall_s, check=self._hold)
            pipe = self._encrypted(connection)
            greet_as_connector(pipe, self._key)
            self._send_frames(connection, pipe)
            reason = "channel closed"
        except (OSError, PdxError) as error:
            reason = str(error)
        except Exception as error:
            logger.exception("channel to %s failed", self.endpoint)
            reason = f"internal error: {error!r}"
        self._end(self._stop_reason or reason)

    def _hold(self, connection: socket.socket) -> None:
        with self._lock:
            self._socket = connection
            self._check_not_stopped()

    def _encrypted(self, connection: socket.socket) -> Pipe:
        if self._tls is None:
            return connection
        pipe = self._tls.pipe(connection, is_acceptor=False)
        pipe.shake_hands(self._stall_s)
        return pipe

    def _send_frames(self, connection: socket.socket, pipe: Pipe) -> None:
        poll = select.poll()
        poll.register(connection, select.POLLIN | select.POLLRDHUP)
        poll.register(self._wake, select.POLLIN)
        while True:
            with self._lock:
                self._check_not_stopped()
                frame = self._outbox.next_frame(self._pace.frame_bytes)
                if frame is None and self._is_ending:
                    return
                self._is_idle = frame is None
            if frame is None:
                # A put may have been cancelled since the last frame, which was then the last of all.
                self._announce_owed()
                self._wait(poll, pipe)
            else:
                self._send(connection, pipe, frame)

    def _send(self, connection: socket.socket, pipe: Pipe, frame: Frame) -> None:
        put = frame.put
        notice = put.notice if frame.is_last else b""
        start = encode_frame_start(
            Head(frame.is_last, put.window, put.ticket, len(frame.targets), frame.payload_bytes, len(notice)),
            frame.targets,
        )
        total_bytes = len(start) + frame.payload_bytes + len(notice)
        began_s = time.monotonic()
        send_exactly(pipe, [start, *frame.sources, notice], total_bytes, self._stall_s)
        now_s = time.monotonic()
        if self._pace.sent(total_bytes, began_s=began_s, ended_s=now_s):
            limit_unsent(connection, self._pace.frame_bytes)
        with self._lock:
            end = self._outbox.frame_sent(frame)
            is_empty = not self._outbox
        if end is not None:
            self._mailbox.add_quietly(end)
            self._owes_announcement = True
        # After every frame: the next put of another queue may take seconds.
        if self._owes_announcement and (is_empty or now_s > self._announced_s + ANNOUNCE_EVERY_S):
            self._announced_s = now_s
            self._announce_owed()

    def _announce_owed(self) -> None:
        if self._owes_announcement:
            self._owes_announcement = False
            self._mailbox.announce()

    def _wait(self, poll: select.poll, pipe: Pipe) -> None:
        """Until there is something to do. No deadline of its own: keep-alive ends a dead connection."""
        for descriptor, _ in poll.poll():
            if descriptor == self._wake:
                os.eventfd_read(self._wake)
                continue
            said_bytes = receive_some(pipe, memoryview(bytearray(1)))
            if said_bytes > 0:
                raise WireError("peer talks where it should only listen")
            if said_bytes == 0:
                raise PeerGone("peer closed the connection")

    def _check_not_stopped(self) -> None:
        if self._stop_reason is not None:
            raise PeerGone(self._stop_reason)

    def _end(self, reason: str) -> None:
        with self._lock:
            self._lost_reason = reason
            self._is_idle = False  # nobody is left to be woken
            if self._socket is not None:
                self._socket.close()
                self._socket = None
            failed = self._outbox.fail_all(reason)
        self._announce_owed()
        self._at_end(reason, failed)
