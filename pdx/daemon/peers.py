"""Outgoing ZeroMQ connections of a daemon: one DEALER per peer daemon, watched so that a death is noticed at once.

ZeroMQ tries for ever to reach an address at which nobody is any more, and keeps descriptors for that: a peer that is
not reached within UNREACHED_S is lost like one whose connection breaks.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

from pdx.addresses import has_ipv6
from pdx.curve import lock
from pdx.wire import DaemonRef, Message, encode

PEERS_MAX = 1024
SOCKETS_A_PEER = 3  # its own, and the two ends of its monitor
UNREACHED_S = 30.0
# A peer that stops reading must not make us hold its messages for ever: 10,000 are minutes of control traffic.
SEND_QUEUE_MAX = 10_000


class Peers:
    """Sends to peer daemons and reports those whose connection broke. Owned by the control thread."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        poller: zmq.Poller,
        counters: Counter[str],
        *,
        cluster_key: bytes,
    ) -> None:
        self._context = context
        self._cluster_key = cluster_key
        self._poller = poller
        self._counters = counters
        self._sockets: OrderedDict[str, zmq.Socket[bytes]] = OrderedDict()  # the one used last comes last
        self._monitors: dict[zmq.Socket[bytes], str] = {}
        self._unreached: dict[str, float] = {}  # control -> when it was first spoken to
        self._displaced: list[str] = []  # dropped for others, and nobody has been told yet

    def send(self, peer: DaemonRef, message: Message) -> None:
        """Queues a message; never blocks. What can't be queued is counted and lost: budgets cover it.

        That includes an address that ZeroMQ does not take: it comes from the peer.
        """
        try:
            self._socket(peer.control).send(encode(message), zmq.DONTWAIT)
        except zmq.ZMQError:
            self._counters["peer_messages_dropped"] += 1

    def handle_ready(self, ready: dict[object, int], lost: Callable[[str], None]) -> None:
        """Reads connection events of the sockets that the poller found readable."""
        for monitor, control in list(self._monitors.items()):
            if monitor not in ready:
                continue
            event = recv_monitor_message(monitor, zmq.DONTWAIT)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._unreached.pop(control, None)
            elif event == zmq.EVENT_DISCONNECTED:
                self._forget(control)
                lost(control)

    def tick(self, lost: Callable[[str], None], now: float) -> None:
        displaced, self._displaced = self._displaced, []
        for control in displaced:
            lost(control)
        for control in [control for control, since in self._unreached.items() if now - since > UNREACHED_S]:
            self._counters["peers_not_reached"] += 1
            self._forget(control)
            lost(control)

    def close(self) -> None:
        for control in list(self._sockets):
            self._forget(control)

    def _socket(self, control: str) -> zmq.Socket[bytes]:
        socket = self._sockets.get(control)
        if socket is None:
            if len(self._sockets) >= PEERS_MAX:
                self._displace(next(iter(self._sockets)))
            socket = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.IPV6, has_ipv6(control))
            socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MAX)
            lock(socket, self._cluster_key, server=False)
            # Before it connects: who looks later may miss that it was reached.
            monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
            try:
                socket.connect(control)
            except zmq.ZMQError:
                _close(socket, monitor)
                raise
            self._unreached[control] = time.monotonic()
            self._poller.register(monitor, zmq.POLLIN)
            self._sockets[control] = socket
            self._monitors[monitor] = control
        self._sockets.move_to_end(control)
        return socket

    def _displace(self, control: str) -> None:
        """For another peer. Whoever counts on it hears of that in the next turn: just now somebody is being sent to."""
        self._forget(control)
        self._displaced.append(control)
        self._counters["peers_displaced"] += 1

    def _forget(self, control: str) -> None:
        """Drops the connection with all it had queued: a peer that comes back is a new incarnation."""
        socket = self._sockets.pop(control)
        self._unreached.pop(control, None)
        monitor = next(m for m, c in self._monitors.items() if c == control)
        del self._monitors[monitor]
        self._poller.unregister(monitor)
        _close(socket, monitor)


def _close(socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
    socket.disable_monitor()
    monitor.close(0)
    socket.close(0)
