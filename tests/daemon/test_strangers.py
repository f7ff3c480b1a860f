"""Who is let in at the port that a daemon has for its peers: who holds the cluster key, and nobody else."""

from __future__ import annotations

import zmq
from fleet import Fleet, until

from pdx.curve import lock, public_key

WAIT_MS = 10_000


def test_who_knows_only_the_public_key_is_turned_away(fleet: Fleet) -> None:
    daemon, key = fleet.daemon(), fleet.key_file.read_bytes()
    with zmq.Context() as context:
        stranger, friend = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
        with stranger, friend, stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH) as events:
            stranger.linger = friend.linger = 0
            stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
            stranger.curve_serverkey = public_key(key)
            stranger.connect(daemon.ref.control)
            stranger.send(b"no frame of ours")
            assert events.poll(WAIT_MS), "nobody turned it away"
            assert daemon.counter("bad_frames") == 0, "not a word came through"
            lock(friend, key, server=False)
            friend.connect(daemon.ref.control)
            friend.send(b"nor is this")
            until(lambda: daemon.counter("bad_frames") == 1, "the other is heard")
