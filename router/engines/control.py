"""The control socket, to which daemons connect: bound by a router, or by a hub for all workers of one.

Knows who is let in and how frames travel; what they say is the registry's business. Owned by the event loop.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import zmq
import zmq.asyncio

from pdx.addresses import has_ipv6
from pdx.curve import AllowList, lock
from pdx.errors import ConfigError
from pdx.router.metrics import Metrics

# Every daemon says one thing a second; more than this unheard means that the router is stuck anyway.
RECEIVE_QUEUE_MAX = 1024
# Welcomes and cancels are small; a daemon that reads none for so long has died.
SEND_QUEUE_MAX = 1024
HELLO_S = 0.5
# Between a worker and the hub, in place of a daemon's name: hello. With it, what a worker is until it has been told all
# that others know, and that it has been.
HELLO, NEW, TOLD = b"", b"new", b"told"
# No keys, another key than the cluster's, or one that is not on the list. Of what is no ZeroMQ there is no event.
REFUSED_PEERS = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class Control(Protocol):
    """Both kinds of ends. `endpoint` is where daemons connect."""

    endpoint: str

    async def run(self) -> None:
        """What must be done while frames come; ends by being cancelled."""

    async def receive(self) -> list[bytes]:
        """A daemon's name and its frame; more or fewer where somebody sends nonsense."""

    async def send(self, name: bytes, frame: bytes) -> None:
        """At once. Raises ZMQError if this daemon is gone, or reads nothing."""

    async def caught_up(self) -> None:
        """Returns when what somebody remembers of what daemons have said has been received."""

    def close(self) -> None:
        """Idempotent."""


class ControlSocket:
    """A bound one, locked with the cluster key."""

    def __init__(self, endpoint: str, *, cluster_key: bytes, metrics: Metrics) -> None:
        """Binds. Raises ConfigError if the endpoint is taken or malformed."""
        self._metrics = metrics
        self._context = zmq.asyncio.Context()
        self._allow = AllowList(self._context, cluster_key)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.rcvhwm = RECEIVE_QUEUE_MAX
        self._socket.sndhwm = SEND_QUEUE_MAX
        self._socket.router_mandatory = True  # an unknown daemon is an error to count, not a silence
        self._socket.router_handover = True  # a daemon that connects again gets its name back
        self._socket.ipv6 = has_ipv6(endpoint)
        lock(self._socket, cluster_key, server=True)
        self._failures = self._socket.get_monitor_socket(REFUSED_PEERS)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"can't listen on --control {endpoint}: {error.strerror}") from error
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def run(self) -> None:
        """Lets daemons in, and counts who is none."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._allow.run())
            tasks.create_task(self._count_refused_peers())

    async def receive(self) -> list[bytes]:
        return await self._socket.recv_multipart()

    async def send(self, name: bytes, frame: bytes) -> None:
        await self._socket.send_multipart([name, frame], flags=zmq.NOBLOCK)

    async def caught_up(self) -> None:
        """Nobody does."""

    def close(self) -> None:
        self._socket.disable_monitor()
        self._failures.close(linger=0)
        self._socket.close(linger=0)
        self._allow.close()
        self._context.term()

    async def _count_refused_peers(self) -> None:
        while True:
            await self._failures.recv_multipart()
            self._metrics.refused_peers.inc()


class SharedControl:
    """A worker's end of the hub (see `hub`): hears what all daemons say, and speaks to each."""

    def __init__(self, hub: str, endpoint: str, *, worker: int) -> None:
        """`hub`: where it listens for workers; `endpoint`: where it listens for daemons."""
        self.endpoint = endpoint
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndhwm = SEND_QUEUE_MAX
        self._socket.setsockopt(zmq.IDENTITY, b"worker %d" % worker)
        self._socket.connect(hub)
        self._told = asyncio.Event()

    async def run(self) -> None:
        """Says again and again that it is there: a hub that was started anew does not know."""
        while True:
            await self._socket.send_multipart([HELLO, b"" if self._told.is_set() else NEW])
            await asyncio.sleep(HELLO_S)

    async def receive(self) -> list[bytes]:
        while True:
            frames = await self._socket.recv_multipart()
            if frames != [HELLO, TOLD]:
                return frames
            self._told.set()

    async def caught_up(self) -> None:
        """The hub does."""
        await self._told.wait()

    async def send(self, name: bytes, frame: bytes) -> None:
        await self._socket.send_multipart([name, frame], flags=zmq.NOBLOCK)

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
