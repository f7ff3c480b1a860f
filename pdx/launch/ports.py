"""Free TCP ports and HTTP probes of one host."""

from __future__ import annotations

import errno
import http.client
import random
import socket
from collections.abc import Callable
from urllib.parse import urlsplit, urlunsplit

from pdx.errors import ConfigError

# Below Linux's range for outgoing connections (32768-60999): an engine binds its port seconds after we chose it, and
# a port the kernel gives to a connection in between would be lost.
FIRST_PORT, LAST_PORT = 20_000, 32_000
TRIES = 200
PROBE_TIMEOUT_S = 1.0


def free_ports(count: int, *, host: str = "127.0.0.1", randomness: random.Random | None = None) -> list[int]:
    """Distinct ports of `host` that nobody listens on now. Raises ConfigError if there are none."""
    chosen: list[int] = []
    source = randomness or random.SystemRandom()
    for _ in range(TRIES):
        if len(chosen) == count:
            return chosen
        port = source.randrange(FIRST_PORT, LAST_PORT)
        if port not in chosen and _is_free(host, port):
            chosen.append(port)
    raise ConfigError(f"no {count} free ports between {FIRST_PORT} and {LAST_PORT} on {host}")


def answers(url: str) -> Callable[[], bool]:
    """A probe: does GET `url` answer 200 within a second?"""
    parts = urlsplit(url)
    target = urlunsplit(("", "", parts.path or "/", parts.query, ""))

    def probe() -> bool:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=PROBE_TIMEOUT_S)
        try:
            connection.request("GET", target)
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    return probe


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as listener:
        try:
            listener.bind((host, port))
        except PermissionError:
            return False
        except OSError as error:
            if isinstance(error, socket.gaierror):
                raise ConfigError(f"{host}: {error.strerror}") from error
            if error.errno == errno.EADDRNOTAVAIL:
                raise ConfigError(f"{host} is no address of this machine") from error
            return False
    return True
