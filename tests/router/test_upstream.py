"""Connections to engines: kept and reused, given up, read as they come, against servers that do as told."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from engine_fakes import FakeEngine, fleet, until, within

from pdx.router.engines import upstream as code
from pdx.router.engines.connection import HEAD_BYTES_MAX, READ_AHEAD_BYTES, SEGMENT_BYTES
from pdx.router.engines.upstream import Upstream, UpstreamError

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"

Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[tuple[Upstream, str, list[int]]]:
    """(upstream, URL, how many connections there were)."""
    connections = [0]

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections[0] += 1
        try:
            await server(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with listening, Upstream() as upstream:
        yield upstream, f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/page", connections


def answering(*answers: bytes, heard: list[bytes] | None = None) -> Server:
    """These, one to each request of a connection, in pieces of one byte; then it closes."""

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if b"ength" in line), 0)
            body = await reader.readexactly(length)
            if heard is not None:
                heard.append(head + body)
            for place in range(len(answer)):
                writer.write(answer[place : place + 1])
                await writer.drain()

    return server


async def ask(upstream: Upstream, url: str, body: bytes = b"{}", **headers: str) -> tuple[int, str, bytes]:
    async with upstream.call(url, body, headers) as reply:
        return reply.status, reply.content_type, await reply.read()


@pytest.mark.parametrize("answer", [WHOLE, CHUNKED, b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE])
@within(10)
async def test_whole_answers_on_one_connection(answer: bytes) -> None:
    heard: list[bytes] = []
    async with serving(answering(*[answer] * 3, heard=heard)) as (upstream, url, connections):
        for _ in range(3):
            status, _, body = await ask(upstream, url + "?a=b", **{"X-A": "1", "X-B": "\udce9"})
            assert (status, body) == (200, b"hello")
        assert connections == [1]
        port = url.split(":")[2].split("/")[0].encode()
        assert heard[0] == (
            b"POST /page?a=b HTTP/1.1\r\nHost: 127.0.0.1:%b\r\nContent-Length: 2\r\nX-A: 1\r\nX-B: \xe9\r\n\r\n{}"
            % port
        )


@within(10)
async def test_a_call_that_has_begun_is_sent_before_anybody_waits_for_it() -> None:
    heard: list[bytes] = []
    async with serving(answering(WHOLE, WHOLE, heard=heard)) as (upstream, url, connections):
        first = upstream.call(url, b"1", {})
        first.begin()
        await asyncio.sleep(0)
        assert not heard, "no connection is kept yet: who enters opens one"
        async with first as reply:
            assert await reply.read() == b"hello"
        second = upstream.call(url, b"2", {})
        second.begin()
        await until(lambda: len(heard) == 2, "it has been sent")
        async with second as reply:
            assert await reply.read() == b"hello"
        second.drop()
        assert connections == [1]


@pytest.mark.parametrize("spoilt", [{"X-A": "1\r\nX-B: 2"}, {}])
@within(10)
async def test_a_call_that_can_not_begin_says_so_on_entry(spoilt: dict[str, str]) -> None:
    async with serving(answering(WHOLE)) as (upstream, url, _):
        call = upstream.call(url if spoilt else "http://", b"{}", spoilt)
        call.begin()
        with pytest.raises(UpstreamError):
            async with call:
                pass
        call.drop()


@within(10)
async def test_a_call_that_is_dropped_before_anybody_waits_is_gone_at_the_engine_too() -> None:
    left = asyncio.Event()

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answering(WHOLE)(reader, writer)
        await reader.readuntil(b"\r\n\r\n")
        try:
            await reader.read()
        finally:
            left.set()

    async with serving(server) as (upstream, url, connections):
        await ask(upstream, url)
        call = upstream.call(url, b"", {})
        call.begin()
        call.drop()
        call.drop()
        await left.wait()
        assert connections == [1]


@within(10)
async def test_an_answer_until_the_connection_closes() -> None:
    async with serving(answering(b"HTTP/1.1 200 OK\r\n\r\nhello")) as (upstream, url, connections):
        for count in (1, 2):
            assert await ask(upstream, url) == (200, "application/json", b"hello")
            assert connections == [count]


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"HTTP/1.1 200", b"nonsense\r\n\r\n", WHOLE[:-1], CHUNKED[:-5], CHUNKED[:-12] + b"zz\r\n",
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * HEAD_BYTES_MAX + b"\r\n\r\n", b"HTTP/1.1 101 Go\r\nUpgrade: x\r\n\r\n",
    ],
)  # fmt: skip
@within(10)
async def test_what_is_cut_or_no_http_is_broken(answer: bytes) -> None:
    async with serving(answering(answer)) as (upstream, url, _):
        with pytest.raises(UpstreamError, match="broken") as failed:
            await ask(upstream, url)
        assert not failed.value.unreachable


@pytest.mark.parametrize(
    "start", [b"HTTP/1.1 200 OK\r\nX-Long: ", CHUNKED[:-2] + b"X-Long: ", b"HTTP/1.1 200 ", b"HTTP/1.1 100 C\r\n\r\n"]
)
@within(10)
async def test_a_header_without_an_end_is_broken_off(start: bytes) -> None:
    """The parser shows none before its end."""

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        piece = start * 4096 if b"100" in start else b"x" * (1 << 16)
        writer.write(start)
        for _ in range(64):
            writer.write(piece)
            await writer.drain()
        await reader.read()

    async with serving(server) as (upstream, url, _):
        with pytest.raises(UpstreamError, match="broken"):
            await ask(upstream, url)


@within(10)
async def test_a_long_answer_in_one_piece_with_its_head_is_no_long_head() -> None:
    size = HEAD_BYTES_MAX + 3 * SEGMENT_BYTES
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(head + bytes(size))
        await writer.drain()

    async with serving(server) as (upstream, url, _):
        assert len((await ask(upstream, url))[2]) == size


@pytest.mark.parametrize("first", [WHOLE, CHUNKED])
@within(10)
async def test_two_answers_to_one_request_are_not_one(first: bytes) -> None:
    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(first + b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nevil!")
        await writer.drain()
        await reader.read()

    async with serving(server) as (upstream, url, connections):
        for count in (1, 2):
            assert (await ask(upstream, url))[2] == b"hello"
            assert connections == [count], "the connection is not used again"


@within(10)
async def test_what_came_before_the_break_is_told() -> None:
    async with serving(answering(CHUNKED[:-12])) as (upstream, url, _), upstream.call(url, b"", {}) as reply:
        told = b""
        with pytest.raises(UpstreamError):
            while chunk := await reply.chunk():
                told += chunk
        assert told == b"hel"


@within(10)
async def test_nobody_there() -> None:
    async with Upstream() as upstream:
        for url in ("http://127.0.0.1:1/", "ftp://127.0.0.1/", "http://[::1", "http://127.0.0.1:99999/", "nonsense"):
            with pytest.raises(UpstreamError) as failed:
                await ask(upstream, url)
            assert failed.value.unreachable
            assert not await upstream.healthy(url)


@within(10)
async def test_a_connection_that_the_engine_has_closed_is_not_used_again() -> None:
    async with serving(answering(WHOLE)) as (upstream, url, connections):
        await ask(upstream, url)
        await until(lambda: not any(each.reusable for idle in upstream._idle.values() for each in idle), "it is closed")
        await ask(upstream, url)
        assert connections == [2]


@within(10)
async def test_one_that_has_been_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(answering(WHOLE, WHOLE)) as (upstream, url, connections):
        await ask(upstream, url)
        monkeypatch.setattr(code, "KEEPALIVE_S", -1.0)
        await ask(upstream, url)
        assert connections == [2]


@within(10)
async def test_what_nobody_asks_for_again_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an engine that has left, say. What may still be used stays."""
    async with serving(answering(*[WHOLE] * 3)) as (upstream, url, connections):
        await ask(upstream, url)
        upstream.drop_idle()
        await ask(upstream, url)
        assert connections == [1]
        monkeypatch.setattr(code, "KEEPALIVE_S", -1.0)
        ((kept,),) = upstream._idle.values()
        upstream.drop_idle()
        assert not upstream._idle
        await until(lambda: not kept.reusable, "it is closed")
        await ask(upstream, url)
        assert connections == [2]


