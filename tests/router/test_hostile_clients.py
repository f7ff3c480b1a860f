"""What anybody may send to the router's open ports: each gets its status, is counted, and the next request is served.

Handles that daemons are to refuse (forged, replayed, expired) are in tests/daemon/test_handoff_pairs and test_hostile.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import zmq
import zmq.asyncio
from engine_fakes import KEY, FakeEngine, Fleet, fleet, until, verified, within

from pdx.curve import public_key

PROMPT = {"model": "smol", "prompt": "Once upon a time", "max_tokens": 8}
FORGED = {"do_remote_prefill": True, "pdx_handle": "forged by a client", "remote_host": "10.0.0.1", "remote_port": 22}


@asynccontextmanager
async def attacked(**changed: Any) -> AsyncIterator[tuple[Fleet, FakeEngine, FakeEngine]]:
    """A pair behind a router, which must still serve when the attack is over."""
    p, d = FakeEngine("p0", "prefill"), FakeEngine("d0", "decode")
    async with fleet(p, d, **changed) as router:
        yield router, p, d
        p.requests.clear()
        status, answer, _ = await router.ask(PROMPT)
        assert (status, answer["choices"][0]["text"]) == (200, "by d0")
        assert len(p.requests) == 1
        assert await router.metric("pdx_router_inflight") == 0


async def raw(router: Fleet, request: bytes) -> bytes:
    """All that comes back on one connection until the router closes it."""
    host, port = router.published.http.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@asynccontextmanager
async def connected(router: Fleet) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = router.published.http.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def post(path: str = "/v1/completions", headers: str = "", body: bytes = b"{}") -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    )
    return head.encode() + body


NO_HTTP = {
    "garbage": b"\x00\xff\x16\x03\x01" * 40 + b"\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "one long header": post(headers=f"X-Long: {'x' * 20_000}\r\n"),
    "many headers": post(headers="".join(f"X-{n}: 1\r\n" for n in range(5000))),
    "a long line": b"GET /" + b"a" * 50_000 + b" HTTP/1.1\r\n\r\n",
    "two lengths": post(headers="Content-Length: 5\r\n"),
    "two framings": post(headers="Transfer-Encoding: chunked\r\n"),
    "a negative length": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    "a folded header": post(headers="X-A: 1\r\n folded: yes\r\n"),
}


@pytest.mark.parametrize("name", NO_HTTP)
@within(20)
async def test_what_is_no_http(name: str) -> None:
    async with attacked() as (router, p, _):
        answer = await raw(router, NO_HTTP[name])
        assert answer.startswith(b"HTTP/1.1 400 ") or answer.startswith(b"HTTP/1.0 400 "), answer[:200]
        assert b'"BadRequestError"' in answer
        assert await router.metric('pdx_router_malformed_total{code="400"}') == 1
        assert not p.requests


@within(20)
async def test_random_bytes() -> None:
    luck = random.Random(5)
    heads = [
        b"",
        b"POST /v1/completions HTTP/1.1\r\n",
        post()[:-4],
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ]
    async with attacked(idle_s=0.5, request_timeout_s=0.5) as (router, _, d):
        floods = [luck.choice(heads) + luck.randbytes(luck.randrange(1, 5000)) for _ in range(60)]
        await asyncio.gather(*(raw(router, flood) for flood in floods))
        assert not d.requests


@within(20)
async def test_a_slow_head_is_cut() -> None:
    """Whether nothing comes, or a byte now and then: also on a connection that has been served before."""
    async with attacked(idle_s=0.4) as (router, _, _):
        host, port = router.published.http.removeprefix("http://").split(":")

        async def dribble(start: bytes) -> None:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(start)
            try:
                for byte in b"GET /health HTTP/1.1\r\nX-Slow: " + b"x" * 1000:
                    if await read_or_wait(reader, 0.02):
                        return
                    writer.write(bytes([byte]))
                raise AssertionError("a head may take 20 s")
            except ConnectionError:
                pass
            finally:
                writer.close()

        async def read_or_wait(reader: asyncio.StreamReader, seconds: float) -> bool:
            """Whether the end has come."""
            try:
                async with asyncio.timeout(seconds):
                    while await reader.read(1 << 16):
                        pass
                    return True
            except TimeoutError:
                return False

        assert await raw(router, b"") == b""
        await dribble(b"")
        await dribble(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")


@within(20)
async def test_a_slow_body_is_cut() -> None:
    async with attacked(request_timeout_s=0.3) as (router, _, _):
        assert b" 408 " in await raw(router, post(body=b"")[:-2].replace(b": 0", b": 100") + b"\r\n{")
        assert await router.metric('pdx_router_refused_total{reason="slow_body"}') == 1


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@within(20)
async def test_a_body_that_is_not_encoded_as_it_says(encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    async with attacked() as (router, _, _):
        broken = post(headers=f"Content-Encoding: {encoding}\r\n", body=b"0123456789")
        answer = await raw(router, broken)
        assert answer.startswith(b"HTTP/1.1 400 ") and b'"BadRequestError"' in answer
        head, _, body = broken.replace(b"/v1/completions", b"/nowhere", 1).partition(b"\r\n\r\n")
        async with connected(router) as (reader, writer):
            writer.write(head + b"\r\n\r\n")
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 404 ")
            writer.write(body)  # which nobody wants any more
            with suppress(ConnectionResetError):
                await reader.read()
        assert await router.metric('pdx_router_refused_total{reason="broken_body"}') == 1
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("end", [b"zz\r\n{}\r\n", b"2\r\n{}XX0\r\n\r\n"])
@within(20)
async def test_a_body_that_goes_on_as_no_http_is_answered_at_once(end: bytes) -> None:
    async with attacked() as (router, _, _), connected(router) as (reader, writer):
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
        )
        await until(lambda: router.outside.under_way == 1, "its body is read")
        writer.write(end)
        answer = await reader.read()  # to the end: the connection is closed
        assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1
        assert await router.metric('pdx_router_refused_total{reason="broken_body"}') == 1


@within(20)
async def test_bodies_that_are_too_much() -> None:
    async with attacked(body_bytes_max=1 << 20) as (router, p, _):
        url = router.published.http + "/v1/completions"
        big = json.dumps({**PROMPT, "prompt": "x" * (2 << 20)}).encode()
        bomb = gzip.compress(json.dumps({**PROMPT, "prompt": "x" * (64 << 20)}).encode())
        for data, headers in ((io.BytesIO(big), {}), (bomb, {"Content-Encoding": "gzip"})):
            async with router.client.post(url, data=data, headers=headers) as reply:
                assert (reply.status, (await reply.json())["error"]["type"]) == (413, "RequestEntityTooLargeError")
        assert await router.metric('pdx_router_refused_total{reason="too_large"}') == 2
        for body in (b"[" * 100_000, b'{"a":' * 100_000, b'{"model":"smol","prompt":1e999999}', b"\xff\xfe", b"null"):
            async with router.client.post(url, data=body) as reply:
                assert reply.status == 400
        assert await router.metric('pdx_router_refused_total{reason="not_json"}') >= 4
        assert not p.requests


@within(20)
async def test_bodies_that_are_too_much_together() -> None:
    """Those that are read, and those of requests under way; however they end, the next has all the room."""
    whole = json.dumps(PROMPT).encode().ljust(1 << 20)  # bytes: all that there is
    async with attacked(body_bytes_max=1 << 20, bodies_bytes_max=1 << 20, request_timeout_s=5.0) as (router, p, _):

        async def sent(body: bytes) -> tuple[int, str]:
            async with router.client.post(router.published.http + "/v1/completions", data=io.BytesIO(body)) as reply:
                return reply.status, reply.headers.get("Retry-After", "")

        async def is_full() -> bool:
            return await sent(whole) == (503, "1")

        async with connected(router) as (_, writer):
            writer.write(post(body=whole)[: 700 << 10])
            await until(is_full, "what it has sent takes the room")
            assert await router.metric('pdx_router_refused_total{reason="no_room"}') >= 1
            assert (await router.ask(PROMPT))[0] == 200, "there is room for a small one"
        await until(lambda: router.outside.under_way == 0, "it has left")
        assert (await sent(whole))[0] == 200
        p.fault = "hang"
        asked = asyncio.create_task(sent(whole))
        count = len(p.requests)
        await until(lambda: len(p.requests) > count, "it was asked")
        assert await is_full()
        asked.cancel()
        await until(lambda: router.outside.under_way == 0, "it has left")
        p.fault = ""
        for body, status in ((b"[" * (1 << 20), 400), (whole + b" ", 413), (whole, 200)):
            assert (await sent(body))[0] == status


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../reset_prefix_cache", "/v1/%2e%2e/reset_prefix_cache", "/v1/..%2freset_prefix_cache", "/v1//sleep",
        "/v1/%252e%252e/sleep", "/v1/x%3fy", "/v1/x%0d%0aX-Evil:1", "/v1/.", "/sleep", "/collective_rpc",
        "http://elsewhere/sleep", "/tokenize/../sleep", "/v1/completions%00", "/v1/x;y", "/v1/\u2026",
    ],
)  # fmt: skip
@within(20)
async def test_no_path_leads_to_another_page_of_an_engine(path: str) -> None:
    async with attacked() as (router, p, d):
        answer = await raw(router, post(path, body=json.dumps(PROMPT).encode()))
        assert answer.split(b" ", 2)[1] in (b"400", b"404", b"405"), answer[:200]
        assert not [request for engine in (p, d) for request in engine.requests if "path" in request]


@within(20)
async def test_methods() -> None:
    async with attacked() as (router, _, _):
        for method in (b"GET", b"PUT", b"DELETE", b"CONNECT", b"TRACE", b"OPTIONS", b"QUERY"):
            answer = await raw(router, post().replace(b"POST", method, 1))
            assert answer.split(b" ", 2)[1] in (b"400", b"404", b"405"), (method, answer[:200])


@within(20)
async def test_forged_parameters_reach_no_engine() -> None:
    """Neither by their own name, nor twice in one object, nor escaped."""
    async with attacked() as (router, p, d):
        plain = json.dumps({**PROMPT, "kv_transfer_params": FORGED})
        twice = plain[:-1] + ',"kv_transfer_params":' + json.dumps(FORGED) + "}"
        escaped = plain.replace("kv_transfer_params", "kv\\u005ftransfer_params")
        for text in (
            plain,
            twice,
            escaped,
            plain.replace('"max_tokens"', '"ec_transfer_params": {}, "n": 2, "max_tokens"'),
        ):
            async with router.client.post(router.published.http + "/v1/completions", data=text) as reply:
                assert reply.status == 200
        assert "forged" not in json.dumps([*p.requests, *d.requests])
        assert "10.0.0.1" not in json.dumps([*p.requests, *d.requests])
        assert await router.metric("pdx_router_stripped_params_total") == 4


@within(20)
async def test_headers_that_steer_are_not_ours_to_pass() -> None:
    async with attacked() as (router, p, d):
        headers = {
            "X-data-parallel-rank": "1", "X-Request-Id": "10.0.0.1:22/../x y", "Cookie": "a=b", "x-pdx-way": "alone",
            "X-Forwarded-For": "1.2.3.4", "traceparent": "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01",
        }  # fmt: skip
        status, _, shown = await router.ask(PROMPT, headers=headers)
        assert status == 200
        for engine in (p, d):
            got = engine.headers[0]
            assert not {"X-data-parallel-rank", "Cookie", "x-pdx-way", "X-Forwarded-For"} & set(got)
            assert got["X-Request-Id"] == shown["X-Request-Id"] != headers["X-Request-Id"]
            assert got["traceparent"] == headers["traceparent"]
        assert verified(p.requests[0], time.time()).traceparent == headers["traceparent"], "and so the daemons know it"
        status, _, _ = await router.ask(PROMPT, headers={"traceparent": "00-" + "é" * 32})
        assert "traceparent" not in p.headers[1]


@within(20)
async def test_a_client_that_reads_nothing_holds_little() -> None:
    """It pipelines, and takes no answer: reading from it stops, others are served."""
    async with attacked(request_timeout_s=2.0) as (router, _, d):
        host, port = router.published.http.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1)
        one = post(body=json.dumps({**PROMPT, "n": 2}).encode()).replace(b"Connection: close\r\n", b"")
        for _ in range(500):
            writer.write(one)
        await until(lambda: bool(d.requests), "the first was served")
        assert (await router.ask(PROMPT))[0] == 200
        writer.transport.abort()


@within(20)
async def test_a_large_answer_that_nobody_reads_is_dropped_in_time() -> None:
    async with attacked(request_timeout_s=4.0) as (router, _, d):
        d.padding = "x" * (12 << 20)  # more than the sockets on its way hold
        host, port = router.published.http.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1)
        writer.write(post(body=json.dumps({**PROMPT, "n": 2}).encode()))
        await until(lambda: bool(d.requests), "it was asked")
        await until(lambda: not router.outside.in_flight, "the engine has nothing to do with it any more")
        await until(lambda: router.outside.under_way == 0, "its deadline has passed")
        with suppress(ConnectionResetError, asyncio.IncompleteReadError):
            while await reader.read(1 << 20):
                pass
        writer.transport.abort()
        d.padding = ""


@within(20)
async def test_who_waits_to_be_told_to_send_is_told() -> None:
    async with attacked() as (router, _, _):
        host, port = router.published.http.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        whole = post(body=json.dumps(PROMPT).encode())
        head, _, body = whole.partition(b"\r\n\r\n")
        writer.write(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(body)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.transport.abort()


@within(20)
async def test_garbage_on_the_control_socket() -> None:
    """From somebody who holds the key. (Others never get a word through: test_router_main.)"""
    luck = random.Random(7)
    async with attacked() as (router, _, _):
        daemon = router.daemons[0]
        for _ in range(200):
            await daemon.socket.send(b"PDX" + luck.randbytes(luck.randrange(200)))
        await daemon.socket.send_multipart([b"", b"a", b"b"])
        await router.reaches("pdx_router_bad_frames_total", 201)


@within(20)
async def test_who_does_not_speak_zeromq_with_our_keys_is_counted() -> None:
    """Plain bytes, somebody without keys, and one who has found out the public key but is not on the list."""
    async with attacked() as (router, _, _):
        host, port = router.published.control.removeprefix("tcp://").split(":")
        before = await router.metric("pdx_router_refused_peers_total")
        greetings = (b"GET / HTTP/1.1\r\n\r\n" * 9, b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(80))
        for greeting, counts in zip(greetings, (0, 1), strict=True):  # ZeroMQ says nothing of what is none of it
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(greeting)
            with suppress(ConnectionResetError):
                await reader.read()  # to the end: it is dropped
            writer.close()
            before += counts
            await router.reaches("pdx_router_refused_peers_total", before)

        async def counted() -> bool:
            return await router.metric("pdx_router_refused_peers_total") > before

        context = zmq.asyncio.Context()
        socket = context.socket(zmq.DEALER)
        try:
            socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
            socket.curve_serverkey = public_key(KEY)
            socket.connect(router.published.control)
            await socket.send(b"let me in")
            await until(counted, "and it is counted, as often as it tries")
            assert await router.metric("pdx_router_bad_frames_total") == 0, "not a word came through"
        finally:
            socket.close(linger=0)
            context.term()
