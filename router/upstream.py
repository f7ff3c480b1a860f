"""HTTP to the engines: whole answers, streams, health. Translates aiohttp's errors into UpstreamError.

Knows addresses and bytes; nothing of journeys, handoffs or clients.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType

import aiohttp

from pdx.errors import PdxError

CONNECT_S = 5.0  # engines are one hop away; past this the request is better served elsewhere
HEALTH_S = 2.0
# A whole answer is held in memory; logprobs of a long completion take some MiB.
ANSWER_BYTES_MAX = 256 << 20
STREAM_CHUNK_BYTES = 64 << 10
# Longer bodies are written in pieces: in one write they would hold up the loop, hence every other stream.
WHOLE_WRITE_BYTES_MAX = 256 << 10
# Idle connections are closed by the engine after 5 s; ours must go first, or a request could meet the closing.
KEEPALIVE_S = 3.0


class UpstreamError(PdxError):
    """An engine could not be reached or broke off. `unreachable`: nobody listens there, try another at once."""

    def __init__(self, reason: str, *, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable


class Upstream:
    """One client session for all engines. Use as an async context manager, on one event loop."""

    async def __aenter__(self) -> Upstream:
        # No limit on connections: the engines queue, and a queue here would hide their load from the policy.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, read_bufsize=STREAM_CHUNK_BYTES
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    @asynccontextmanager
    async def call(self, url: str, body: bytes, headers: Mapping[str, str]) -> AsyncIterator[Reply]:
        """Posts and yields the reply once its head is here. Leaving the block early drops the request upstream.

        Raises UpstreamError, also from the reply's methods.
        """
        data = body if len(body) <= WHOLE_WRITE_BYTES_MAX else io.BytesIO(body)
        with _translated():
            response = await self._session.post(url, data=data, headers=headers, allow_redirects=False)
        try:
            yield Reply(response)
        finally:
            response.close()  # gives the connection back if the body was read to its end, else closes it

    async def healthy(self, url: str) -> bool:
        """Whether GET `url` answers 200 within HEALTH_S."""
        try:
            async with asyncio.timeout(HEALTH_S), self._session.get(url) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return False


class Reply:
    """An engine's answer whose head has arrived."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.content_type = response.headers.get("Content-Type", "application/json")

    async def read(self) -> bytes:
        """The whole body, at most ANSWER_BYTES_MAX."""
        parts = bytearray()
        async for chunk in self.chunks():
            parts += chunk
            if len(parts) > ANSWER_BYTES_MAX:
                raise UpstreamError("answer_too_long")
        return bytes(parts)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        while True:
            with _translated():
                chunk = await self._response.content.readany()
            if not chunk:
                return
            yield chunk


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.InvalidURL) as error:
        raise UpstreamError("unreachable", unreachable=True) from error
    except aiohttp.ServerTimeoutError as error:
        raise UpstreamError("timeout", unreachable=True) from error
    except (aiohttp.ClientError, OSError) as error:
        raise UpstreamError("broken") from error