@within(10)
async def test_a_router_keeps_no_connection_to_an_engine_that_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "KEEPALIVE_S", 0.05)
    async with fleet(FakeEngine("d0", "decode")) as router:
        await router.ask({"model": "smol", "prompt": "x"})
        router.daemons[0].engines = []
        await until(lambda: not router.outside.directory.engines(), "it has left")
        await until(lambda: not router.outside.upstream._idle, "nothing of it is kept")


@within(10)
async def test_leaving_early_drops_the_request() -> None:
    gone = asyncio.Event()

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx")
        assert await reader.read() == b""
        gone.set()

    async with serving(server) as (upstream, url, _):
        async with upstream.call(url, b"{}", {}) as reply:
            assert await reply.chunk() == b"x"
        await gone.wait()
        waiting = asyncio.create_task(ask(upstream, url))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


@within(10)
async def test_a_client_that_reads_slowly_holds_little() -> None:
    """What the engine has sent stays in the kernel: it stops sending."""
    sent = [0]

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()
            sent[0] += 1 << 16

    async with serving(server) as (upstream, url, _), upstream.call(url, b"{}", {}) as reply:
        await until(lambda: reply._connection._paused, "it has stopped to read")
        assert len(await reply.chunk()) < READ_AHEAD_BYTES + (1 << 20)
        enough = sent[0] + (32 << 20)  # more than sockets hold
        while sent[0] < enough:  # it goes on
            await reply.chunk()


