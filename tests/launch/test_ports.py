"""Free ports and probes against real sockets."""

from __future__ import annotations

import http.server
import random
import socket
import threading
from collections.abc import Iterator

import pytest

from pdx.errors import ConfigError
from pdx.launch.ports import FIRST_PORT, LAST_PORT, PROBE_TIMEOUT_S, answers, free_ports, ports_from


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


@pytest.mark.parametrize(("first", "count"), [(99999, 1), (-5, 1), (-1, 3), (65535, 2)])
def test_ports_that_are_none(first: int, count: int) -> None:
    with pytest.raises(ConfigError, match=f"--port {first}: {count} from there on are not all between 1 and 65535"):
        ports_from(first, count, host="127.0.0.1")


def test_ports_that_are_named_and_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: {port} of 127.0.0.1 is in use"):
            ports_from(port, 1, host="127.0.0.1")
        with socket.create_connection(("127.0.0.1", port)), listener.accept()[0] as accepted:
            accepted.close()  # the kernel now remembers this connection, for a minute
    assert ports_from(port, 1, host="127.0.0.1") == [port]


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


def test_a_probe_ends_in_time_however_its_answer_drips() -> None:
    """Each read is in time, and the line is never whole."""
    enough = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            with listener.accept()[0] as accepted:
                for byte in b"HTTP/1.1".ljust(200):
                    if enough.wait(PROBE_TIMEOUT_S / 10):
                        return
                    accepted.sendall(bytes([byte]))

        thread = threading.Thread(target=drip)
        thread.start()
        assert not answers(f"http://127.0.0.1:{listener.getsockname()[1]}/health")()
        assert thread.is_alive(), "all 20 s of it were read"
        enough.set()
        thread.join()
