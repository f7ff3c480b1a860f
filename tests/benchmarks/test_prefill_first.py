"""The peers' proxy against two small engines that check what they are asked."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from benchmarks.harness.prefill_first import Proxy

PARAMS = {"do_remote_prefill": True, "remote_engine_id": "P", "remote_block_ids": [[1, 2]]}
ANSWER = b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n'


class Engines:
    def __init__(self, prefill_status: int = 200) -> None:
        self.asked: list[tuple[str, dict[str, Any], str]] = []
        self._prefill_status = prefill_status

    async def prefill(self, request: web.Request) -> web.Response:
        self.asked.append(("prefill", await request.json(), request.headers["X-Request-Id"]))
        return web.json_response({"kv_transfer_params": PARAMS}, status=self._prefill_status)

    async def decode(self, request: web.Request) -> web.Response:
        self.asked.append(("decode", await request.json(), request.headers["X-Request-Id"]))
        return web.Response(body=ANSWER, content_type="text/event-stream")


def ask(engines: Engines, body: dict[str, Any]) -> tuple[int, bytes]:
    async def run() -> tuple[int, bytes]:
        servers = []
        for handler in (engines.prefill, engines.decode):
            app = web.Application()
            app.router.add_post("/v1/completions", handler)
            servers.append(TestServer(app))
            await servers[-1].start_server()
        proxy = TestServer(Proxy(*(f"http://127.0.0.1:{server.port}" for server in servers)).app())
        await proxy.start_server()
        servers.append(proxy)
        async with ClientSession() as client, client.post(proxy.make_url("/v1/completions"), json=body) as reply:
            answered = reply.status, await reply.read()
        for server in reversed(servers):
            await server.close()
        return answered

    return asyncio.run(run())


def test_prefill_is_asked_for_one_token_and_decode_for_the_rest() -> None:
    engines = Engines()
    body = {"prompt": [1], "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}}
    assert ask(engines, body) == (200, ANSWER)
    (first, prefill, id_there), (second, decode, id_here) = engines.asked
    assert (first, second, id_there) == ("prefill", "decode", id_here)
    assert (prefill["max_tokens"], prefill["stream"], "stream_options" in prefill) == (1, False, False)
    assert prefill["kv_transfer_params"]["do_remote_decode"] is True
    assert decode == {**body, "kv_transfer_params": PARAMS}


def test_prefills_error_is_the_clients() -> None:
    engines = Engines(prefill_status=400)
    assert ask(engines, {"prompt": []})[0] == 400
    assert len(engines.asked) == 1
