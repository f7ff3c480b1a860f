"""The way to one peer of the tcp lane: a few connections that stand and fall together. See tcp_stream for one of them.

A queue always takes the same connection, since its puts must keep their order; which one, its name says. What shares a
connection is sent by urgency, frame by frame; what does not is shared out by the kernel. One connection fills what two
cores can move, so hosts with few cores have one; further ones are opened when a queue first needs them.
"""

from __future__ import annotations

import os
import threading
import zlib

from pdx.transport.api import PeerLost, PutFailed
from pdx.transport.mailbox import Mailbox
from pdx.transport.outbox import Put
from pdx.transport.tcp_stream import TcpStream
from pdx.transport.tls import LaneTls

# A sending thread and its peer's receiving one are worth a core each, of the four that a connection may count on.
STREAMS_MAX = 4
CORES_A_STREAM = 4


def usual_streams() -> int:
    """How many connections to a peer this machine should have."""
    return max(1, min(STREAMS_MAX, len(os.sched_getaffinity(0)) // CORES_A_STREAM))


class TcpChannel:
    """Public methods are the control thread's, and a signal handler's; each connection's thread tells its end."""

    def __init__(
        self,
        number: int,
        endpoint: str,
        *,
        key: bytes | None,
        tls: LaneTls | None,
        mailbox: Mailbox,
        name: str,
        streams: int,
        stall_s: float,
    ) -> None:
        self.number = number
        self.endpoint = endpoint
        self._key = key
        self._tls = tls
        self._mailbox = mailbox
        self._name = f"{name}-send-{number}"
        self._stream_count = streams
        self._stall_s = stall_s
        # Reentrant, because abort() may come from a signal handler while the control thread is in put().
        self._lock = threading.RLock()
        self._streams: dict[int, TcpStream] = {}
        self._ended_count = 0
        self._lost_reason: str | None = None  # why the first connection ended
        self._is_ours_to_end = False  # ended on purpose: no PeerLost
        with self._lock:
            self._stream(0)

    @property
    def is_over(self) -> bool:
        return self._lost_reason is not None

    def put(self, put: Put, urgency: float) -> None:
        with self._lock:
            if self._lost_reason is None:
                self._stream(self._index_of(put.queue)).put(put, urgency)
                return
        self._mailbox.add(PutFailed(put.ticket, self._lost_reason))

    def cancel(self, queue: bytes) -> None:
        stream = self._streams.get(self._index_of(queue))
        if stream is not None:
            stream.cancel(queue)

    def finish(self) -> None:
        """Ends the channel once everything queued is sent."""
        with self._lock:
            self._is_ours_to_end = True
            for stream in self._streams.values():
                stream.finish()

    def stop(self, reason: str, *, is_ours: bool) -> None:
        """Ends the channel now; `is_ours`: without PeerLost. Takes no time; join() waits for the end."""
        with self._lock:
            self._is_ours_to_end = self._is_ours_to_end or is_ours
            for stream in self._streams.values():
                stream.stop(reason)

    def join(self, timeout_s: float) -> bool:
        """Whether all its threads ended in time. Frees what they used."""
        return all([stream.join(timeout_s) for stream in self._streams.values()])

    def _index_of(self, queue: bytes) -> int:
        return zlib.crc32(queue) % self._stream_count

    def _stream(self, index: int) -> TcpStream:
        if index not in self._streams:
            self._streams[index] = TcpStream(
                self.endpoint,
                key=self._key,
                tls=self._tls,
                mailbox=self._mailbox,
                name=f"{self._name}.{index}",
                stall_s=self._stall_s,
                at_end=self._stream_ended,
            )
        return self._streams[index]

    def _stream_ended(self, reason: str, failed: list[PutFailed]) -> None:
        """One connection is over: so are the others, and behind the last of them comes PeerLost."""
        with self._lock:
            self._ended_count += 1
            if not self._is_ours_to_end:
                for stream in self._streams.values():
                    stream.stop(reason)
            self._lost_reason = self._lost_reason or reason
            self._mailbox.add_all(failed)
            if self._ended_count == len(self._streams) and not self._is_ours_to_end:
                self._mailbox.add(PeerLost(self.number, self.endpoint, self._lost_reason))
