"""A daemon's connections to others: those that lead nowhere end too."""

from __future__ import annotations

import time
from collections import Counter

import zmq

from pdx.curve import lock
from pdx.daemon.peers import UNREACHED_S, Peers
from pdx.launch.ports import free_ports
from pdx.wire import DaemonRef, Drained

KEY = b"k" * 32
FAREWELL = Drained(handoff_id=b"h" * 16, attempt=0, lease_epoch=1, incarnation=1)


def test_a_farewell_to_a_dead_peer_does_not_keep_a_connection_to_it() -> None:
    with zmq.Context() as context:
        poller, counters, lost = zmq.Poller(), Counter[str](), list[str]()
        peers = Peers(context, poller, counters, cluster_key=KEY)
        dead = DaemonRef(
            daemon_id="dead", incarnation=1, control=f"tcp://127.0.0.1:{free_ports(1)[0]}", lanes=[]
        )  # fmt: skip
        peers.send(dead, FAREWELL)
        assert len(poller.sockets) == 1
        now = time.monotonic()
        peers.tick(lost.append, now)
        assert lost == []
        peers.tick(lost.append, now + UNREACHED_S + 1)
        assert (lost, counters["peers_not_reached"], poller.sockets) == ([dead.control], 1, [])
        peers.close()


class SlowToReturn(zmq.Socket[bytes]):
    """By the time `connect` returns the peer has been reached: on a busy machine a thread waits that long."""

    def connect(self, addr: str) -> None:
        super().connect(addr)
        if addr.startswith("tcp:"):  # not the monitor's own
            self.send(b"")
            assert self.peer.poll(10_000), "it is connected"


def test_a_peer_that_is_reached_at_once_is_not_lost() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        lock(server, KEY, server=True)
        port = server.bind_to_random_port("tcp://127.0.0.1")
        poller, counters, lost = zmq.Poller(), Counter[str](), list[str]()
        ours = zmq.Context.shadow(context)
        ours._socket_class = type("Socket", (SlowToReturn,), {"peer": server})
        peers = Peers(ours, poller, counters, cluster_key=KEY)
        to = DaemonRef(daemon_id="there", incarnation=1, control=f"tcp://127.0.0.1:{port}", lanes=[])
        peers.send(to, FAREWELL)
        peers.handle_ready(dict(poller.poll(10_000)), lost.append)
        peers.tick(lost.append, time.monotonic() + UNREACHED_S + 1)
        assert (lost, counters["peers_not_reached"]) == ([], 0)
        peers.close()
