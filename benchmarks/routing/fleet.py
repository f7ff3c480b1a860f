"""The simulated engines as a router meets them: HTTP servers and daemons' sockets, in real time. One process.

They answer as vLLM 0.32 does. Prefill engines compute one prompt after the other; answers come a block to an event, at
the pace of a decode engine with so many. An engine that gets a whole request does both. Run by the benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import uvloop
import zmq
import zmq.asyncio
from aiohttp import web

from benchmarks.routing.host import CONTENT, ENGINES, MODEL, PREFILL_TOKENS_PER_S, ROLES, Host, prefill_s
from benchmarks.routing.workloads import BLOCK_TOKENS, answer_to, block_of, tokens_of
from pdx.chain import block_hashes
from pdx.curve import lock
from pdx.daemon.announcer import ANNOUNCE_S, SEND_QUEUE_MAX
from pdx.daemon.holdings import TURN_S
from pdx.handoff.handle import peek
from pdx.whole import write_whole
from pdx.wire import TO_DAEMON, Announce, EngineLoad, Holdings, Resync, Role, decoder_of, encode

BODY_BYTES_MAX = 4 << 20

_decode = decoder_of(TO_DAEMON)
_json = msgspec.json.Encoder()


class Engine:
    """An HTTP server in front of its host."""

    def __init__(self, name: str, role: Role, fleet: Fleet) -> None:
        self.host = Host(name, role)
        self._fleet = fleet
        self._computes = asyncio.Lock()  # first come, first served

    async def serve(self, stack: AsyncExitStack) -> None:
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/computed", self._computed)
        app.router.add_post("/v1/completions", self._complete)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self.host.info = msgspec.structs.replace(self.host.info, url=url)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _computed(self, request: web.Request) -> web.Response:
        return web.json_response({"tokens": self._fleet.computed_tokens})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read())
        params = body.get("kv_transfer_params") or {}
        prompt = body["prompt"]
        if params.get("do_remote_decode"):
            await self._compute(block_hashes(CONTENT, prompt))
            return web.Response(body=_json.encode(_prefilled(prompt)), content_type="application/json")
        hosts = [self.host]
        names = block_hashes(CONTENT, prompt)
        if params:
            hosts.append(self._fleet.hosts[peek(params["pdx_handle"]).prefill_engine])
            self.host.keep(names)
        else:
            await self._compute(names)
        return await self._stream(request, prompt, body["max_tokens"], hosts)

    async def _compute(self, names: list[bytes]) -> None:
        async with self._computes:
            uncached = self.host.uncached(names)
            self._fleet.computed_tokens += uncached
            await asyncio.sleep(prefill_s(uncached))
            self.host.keep(names)

    async def _stream(
        self, request: web.Request, prompt: list[int], tokens: int, hosts: list[Host]
    ) -> web.StreamResponse:
        """What it says is kept by all of `hosts`."""
        prompt = prompt[: len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS]  # a first token from prefill is not of it
        answer = answer_to(block_of(prompt[-BLOCK_TOKENS:]), -(-tokens // BLOCK_TOKENS))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        self.host.running += 1
        try:
            due = asyncio.get_running_loop().time()
            await response.write(_event(None))
            for number, _ in enumerate(answer):
                due += BLOCK_TOKENS * self.host.step_s()
                await asyncio.sleep(due - asyncio.get_running_loop().time())
                await response.write(_event("length" if number == len(answer) - 1 else None))
        finally:
            self.host.running -= 1
        names = block_hashes(CONTENT, [*prompt, *(token for block in answer for token in tokens_of(block))])
        for host in hosts:
            host.keep(names)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


class Fleet:
    """All engines, and the sockets on which their daemons tell the router of them."""

    def __init__(self) -> None:
        self.computed_tokens = 0
        self.engines = [Engine(f"{role[0]}{n}", role, self) for role in ROLES for n in range(ENGINES)]
        self.hosts = {engine.host.info.engine_id: engine.host for engine in self.engines}

    async def tell(self, control: str, key: bytes) -> None:
        """As daemons do: who they are each second, and what changed in their memory twenty times a second."""
        context = zmq.asyncio.Context()
        sockets = {name: _socket(context, name, control, key) for name in self.hosts}
        announce_at = 0.0
        while True:
            now = time.monotonic()
            for name, host in self.hosts.items():
                await self._hear(sockets[name], host, control)
                host.teller.tick([control], lambda _, message, name=name: _sent(sockets[name], message), now)
                if now >= announce_at:
                    _sent(sockets[name], self._announcement(host, control))
            if now >= announce_at:
                announce_at = now + ANNOUNCE_S
            await asyncio.sleep(TURN_S)

    async def _hear(self, socket: zmq.asyncio.Socket, host: Host, control: str) -> None:
        while await socket.poll(0):
            if isinstance(_decode(await socket.recv()), Resync):
                host.teller.resync(control)

    def _announcement(self, host: Host, control: str) -> Announce:
        load = EngineLoad(engine_id=host.info.engine_id, waiting=0, tokens_per_s=PREFILL_TOKENS_PER_S)
        return Announce(daemon=host.ref, engines=[host.info], loads=[load], holdings=host.teller.number(control))


def _socket(context: zmq.asyncio.Context, name: str, control: str, key: bytes) -> zmq.asyncio.Socket:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, SEND_QUEUE_MAX)
    socket.setsockopt(zmq.IDENTITY, f"{name}/1".encode())
    lock(socket, key, server=False)
    socket.connect(control)
    return socket


def _sent(socket: zmq.asyncio.Socket, message: Announce | Holdings) -> bool:
    try:
        zmq.Socket.send(socket, encode(message), zmq.DONTWAIT)
    except zmq.Again:
        return False
    return True


def _prefilled(prompt: list[int]) -> dict[str, Any]:
    choice = {
        "index": 0, "text": " word", "logprobs": None, "finish_reason": "length", "stop_reason": None,
        "prompt_token_ids": prompt, "token_ids": [7],
    }  # fmt: skip
    usage = {"prompt_tokens": len(prompt), "total_tokens": len(prompt) + 1, "completion_tokens": 1}
    return {**_head(), "choices": [choice], "usage": usage, "kv_transfer_params": {"pdx": {"handoff": "", "pages": 1}}}


def _event(finish: str | None) -> bytes:
    choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": finish, "stop_reason": None}
    return b"data: %s\n\n" % _json.encode({**_head(), "choices": [choice]})


def _head() -> dict[str, Any]:
    return {"id": "cmpl-simulated", "object": "text_completion", "created": 1_700_000_000, "model": MODEL}


async def _main(options: argparse.Namespace) -> None:
    async with AsyncExitStack() as stack:
        fleet = Fleet()
        for engine in fleet.engines:
            await engine.serve(stack)
        write_whole(options.publish, json.dumps([engine.host.info.url for engine in fleet.engines]).encode())
        await fleet.tell(options.control, options.key.read_bytes())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--control", required=True)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--publish", type=Path, required=True)
    uvloop.run(_main(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
