"""HTTP to the engines: whole answers, streams, health. Keeps connections to those that it has asked.

Knows addresses and bytes; nothing of journeys, handoffs or clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import ssl
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple
from urllib.parse import urlsplit

from pdx.router.engines.connection import PIECE_BYTES, EngineConnection, UpstreamError

# Ours, whoever we wanted to reach: out of descriptors, or of memory for sockets.
OURS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
CONNECT_S = 5.0  # engines are one hop away; past this the request is better served elsewhere
HEALTH_S = 2.0
PAGE_BYTES_MAX = 1 << 20
# A whole answer is held in memory; logprobs of a long completion take some MiB.
ANSWER_BYTES_MAX = 256 << 20
# Idle connections are closed by the engine after 5 s; ours must go first, or a request could meet the closing.
KEEPALIVE_S = 3.0
IDLE_MAX = 1024  # connections kept to one engine; those that a peak leaves over are closed

__all__ = ["Reply", "Upstream", "UpstreamError"]


class Address(NamedTuple):
    host: str
    port: int
    tls: bool


class Upstream:
    """Connections to all engines. Use as an async context manager, on one event loop."""

    async def __aenter__(self) -> Upstream:
        self._idle: dict[Address, deque[EngineConnection]] = {}
        self._open: set[EngineConnection] = set()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in [*self._open, *(each for idle in self._idle.values() for each in idle)]:
            connection.close()
        self._idle.clear()
        await asyncio.sleep(0)  # their transports close in the loop's next turn

    def call(self, url: str, body: bytes, headers: Mapping[str, str]) -> Call:
        """A block that posts, and gets the reply once its head is here. Leaving it early drops the request upstream.

        Raises UpstreamError on entry, and from the reply's methods. No limit on connections: the engines queue, and a
        queue here would hide their load from the policy.
        """
        return Call(self, url, body, headers)

    async def healthy(self, url: str) -> bool:
        """Whether GET `url` answers 200 within HEALTH_S."""
        return await self._get(url) is not None

    async def page(self, url: str) -> bytes:
        """What GET `url` answers within HEALTH_S, if that is 200 and at most PAGE_BYTES_MAX; else nothing."""
        return await self._get(url) or b""

    async def _get(self, url: str) -> bytes | None:
        try:
            async with asyncio.timeout(HEALTH_S), Call(self, url, None, {}) as reply:
                return await reply.read(PAGE_BYTES_MAX) if reply.status == 200 else None
        except (UpstreamError, TimeoutError):
            return None

    async def connection(self, address: Address) -> EngineConnection:
        """One of ours to there, or a new one; `done_with` takes it back. Raises UpstreamError."""
        return self.kept(address) or await self._connected(address)

    def kept(self, address: Address) -> EngineConnection | None:
        """One of ours to there that nobody uses; `done_with` takes it back."""
        idle, oldest = self._idle.get(address), time.monotonic() - KEEPALIVE_S
        while idle:
            connection = idle.pop()
            if connection.reusable and connection.idle_since >= oldest:
                self._open.add(connection)
                return connection
            connection.close()
        return None

    def drop_idle(self) -> None:
        """Closes what has been kept for too long to be used: also of addresses that nobody will ask again."""
        oldest = time.monotonic() - KEEPALIVE_S
        for address, idle in list(self._idle.items()):
            while idle and idle[0].idle_since < oldest:  # who was used last comes last
                idle.popleft().close()
            if not idle:
                del self._idle[address]

    async def _connected(self, address: Address) -> EngineConnection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await loop.create_connection(
                    EngineConnection, address.host, address.port, ssl=_tls() if address.tls else None
                )
        except TimeoutError as error:
            raise UpstreamError("timeout", unreachable=True) from error
        except (OSError, UnicodeError) as error:  # the second of names that can't be ones
            if getattr(error, "errno", None) in OURS:
                raise UpstreamError("no_descriptors", blames=False) from error
            raise UpstreamError("unreachable", unreachable=True) from error
        self._open.add(connection)
        return connection

    def done_with(self, address: Address, connection: EngineConnection) -> None:
        """Keeps it if its answer was read to the end, else closes it."""
        self._open.discard(connection)
        idle = self._idle.setdefault(address, deque())
        if not connection.reusable or len(idle) >= IDLE_MAX:
            connection.close()
            return
        connection.idle_since = time.monotonic()
        idle.append(connection)


class Call:
    """One request, and its reply for as long as the block. (A class, and no generator: every request of a client makes
    two of these, or three.)"""

    __slots__ = ("_address", "_body", "_connection", "_headers", "_upstream", "_url")

    def __init__(self, upstream: Upstream, url: str, body: bytes | None, headers: Mapping[str, str]) -> None:
        """`body`: None for GET."""
        self._upstream, self._url, self._body, self._headers = upstream, url, body, headers
        self._connection: EngineConnection | None = None

    def begin(self) -> None:
        """Sends it now, if it is short and a connection is kept for it: an engine can be at work before the task has
        begun that waits for it. (uvloop 0.23 writes at once, an older one when the loop's turn is over.) After this
        enter the block, or `drop` it."""
        if len(self._body or b"") > PIECE_BYTES:
            return
        with contextlib.suppress(UpstreamError):  # who enters hears of it
            head, body = self._request()
            self._connection = self._upstream.kept(self._address)
            if self._connection is not None:
                self._connection.post(head, body)

    def drop(self) -> None:
        """Gives up the request and its reply, wherever they are, and the block with them; does nothing after it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._upstream.done_with(self._address, connection)

    async def __aenter__(self) -> Reply:
        try:
            if self._connection is None:
                head, body = self._request()
                self._connection = await self._upstream.connection(self._address)
                await self._connection.send(head, body)
            await self._connection.head()
            return Reply(self._connection)
        except BaseException:
            self.drop()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drop()

    def _request(self) -> tuple[bytes, bytes]:
        """As clients sent it, byte for byte."""
        self._address, host, path = _taken_apart(self._url)
        if self._body is None:
            head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{_lines(self._headers)}\r\n"
        else:
            length = f"Content-Length: {len(self._body)}\r\n"
            head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\n{length}{_lines(self._headers)}\r\n"
        return head.encode("utf-8", "surrogateescape"), self._body or b""


class Reply:
    """An engine's answer whose head has arrived."""

    def __init__(self, connection: EngineConnection) -> None:
        self._connection = connection
        self.status = connection.status
        self.content_type = connection.content_type
        self.retry_after_s = connection.retry_after_s

    async def read(self, bytes_max: int = ANSWER_BYTES_MAX) -> bytes:
        """The whole body, if it has not more bytes."""
        parts = bytearray()
        while chunk := await self._connection.chunk():
            parts += chunk
            if len(parts) > bytes_max:
                raise UpstreamError("answer_too_long")
        return bytes(parts)

    async def chunk(self) -> bytes:
        """The body as it comes; empty at its end."""
        return await self._connection.chunk()


@functools.lru_cache(maxsize=8192)
def _taken_apart(url: str) -> tuple[Address, str, str]:
    """Where to connect, what Host says, and the page. Raises UpstreamError."""
    try:
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError
        address = Address(parts.hostname, parts.port or (443 if tls else 80), tls)
    except ValueError as error:
        raise UpstreamError("unreachable", unreachable=True) from error
    path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
    return address, parts.netloc.rpartition("@")[2], path


def _lines(headers: Mapping[str, str]) -> str:
    """Raises UpstreamError if a value would end its line: it would go on as a header of its own."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if not lines.count("\r") == lines.count("\n") == len(headers):
        raise UpstreamError("broken")
    return lines


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
