"""The ZeroMQ sockets at which a daemon is spoken to."""

from __future__ import annotations

import zmq

from pdx.addresses import has_ipv6
from pdx.curve import lock
from pdx.daemon.peers import PEERS_MAX, SEND_QUEUE_MAX, SOCKETS_A_PEER
from pdx.errors import ConfigError
from pdx.wire import FRAME_BYTES_MAX

BURST = 256  # messages taken from one socket before the others get their turn
SOCKETS_MAX = PEERS_MAX * SOCKETS_A_PEER + 64  # ZeroMQ's own limit is 1,023; the last are for routers and for these


def new_context() -> zmq.Context[zmq.Socket[bytes]]:
    """With room for all the sockets that a daemon may have."""
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, SOCKETS_MAX)
    return context


def listening(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, *, cluster_key: bytes | None = None
) -> zmq.Socket[bytes]:
    """A ROUTER; with a key, for those who have it. Raises ConfigError, and ends the context, if it can't be there."""
    bound = context.socket(zmq.ROUTER)
    if cluster_key is not None:
        lock(bound, cluster_key, server=True)
    bound.setsockopt(zmq.LINGER, 0)
    bound.setsockopt(zmq.IPV6, has_ipv6(endpoint))
    bound.setsockopt(zmq.SNDHWM, SEND_QUEUE_MAX)
    bound.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
    try:
        bound.bind(endpoint)
    except zmq.ZMQError as error:
        context.destroy(linger=0)
        raise ConfigError(f"can't listen at {endpoint}: {error.strerror}; see --host and --control-port") from error
    return bound