@within(10)
async def test_a_long_body_to_an_engine_that_refuses_it() -> None:
    heard = asyncio.Event()

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Large\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        await heard.wait()  # it reads nothing

    async with serving(server) as (upstream, url, _):
        try:
            assert (await ask(upstream, url, bytes(32 << 20)))[0] == 413
        finally:
            heard.set()


@within(4)
async def test_who_has_answered_before_the_whole_request_is_not_asked_on() -> None:
    """Such a server, uvicorn among them, takes what comes next for the rest of the first body."""

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(WHOLE)
        await writer.drain()
        if b"Content-Length: 2\r\n" not in head:
            await asyncio.sleep(5)  # it keeps the connection, and reads nothing for as long as this test lasts

    async with serving(server) as (upstream, url, connections):
        assert (await ask(upstream, url, bytes(32 << 20)))[2] == b"hello"
        assert (await ask(upstream, url))[2] == b"hello"
        assert connections == [2]


@within(10)
async def test_what_was_left_unread_is_not_the_next_ones() -> None:
    """A connection that holds more than is read ahead has stopped to read: it would never hear the next answer."""
    size = 4 * READ_AHEAD_BYTES

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n{}")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
            await writer.drain()

    async with serving(server) as (upstream, url, _):
        for _ in range(8):
            async with upstream.call(url, b"{}", {}) as reply:
                await reply.chunk()
                await until(lambda reply=reply: reply._connection._paused, "it has stopped to read")
        assert len((await ask(upstream, url))[2]) == size


@pytest.mark.parametrize("host", ["host..x", "x" * 64 + ".example"])
@within(10)
async def test_a_name_that_can_t_be_one_is_nobody(host: str) -> None:
    async with Upstream() as upstream:
        assert not await upstream.healthy(f"http://{host}:8000/health")


@within(10)
async def test_no_header_can_become_two() -> None:
    async with serving(answering(WHOLE)) as (upstream, url, connections):
        for value in ("a\r\nX-Evil: 1", "a\nX-Evil: 1", "a\rb"):
            with pytest.raises(UpstreamError):
                await ask(upstream, url, **{"X-A": value})
        assert connections == [0]


@within(10)
async def test_health_and_pages() -> None:
    busy = WHOLE.replace(b"200", b"503")
    for answers, healthy, page in (([WHOLE] * 2, True, b"hello"), ([busy] * 2, False, b""), ([b""], False, b"")):
        async with serving(answering(*answers)) as (upstream, url, _):
            assert await upstream.healthy(url) == healthy
            assert await upstream.page(url) == page


@within(10)
async def test_no_descriptors_left_says_nothing_about_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def none_left(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async with serving(answering(WHOLE)) as (upstream, url, _):
        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", none_left)
        with pytest.raises(UpstreamError, match="no_descriptors") as raised:
            await ask(upstream, url)
        assert not raised.value.unreachable
        assert not raised.value.blames
