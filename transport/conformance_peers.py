"""What every lane must do when peers are strangers, die or come back: conformance checks that need one process only."""

from __future__ import annotations

import contextlib
import random
import socket
from urllib.parse import urlsplit

from pdx.transport.api import Copy, PutDone, PutFailed, Span
from pdx.transport.side import MEMORY_BYTES, WAIT_S, MakePair, Side, arrivals_of, losses_of, sides


def check_hostile_bytes(make_pair: MakePair) -> None:
    """Garbage and other versions cost their sender the connection and nobody else anything."""
    with sides(make_pair) as (_, near, far, channel):
        address = urlsplit(far.lane.endpoint)
        if address.port is None:
            return  # nobody can talk to it from outside
        rng = random.Random(6)  # noqa: S311 - seeded on purpose
        before = bytes(far.memory)
        for garbage in (b"", b"PDXL", b"PDXL\xff\x01" + bytes(34), b"\xff" * 64, rng.randbytes(4096)):
            with socket.create_connection((address.hostname, address.port), timeout=WAIT_S) as connection:
                with contextlib.suppress(OSError):  # it may be dropped at any moment
                    connection.sendall(garbage)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(4096):
                        pass
        assert far.memory == before, "garbage changed memory"
        window = far.region.open_window([Span(0, 100)])
        near.put(channel, window, [Copy(0, 0, 100)], notice=b"fine")
        far.wait_arrived(b"fine")
        assert arrivals_of(far.events) == [b"fine"]


def check_peer_of_another_kind(make_pair: MakePair) -> None:
    """Who answers with another version, with garbage or by hanging up is a lost peer, not a hang."""
    with sides(make_pair) as (_, near, far, channel):
        address = urlsplit(far.lane.endpoint)
        if address.port is None:
            return  # nobody can pretend to be it
        for answer in (b"PDXL\xff\x02" + bytes(34), b"\xff" * 64, b""):
            with socket.create_server((address.hostname or "", 0)) as impostor:
                impostor.settimeout(WAIT_S)
                there = near.lane.connect(f"{address.scheme}://{address.hostname}:{impostor.getsockname()[1]}")
                ticket = near.put(there, 1, [Copy(0, 0, 100)], notice=b"secret")
                connection, _ = impostor.accept()
                with connection:
                    connection.settimeout(WAIT_S)
                    greeting = connection.recv(1 << 16)
                    with contextlib.suppress(OSError):  # it may hang up at any moment
                        connection.sendall(answer)
                        connection.shutdown(socket.SHUT_WR)
                    near.wait_lost(there)
                assert isinstance(near.wait_end(ticket), PutFailed), "a put to a stranger did not fail"
                assert b"secret" not in greeting, "a stranger was told a notice"
        window = far.region.open_window([Span(0, 100)])
        near.put(channel, window, [Copy(0, 0, 100)], notice=b"fine")
        far.wait_arrived(b"fine")


def check_peer_killed(make_pair: MakePair) -> None:
    """A dying peer: every open ticket ends, before PeerLost where nobody may read its source any more; PeerLost comes
    once; later puts fail, not hang."""
    with sides(make_pair) as (pair, near, far, channel):
        window = far.region.open_window([Span(0, MEMORY_BYTES)])
        near.put(channel, window, [], notice=b"up")
        far.wait_arrived(b"up")
        tickets = [near.put(channel, window, [Copy(0, 0, MEMORY_BYTES)], queue=b"%d" % (n % 3)) for n in range(24)]
        pair.kill_far()
        near.wait_lost(channel)
        for ticket in tickets:
            near.wait_end(ticket)
        loss_index = near.events.index(losses_of(near.events, channel)[0])
        ended_before = [event.ticket for event in near.events[:loss_index] if isinstance(event, PutDone | PutFailed)]
        are_over = near.lane.checked_by == "sender" or set(tickets) <= set(ended_before)
        assert are_over, "PeerLost came before the end of an open put"
        late = near.put(channel, window, [], notice=b"late")
        assert isinstance(near.wait_end(late), PutFailed), "a put on a lost channel did not fail"
        assert len(losses_of(near.events, channel)) == 1, "PeerLost more than once"


def check_idle_peer_killed(make_pair: MakePair) -> None:
    """The loss of a peer is noticed without any put under way."""
    with sides(make_pair) as (pair, near, far, channel):
        window = far.region.open_window([])
        near.put(channel, window, [], notice=b"up")
        far.wait_arrived(b"up")
        pair.kill_far()
        near.wait_lost(channel)


def check_unreachable(make_pair: MakePair) -> None:
    """Connecting to nobody is an event, and puts queued meanwhile fail."""
    with sides(make_pair) as (pair, near, far, first):
        endpoint = far.lane.endpoint
        pair.kill_far()
        near.wait_lost(first)
        channel = near.lane.connect(endpoint)
        assert channel != first, "a lost channel was handed out again"
        ticket = near.put(channel, 1, [], notice=b"")
        near.wait_lost(channel)
        assert isinstance(near.wait_end(ticket), PutFailed), "a put to nobody did not fail"


def check_reconnect(make_pair: MakePair) -> None:
    """A new lane at the endpoint of a dead one is reached by a new channel; old windows are unknown to it."""
    with sides(make_pair) as (pair, near, far, first):
        old_window = far.region.open_window([Span(0, MEMORY_BYTES)])
        endpoint = far.lane.endpoint
        near.put(first, old_window, [], notice=b"up")
        far.wait_arrived(b"up")
        pair.kill_far()
        near.wait_lost(first)
        revived = Side(pair.revive_far(), seed=5)
        assert revived.lane.endpoint == endpoint, "revived elsewhere"
        channel = near.lane.connect(endpoint)
        assert channel != first, "a lost channel was handed out again"
        window = revived.region.open_window([Span(0, MEMORY_BYTES)])
        near.put(channel, old_window, [Copy(0, 0, MEMORY_BYTES)], notice=b"old")
        near.put(channel, window, [Copy(0, 0, MEMORY_BYTES)], notice=b"new")
        revived.wait_arrived(b"new")
        assert arrivals_of(revived.events) == [b"new"], "a window outlived its lane"
        assert revived.memory == near.memory
