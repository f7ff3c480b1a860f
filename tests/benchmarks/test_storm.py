"""The storm's clients: what is right, what is a clean refusal, and that nothing else passes for either."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from benchmarks.storm.clients import PATH, Clients, _asked, _streamed, right_text

BODY: dict[str, Any] = {"model": "smol", "prompt": [7, 8, 9], "max_tokens": 5, "ignore_eos": True, "stream": False}
RIGHT = right_text(BODY)


def events(*texts: str, end: bytes = b"data: [DONE]\n\n") -> bytes:
    return b"".join(b"data: " + json.dumps({"choices": [{"text": t}]}).encode() + b"\n\n" for t in texts) + end


ERROR = b'event: error\ndata: {"error":{"message":"broke","code":502}}\n\n'


@pytest.mark.parametrize(
    ("raw", "verdict"),
    [
        (events(RIGHT[:2], RIGHT[2:]), "right"),
        (events(RIGHT[:2], end=ERROR), "broken off"),
        (events(end=ERROR), "broken off"),
        (events(RIGHT[:2]), "WRONG"),
        (events(RIGHT, "x"), "WRONG"),
        (events("?", end=ERROR), "WRONG"),
        (events(RIGHT[:2], end=b""), "WRONG"),
        (events(RIGHT, end=ERROR + b"data: [DONE]\n\n"), "WRONG"),
    ],
)
def test_streams(raw: bytes, verdict: str) -> None:
    assert _streamed(raw, RIGHT).startswith(verdict)


@pytest.mark.parametrize(
    ("status", "headers", "answer", "verdict"),
    [
        (200, {}, {"choices": [{"text": RIGHT}]}, "right"),
        (200, {}, {"choices": [{"text": RIGHT[1:]}]}, "WRONG"),
        (429, {"Retry-After": "3"}, {"error": {"message": "full"}}, "429"),
        (429, {}, {"error": {"message": "full"}}, "WRONG"),
        (502, {}, {"error": {"message": "broke"}}, "502"),
        (502, {}, {"error": {"message": ""}}, "WRONG"),
        (500, {}, {"error": {"message": "bug"}}, "WRONG"),
    ],
)
def test_answers(status: int, headers: dict[str, str], answer: object, verdict: str) -> None:
    async def serve(request: web.Request) -> web.Response:
        return web.json_response(answer, status=status, headers=headers)

    assert asyncio.run(_with(serve)).startswith(verdict)


async def _with(serve: Any) -> str:
    app = web.Application()
    app.router.add_post(PATH, serve)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession() as client:
            return await _asked(client, f"http://127.0.0.1:{runner.addresses[0][1]}", BODY)
    finally:
        await runner.cleanup()


def test_who_gets_no_answer_counts_it() -> None:
    """And who loses a connection to a router that lives."""
    import random

    class Here:
        url, ready, lives = "", True, 1

    async def hang(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def cut(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def asked(serve: Any) -> set[str]:
        app = web.Application()
        app.router.add_post(PATH, serve)
        runner = web.AppRunner(app, shutdown_timeout=0.01)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            Here.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            clients = Clients([Here()], random.Random(3), requests=4, deadline_s=0.2)  # type: ignore[list-item]
            async with aiohttp.ClientSession() as client:
                await clients.run(client, 2)
            return set(clients.tally.counts)
        finally:
            await runner.cleanup()

    assert asyncio.run(asked(hang)) <= {"UNANSWERED", "left"}
    assert "UNANSWERED" in asyncio.run(asked(hang))
    assert "UNCLEAN" in asyncio.run(asked(cut))
