"""The usual proxy before a prefill and a decode engine, as vLLM's own examples write it: prefill first, then decode.

Prefill is asked for one token and for where its KV cache lies; decode gets the request with that and streams. It takes
completions and chat completions, of one prefill and one decode engine. It is here as the peer that everybody runs.
"""

from __future__ import annotations

import argparse
import sys
import uuid
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from aiohttp import web

CHUNK_BYTES = 64 << 10
BODY_BYTES_MAX = 32 << 20
REMOTE = {
    "do_remote_decode": True, "do_remote_prefill": False,
    "remote_engine_id": None, "remote_block_ids": None, "remote_host": None, "remote_port": None,
}  # fmt: skip


class Proxy:
    def __init__(self, prefill: str, decode: str) -> None:
        self._prefill, self._decode = prefill, decode

    def app(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.cleanup_ctx.append(self._connected)
        app.router.add_get("/health", self._health)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._serve)
        return app

    async def _connected(self, app: web.Application) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._session:
            yield

    async def _health(self, request: web.Request) -> web.Response:
        for url in (self._prefill, self._decode):
            async with self._session.get(f"{url}/health") as response:
                if response.status != 200:
                    return web.Response(status=503)
        return web.Response()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        headers = {"X-Request-Id": uuid.uuid4().hex}
        async with self._session.post(
            f"{self._prefill}{request.path}", json=_for_prefill(body), headers=headers
        ) as reply:
            answer = await reply.json()
            if reply.status != 200:
                return web.json_response(answer, status=reply.status)
        if params := answer.get("kv_transfer_params"):
            body["kv_transfer_params"] = params
        async with self._session.post(f"{self._decode}{request.path}", json=body, headers=headers) as reply:
            response = web.StreamResponse(status=reply.status, headers={"Content-Type": reply.headers["Content-Type"]})
            await response.prepare(request)
            async for chunk in reply.content.iter_chunked(CHUNK_BYTES):
                await response.write(chunk)
            await response.write_eof()
            return response


def _for_prefill(body: dict[str, Any]) -> dict[str, Any]:
    asked = {**body, "kv_transfer_params": REMOTE, "stream": False, "max_tokens": 1}
    if "max_completion_tokens" in asked:
        asked["max_completion_tokens"] = 1
    asked.pop("stream_options", None)
    return asked


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness.prefill_first", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--prefill", required=True, metavar="URL")
    parser.add_argument("--decode", required=True, metavar="URL")
    options = parser.parse_args(argv)
    web.run_app(Proxy(options.prefill, options.decode).app(), host=options.host, port=options.port, print=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
