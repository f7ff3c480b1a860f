"""Free ports and probes against real sockets."""

from __future__ import annotations

import http.server
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from pdx.errors import ConfigError
from pdx.launch.ports import FIRST_PORT, LAST_PORT, answers, free_ports


def test_ports_are_distinct_and_outside_the_range_for_connections() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(FIRST_PORT <= port < LAST_PORT for port in ports)


def test_a_taken_port_is_not_chosen() -> None:
    (port,) = free_ports(1, randomness=random.Random(7))
    with socket.create_server(("127.0.0.1", port)):
        assert free_ports(1, randomness=random.Random(7)) != [port]


def test_an_address_of_somebody_else() -> None:
    with pytest.raises(ConfigError, match="no address of this machine"):
        free_ports(1, host="192.0.2.1")


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path in ("/health", "/ready?engines=2") else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_probe(url: str) -> None:
    assert answers(f"{url}/health")()
    assert answers(f"{url}/ready?engines=2")()
    assert not answers(f"{url}/other")()


def test_probe_of_nobody() -> None:
    (port,) = free_ports(1)
    assert not answers(f"http://127.0.0.1:{port}/health")()
