"""Free TCP ports and HTTP probes of one host."""

from __future__ import annotations

import errno
import random
import re
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit, urlunsplit

from pdx.addresses import family_of
from pdx.errors import ConfigError

# Below Linux's range for outgoing connections (32768-60999): an engine binds its port seconds after we chose it, and
# a port the kernel gives to a connection in between would be lost.
FIRST_PORT, LAST_PORT = 20_000, 32_000
TRIES = 200
PORT_MAX = 65535
PROBE_TIMEOUT_S = 1.0
STATUS_OK = re.compile(rb"HTTP/1\.[01] 200")
STATUS_BYTES = len(b"HTTP/1.1 200")


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


def ports_from(first: int, count: int, *, host: str) -> list[int]:
    """These very ports. Raises ConfigError if there are none such, or they can't be had: whoever else listens there
    would be taken for the engine."""
    ports = list(range(first, first + count))
    if not 0 < first <= ports[-1] <= PORT_MAX:
        raise ConfigError(f"--port {first}: {count} from there on are not all between 1 and {PORT_MAX}")
    for port in ports:
        if not _is_free(host, port):
            raise ConfigError(
                f"--port: {port} of {host} is in use, or not for this user; name another, or none to get a free one"
            )
    return ports


def answers(url: str) -> Callable[[], bool]:
    """A probe: does GET `url` answer 200 within a second? All that counts is the first line, however slow the rest."""
    parts = urlsplit(url)
    target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
    question = f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode()

    def probe() -> bool:
        deadline = time.monotonic() + PROBE_TIMEOUT_S
        said = b""
        try:
            with socket.create_connection((parts.hostname, parts.port), timeout=PROBE_TIMEOUT_S) as connection:
                connection.sendall(question)
                while len(said) < STATUS_BYTES:
                    connection.settimeout(max(deadline - time.monotonic(), 1e-3))  # 0 would mean not to wait
                    more = connection.recv(STATUS_BYTES - len(said))
                    if not more:
                        return False
                    said += more
        except OSError:
            return False
        return STATUS_OK.fullmatch(said) is not None

    return probe


def _is_free(host: str, port: int) -> bool:
    try:
        with socket.socket(family_of(host), socket.SOCK_STREAM) as listener:
            # As servers do: of connections that have ended it may still be in use.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except PermissionError:
        return False
    except OSError as error:
        if isinstance(error, socket.gaierror):
            raise ConfigError(f"{host}: {error.strerror}") from error
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise ConfigError(f"{host} is no address of this machine") from error
        return False
    return True
