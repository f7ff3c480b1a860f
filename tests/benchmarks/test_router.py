"""The router's benchmark counts what comes back, and nothing that is cut or wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from threading import Thread

import pytest
import uvloop

from benchmarks.harness import quota
from benchmarks.router.load import NUMBER, closed_loop
from benchmarks.router.mock import LAST, Engine

uvloop.run(asyncio.sleep(0))  # keeps a pipe of its own for good
BODY = {"stream": True, "max_tokens": 5, "temperature": 0.0, "prompt": NUMBER.decode()}


class Cutting(Engine):
    """Ends each answer one token early."""

    def _token(self, left: int, due: float) -> None:
        super()._token(max(1, left - 1), due)


class Failing(Engine):
    def _token(self, left: int, due: float) -> None:
        self._transport.write(LAST)

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")


@contextmanager
def engine(kind: type[Engine]) -> Iterator[str]:
    ready: Queue[tuple[asyncio.AbstractEventLoop, asyncio.Event, str]] = Queue()

    async def serve() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        server = await loop.create_server(kind, "127.0.0.1", 0)
        ready.put((loop, stop, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        await stop.wait()
        server.close()

    thread = Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    loop, stop, url = ready.get(timeout=10)
    try:
        yield url
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def ask(url: str) -> tuple[int, int, int]:
    seen = closed_loop(url, json.dumps(BODY).encode(), clients=3, requests=20, tokens=5)
    return len(seen.first_s), seen.tokens, seen.errors


@pytest.mark.parametrize(("kind", "seen"), [(Engine, (20, 100, 0)), (Cutting, (0, 0, 20)), (Failing, (0, 0, 20))])
def test_what_is_counted(kind: type[Engine], seen: tuple[int, int, int]) -> None:
    with engine(kind) as url:
        assert ask(url) == seen


def test_shares_of_a_core_or_a_reason() -> None:
    assert quota.why_not() == "" or "can't be used here" in quota.why_not()
