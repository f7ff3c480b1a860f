from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from benchmarks.harness.relay import Relay
from pdx.errors import PdxError

BODY = b"x" * 300_000


class _Engine(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(asked + BODY)

    def do_GET(self) -> None:
        self._answer(b"")

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def engine_url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Engine) as engine:
        engine.daemon_threads = True
        thread = threading.Thread(target=engine.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{engine.server_port}"
        engine.shutdown()
        thread.join()


def ask(connection: http.client.HTTPConnection, method: str, body: bytes = b"") -> bytes:
    connection.request(method, "/v1/completions", body)
    return connection.getresponse().read()


def test_bytes_pass_and_the_last_is_stamped(engine_url: str) -> None:
    with Relay() as relay:
        relay.target = engine_url
        connection = http.client.HTTPConnection(urlsplit(relay.url).netloc, timeout=5)
        first_ns = time.monotonic_ns()
        assert ask(connection, "POST", b"first") == b"first" + BODY
        first = relay.answered(first_ns).last_byte_ns
        assert first_ns < first < time.monotonic_ns()
        second_ns = time.monotonic_ns()
        assert ask(connection, "POST", b"second") == b"second" + BODY
        assert relay.answered(second_ns).last_byte_ns > second_ns
        assert relay.answers[0].last_byte_ns == first
        connection.close()


def test_health_checks_are_no_answers(engine_url: str) -> None:
    with Relay() as relay:
        relay.target = engine_url
        connection = http.client.HTTPConnection(urlsplit(relay.url).netloc, timeout=5)
        ask(connection, "POST", b"")
        stamped = relay.answered(0).last_byte_ns
        ask(connection, "GET")
        assert relay.answered(0).last_byte_ns == stamped
        with pytest.raises(PdxError):
            relay.answered(time.monotonic_ns())
        connection.close()


def test_without_an_engine_the_connection_closes() -> None:
    with Relay() as relay:
        relay.target = "http://127.0.0.1:9"
        connection = http.client.HTTPConnection(urlsplit(relay.url).netloc, timeout=5)
        with pytest.raises((OSError, http.client.HTTPException)):
            ask(connection, "POST", b"")
        connection.close()
