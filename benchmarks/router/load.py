"""A closed loop of N clients, with as little work as Python allows: times of first events, and events counted.

Every answer is looked through: one without its status, its events or its end is an error, and errors are no samples.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import uvloop

END = b"0\r\n\r\n"
DONE = b"data: [DONE]"
DEADLINE_S = 120.0
NUMBER = b"@number@"  # in a body: another one in each request, so that no two prompts are the same


@dataclass
class Samples:
    """What came back."""

    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: int = 0
    wall_s: float = 0.0


class _Client(asyncio.Protocol):
    """One connection that asks again as soon as it has its answer."""

    def __init__(
        self, request: Callable[[int], bytes], tokens: int, samples: Samples, left: list[int], over: asyncio.Event
    ) -> None:
        self._request, self._tokens, self._samples, self._left, self._over = request, tokens, samples, left, over
        self._reset()

    def _reset(self) -> None:
        self._first_s = 0.0
        self._events = 0
        self._tail = b""
        self._good = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self._ask()

    def _ask(self) -> None:
        if self._left[0] <= 0:
            self._left[1] -= 1
            self._transport.abort()
            if self._left[1] == 0:
                self._over.set()
            return
        self._left[0] -= 1
        self._reset()
        request = self._request(self._left[0])
        self._asked = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if not self._tail:
            self._good = data.startswith(b"HTTP/1.1 200")
        # An event may be cut anywhere: count over the seam, not twice what lies before it.
        seam = self._tail[-5:] + data
        self._events += seam.count(b"data: ")
        if self._events and not self._first_s:
            self._first_s = time.perf_counter() - self._asked
        self._tail = (self._tail + data)[-256:]
        if self._tail.endswith(END) or not self._good:
            self._finish()

    def _finish(self) -> None:
        samples = self._samples
        if self._good and DONE in self._tail and self._events - 1 == self._tokens:
            samples.first_s.append(self._first_s)
            samples.whole_s.append(time.perf_counter() - self._asked)
            samples.tokens += self._events - 1
        else:
            samples.errors += 1
        self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if self._left[1] > 0 and not self._transport.is_closing():
            self._samples.errors += 1


def request_of(url: str, body: bytes) -> bytes:
    """As OpenAI clients send it, to those that read it well enough."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


def closed_loop(url: str, body: bytes, *, clients: int, requests: int, tokens: int, first: int = 0) -> Samples:
    """So many requests by so many clients, one after the other each. Raises TimeoutError past DEADLINE_S.

    `first`: the lowest number that a request has.
    """
    return uvloop.run(_closed_loop(url, body, clients=clients, requests=requests, tokens=tokens, first=first))


async def _closed_loop(url: str, body: bytes, *, clients: int, requests: int, tokens: int, first: int) -> Samples:
    samples, over, left = Samples(), asyncio.Event(), [requests, clients]
    where, whole = urlsplit(url), request_of(url, body)
    before, number, after = whole.partition(NUMBER)

    def request(count: int) -> bytes:
        return before + (b"%0*d" % (len(NUMBER), first + count) if number else b"") + after

    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    for _ in range(clients):
        await loop.create_connection(lambda: _Client(request, tokens, samples, left, over), where.hostname, where.port)
    async with asyncio.timeout(DEADLINE_S):
        await over.wait()
    samples.wall_s = time.perf_counter() - began
    return samples
