"""A daemon's connections to others: those that lead nowhere end too."""

from __future__ import annotations

import signal
import time
from collections import Counter

import pytest
import zmq
from daemon.fleet import Fleet, until

from pdx import curve
from pdx.curve import lock
from pdx.daemon.peers import UNREACHED_S, Peers
from pdx.launch.ports import free_ports
from pdx.wire import DaemonRef, Fail

KEY = b"k" * 32
FAREWELL = Fail(handoff_id=b"h" * 16, attempt=0, lease_epoch=1, incarnation=1, reason="over")


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


def test_of_too_many_peers_the_one_that_was_not_spoken_to_for_longest_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdx.daemon.peers.PEERS_MAX", 2)
    first, second, third = (
        DaemonRef(daemon_id=f"d{port}", incarnation=1, control=f"tcp://127.0.0.1:{port}", lanes=[])
        for port in free_ports(3)
    )
    with zmq.Context() as context:
        poller, counters, lost = zmq.Poller(), Counter[str](), list[str]()
        peers = Peers(context, poller, counters, cluster_key=KEY)
        for peer in (first, second, first, third):
            peers.send(peer, FAREWELL)
        assert lost == [], "not in the middle of a word to another"
        for _ in range(2):
            peers.tick(lost.append, time.monotonic())
        assert (lost, counters["peers_displaced"], len(poller.sockets)) == ([second.control], 1, 2)
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


def test_a_peer_that_falls_silent_is_lost_though_nobody_has_closed_its_connection(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a host without power; here its daemon is stopped."""
    monkeypatch.setattr(curve, "HEARTBEAT_MS", 20)
    monkeypatch.setattr(curve, "SILENT_MS", 500)
    daemon = fleet.daemon()
    with zmq.Context() as context:
        poller, lost = zmq.Poller(), list[str]()
        peers = Peers(context, poller, Counter[str](), cluster_key=fleet.key_file.read_bytes())
        peers.send(daemon.ref, FAREWELL)
        peers.handle_ready(dict(poller.poll(10_000)), lost.append)
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            until(lambda: peers.handle_ready(dict(poller.poll(100)), lost.append) or lost, "it is lost")
        finally:
            daemon.process.send_signal(signal.SIGCONT)
            peers.close()
        assert lost == [daemon.ref.control]
