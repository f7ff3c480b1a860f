"""Engines that compute nothing: what a router adds is all there is to see. One process, on a core of its own.

HTTP servers that answer as vLLM 0.32 does, from templates, with as little work as Python allows: a prefill reply
with token ids, or a stream of one event a token, every event in a write of its own. They announce themselves to a
pdx-router; what vllm-router's NIXL mode wants to see in a prefill reply is there as well. Run by the benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from pathlib import Path
from typing import Any, cast

import uvloop
import zmq
import zmq.asyncio

from pdx.curve import lock
from pdx.keys import ContentFingerprint, LayoutFingerprint
from pdx.whole import write_whole
from pdx.wire import Announce, DaemonRef, EngineInfo, EngineLoad, Role, encode

MODEL = "mock"
ROLES: tuple[Role, Role] = ("prefill", "decode")
EACH = 2  # engines of each role
PROMPT_TOKENS = 512
ANNOUNCE_S = 0.5
PACE = 5000.0  # tokens a second that it says it computes: a router would not ask for ids where computing costs nothing
CREATED = 1_700_000_000
IDS = list(range(1000, 1000 + PROMPT_TOKENS))
USAGE = {"prompt_tokens": PROMPT_TOKENS, "total_tokens": PROMPT_TOKENS + 1, "completion_tokens": 1}
HEAD = {"id": "cmpl-mock", "object": "text_completion", "created": CREATED, "model": MODEL}

_LENGTH = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)
_TOKENS = re.compile(rb'"max_tokens":\s*(\d+)')
_ITL = re.compile(rb'"temperature":\s*([0-9.e-]+)')  # seconds between tokens: see `__main__`
_STREAMS = re.compile(rb'"stream":\s*true')
_SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n"
    b"Date: Thu, 26 Nov 2026 00:00:00 GMT\r\n\r\n"
)


def _page(value: Any, kind: str = "application/json") -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (kind.encode(), len(body), body)


def _chunk(event: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(event), event)


def _event(**more: Any) -> bytes:
    return _chunk(b"data: " + json.dumps({**HEAD, **more}, separators=(",", ":")).encode() + b"\n\n")


def _choice(text: str, finish: str | None, ids: list[int] | None = None) -> dict[str, Any]:
    return {
        "index": 0, "text": text, "logprobs": None, "finish_reason": finish, "stop_reason": None,
        "prompt_token_ids": ids, "token_ids": None if ids is None else [17],
    }  # fmt: skip


PREFILLED = _page(
    {
        **HEAD, "choices": [_choice(" word", "length", IDS)], "usage": USAGE,
        "kv_transfer_params": {
            "pdx": {"handoff": "00", "pages": 1}, "do_remote_prefill": True, "do_remote_decode": False,
            "remote_block_ids": [[1]], "remote_engine_id": "mock", "remote_host": "127.0.0.1", "remote_port": 1,
            "tp_size": 1,
        },
    }
)  # fmt: skip
TOKEN = _event(choices=[_choice(" word", None)])
LAST = _event(choices=[_choice(" word", "length")]) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
PAGES = {
    b"/health": _page(b"", "text/plain"),
    b"/v1/models": _page({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 1 << 20}]}),
    b"/tokenize": _page({"tokens": IDS, "count": PROMPT_TOKENS, "max_model_len": 1 << 20}),
}


class Engine(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._itl_s = 0.0
        self._got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        self._loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, found, body = self._got.partition(b"\r\n\r\n")
        if not found:
            return
        length = _LENGTH.search(head)
        if length is not None and len(body) < int(length[1]):
            return
        self._got = b""
        page = PAGES.get(head.split(b" ", 2)[1].partition(b"?")[0])
        if page is not None:
            self._transport.write(page)
        elif _STREAMS.search(body):
            tokens, itl = _TOKENS.search(body), _ITL.search(body)
            self._itl_s = float(itl[1]) if itl else 0.0
            self._transport.write(_SSE_HEAD)
            self._token(int(tokens[1]) if tokens else 16, self._loop.time())
        else:
            self._transport.write(PREFILLED)

    def _token(self, left: int, due: float) -> None:
        if self._transport.is_closing():
            return
        if left <= 1:
            self._transport.write(LAST)
            return
        self._transport.write(TOKEN)
        # By the clock, not after the last one: who is late catches up, so that the rate is what was asked for.
        self._loop.call_at(due + self._itl_s, self._token, left - 1, due + self._itl_s)


def _info(name: str, role: Role, url: str) -> EngineInfo:
    content = ContentFingerprint(
        model=MODEL, weights="mock", weight_epoch="", dtype="bf16", block_tokens=16, hash_algorithm="sha256_cbor/mock"
    )
    layout = LayoutFingerprint(
        engine="mock",
        attention="mock",
        layers=2,
        page_bytes=4096,
        block_tokens=16,
        packing="L",
        kv_groups=1,
        ranks=1,
        chunk_blocks=1,
    )
    return EngineInfo(
        engine_id=name, role=role, model=MODEL, url=url, context_tokens=1 << 20, content=content, layout=layout
    )


async def _announce(control: str, key: bytes, infos: list[EngineInfo]) -> None:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, b"mock")
    lock(socket, key, server=False)
    socket.connect(control)
    ref = DaemonRef(daemon_id="mock", incarnation=time.time_ns() >> 20, control="tcp://127.0.0.1:9", lanes=[])
    loads = [EngineLoad(engine_id=info.engine_id, tokens_per_s=PACE) for info in infos if info.role == "prefill"]
    while True:
        await socket.send(encode(Announce(daemon=ref, engines=infos, loads=loads)))
        while await socket.poll(0):
            await socket.recv()
        await asyncio.sleep(ANNOUNCE_S)


async def _main(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    names: list[tuple[str, Role]] = [(f"{role[0]}{n}", role) for role in ROLES for n in range(EACH)]
    servers = [await loop.create_server(Engine, "127.0.0.1", 0) for _ in names]
    urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    infos = [_info(name, role, url) for (name, role), url in zip(names, urls, strict=True)]
    where = {role: [info.url for info in infos if info.role == role] for role in ROLES}
    write_whole(options.publish, json.dumps(where).encode())
    async with asyncio.TaskGroup() as tasks:
        for control in options.control:
            tasks.create_task(_announce(control, options.key.read_bytes(), infos))
        for server in servers:
            tasks.create_task(server.serve_forever())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--control", action="append", default=[])
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--publish", type=Path, required=True)
    uvloop.run(_main(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
