"""Locks ZeroMQ connections with the cluster key, and ends those that fall silent.

CURVE, both sides holding the key pair derived from the cluster key.

The public half is never published, and an allow list lets in nobody who knows only that. Used on every tcp socket of
the control plane, on loopback too, so that what is tested is what runs between hosts.
"""

from __future__ import annotations

import hashlib
from typing import Any

import zmq
from zmq.utils import z85

from pdx.wire import FRAME_BYTES_MAX

CURVE_BYTES = 33  # a message's header, nonce, flags and MAC, which ZeroMQ counts
# A host that loses its power closes no connection. ZeroMQ's own threads ask and answer, however busy their process is:
# late is only a machine that is gone, cut off, or stopped for so long.
HEARTBEAT_MS, SILENT_MS = 2_000, 10_000


def lock(socket: zmq.Socket[Any], cluster_key: bytes, *, server: bool) -> None:
    """Call before bind or connect. A peer with another key is ignored by ZeroMQ, without a word to either side.

    Nor does ZeroMQ make room for a message that no decoder would take. A connection that is silent for SILENT_MS ends.
    """
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENT_MS)
    socket.maxmsgsize = FRAME_BYTES_MAX + CURVE_BYTES
    public = public_key(cluster_key)
    socket.curve_secretkey, socket.curve_publickey = _secret_key(cluster_key), public
    if server:
        socket.curve_server = True
    else:
        socket.curve_serverkey = public


def public_key(cluster_key: bytes) -> bytes:
    return zmq.curve_public(_secret_key(cluster_key))


class AllowList:
    """Says, for all server sockets of a context, which keys clients may have: only the cluster's.

    Without it ZeroMQ lets in whoever knows the server's public key, with any key of his own. Make it before they bind,
    and close it after them. Until it is asked to answer, nobody gets in: by `run` on an event loop, of an asyncio
    context, or by `answer` whenever `socket` can be read. Owned by one thread.
    """

    def __init__(self, context: zmq.Context[Any], cluster_key: bytes) -> None:
        self._allowed = z85.decode(public_key(cluster_key))
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")

    async def run(self) -> None:
        """Answers for ever."""
        while True:
            await self.socket.send_multipart(self._verdict(await self.socket.recv_multipart()))

    def answer(self) -> None:
        """One question, which is there."""
        self.socket.send_multipart(self._verdict(self.socket.recv_multipart()))

    def close(self) -> None:
        self.socket.close()

    def _verdict(self, question: list[bytes]) -> list[bytes]:
        version, number, _domain, _address, _name, mechanism, *keys = question
        known = mechanism == b"CURVE" and keys == [self._allowed]
        status = [b"200", b"OK"] if known else [b"400", b"not on the list"]
        return [version, number, *status, b"", b""]


def _secret_key(cluster_key: bytes) -> bytes:
    return z85.encode(hashlib.blake2b(cluster_key, digest_size=32, person=b"pdx-curve").digest())
