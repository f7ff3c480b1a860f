"""Locks ZeroMQ connections with the cluster key: CURVE, both sides holding the key pair derived from it.

The public half is never published: whoever can open a connection knows the cluster key. Used on every tcp socket of
the control plane, on loopback too, so that what is tested is what runs between hosts.
"""

from __future__ import annotations

import hashlib
from typing import Any

import zmq
from zmq.utils import z85

from pdx.wire import FRAME_BYTES_MAX

CURVE_BYTES = 33  # a message's header, nonce, flags and MAC, which ZeroMQ counts


def lock(socket: zmq.Socket[Any], cluster_key: bytes, *, server: bool) -> None:
    """Call before bind or connect. A peer with another key is ignored by ZeroMQ, without a word to either side.

    Nor does ZeroMQ make room for a message that no decoder would take.
    """
    socket.maxmsgsize = FRAME_BYTES_MAX + CURVE_BYTES
    secret = z85.encode(hashlib.blake2b(cluster_key, digest_size=32, person=b"pdx-curve").digest())
    public = zmq.curve_public(secret)
    socket.curve_secretkey, socket.curve_publickey = secret, public
    if server:
        socket.curve_server = True
    else:
        socket.curve_serverkey = public
