"""Locked control sockets: who has another key is not heard, and what no decoder would take is not even received."""

from __future__ import annotations

import pytest
import zmq

from pdx.curve import lock
from pdx.wire import FRAME_BYTES_MAX

KEY = b"k" * 32
WAIT_MS = 10_000


def pair(context: zmq.Context, *, theirs: bytes) -> tuple[zmq.Socket, zmq.Socket]:
    server, client = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    for socket in (server, client):
        socket.linger = 0
    lock(server, KEY, server=True)
    lock(client, theirs, server=False)
    server.bind("tcp://127.0.0.1:0")
    client.connect(server.getsockopt_string(zmq.LAST_ENDPOINT))
    return server, client


def test_too_large_a_message_costs_its_sender_the_connection() -> None:
    with zmq.Context() as context:
        server, client = pair(context, theirs=KEY)
        with server, client, client.get_monitor_socket(zmq.EVENT_DISCONNECTED) as events:
            client.send(b"hello")
            assert server.poll(WAIT_MS)
            peer, _ = server.recv_multipart()
            server.send_multipart([peer, bytes(FRAME_BYTES_MAX)])
            assert client.poll(WAIT_MS)
            assert len(client.recv()) == FRAME_BYTES_MAX
            server.send_multipart([peer, bytes(FRAME_BYTES_MAX + 1)])
            assert events.poll(WAIT_MS), "the connection stayed"
            assert not client.poll(0)


@pytest.mark.parametrize("theirs", [b"another key" * 3])
def test_another_key_is_not_heard(theirs: bytes) -> None:
    with zmq.Context() as context:
        server, client = pair(context, theirs=theirs)
        watched = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_DISCONNECTED
        with server, client, client.get_monitor_socket(watched) as events:
            client.send(b"hello")
            assert events.poll(WAIT_MS), "nobody hung up"
            assert not server.poll(0)
