"""One host of the storm, in a process of its own: fake engines over real sockets, and the daemon that announces them.

The engines are those of the router's tests: their tokens depend on all tokens before them, so that an answer that was
put together from the wrong parts is wrong. They take their time, so that there is something to break.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from benchmarks.harness.rig import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tests" / "router"))

from engine_fakes import CONTENT, FakeDaemon, daemon_ref
from model_engine import ModelEngine

from pdx.errors import HandleError
from pdx.handoff.handle import verify
from pdx.wire import Role

ANNOUNCE_S = 0.3
KEPT = 64  # requests that the fakes remember


class PacedEngine(ModelEngine):
    """Waits before each answer and each event; counts what it has under way, and handles that pair strangers."""

    def __init__(self, engine_id: str, role: Role, *, pace_s: float, idle: bool, key: bytes, weights: str) -> None:
        super().__init__(engine_id, role, content=msgspec.structs.replace(CONTENT, weights=weights))
        self.open = 0
        self.mixed = 0
        self.dropped_at: dict[str, float] = {}
        self._pace_s, self._idle, self._key = pace_s, idle, key
        self._chance = random.Random(engine_id)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self.open += 1
        try:
            return await super()._generate(request)
        except asyncio.CancelledError:
            self.dropped_at[request.headers.get("X-Request-Id", "")] = time.monotonic()
            raise
        finally:
            self.open -= 1
            del self.requests[:-KEPT], self.headers[:-KEPT]

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self._look_at((body.get("kv_transfer_params") or {}).get("pdx_handle"))
        await self._pause()
        return await super()._answer(request, body)

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        events = [json.dumps(event, separators=(",", ":")) for event in self._events(request.path, body)]
        await response.prepare(request)
        for event in (*events, "[DONE]"):
            await response.write(f"data: {event}\n\n".encode())
            if self._idle:
                await asyncio.Event().wait()
            await self._pause()
        await response.write_eof()
        return response

    async def _pause(self) -> None:
        await asyncio.sleep(self._pace_s * self._chance.expovariate(1.0))

    def _look_at(self, handle: str | None) -> None:
        """Engines whose names end differently have other weights: nobody may pair them."""
        try:
            told = verify(handle, self._key, now_unix_s=time.time()) if handle else None
        except HandleError:
            self.mixed += 1
            return
        if told is not None and told.prefill_engine[-1] != told.decode_engine[-1]:
            self.mixed += 1


class Host:
    """The engines, and a page that says how they are."""

    def __init__(self, options: argparse.Namespace) -> None:
        key = Path(options.key_file).read_bytes()
        about = {"pace_s": options.pace_s, "idle": options.idle, "key": key, "weights": options.weights}
        self.engines = [
            PacedEngine(f"{role[0]}-{options.name}{options.weights}", role, **about) for role in ("prefill", "decode")
        ]
        ref = daemon_ref(options.name, time.time_ns() % (1 << 62))
        self.daemons = {control: FakeDaemon(ref, [*self.engines], key=key) for control in options.controls.split(",")}

    async def run(self, publish: Path) -> None:
        """Until SIGTERM; then it takes its leave, as daemons do."""
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        async with AsyncExitStack() as stack:
            for engine in self.engines:
                await engine.start()
                stack.push_async_callback(engine.stop)
            app = web.Application()
            app.router.add_get("/", self._page)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            for control, daemon in self.daemons.items():
                await stack.enter_async_context(daemon.announcing(control, every_s=ANNOUNCE_S))
            part = publish.with_suffix(".part")
            part.write_text(f"http://127.0.0.1:{runner.addresses[0][1]}")
            part.replace(publish)
            await stop.wait()
            for daemon in self.daemons.values():
                await daemon.announce(leaving=True)

    async def _page(self, request: web.Request) -> web.Response:
        for daemon in self.daemons.values():
            daemon.heard.clear()
        return web.json_response(
            {
                "open": sum(engine.open for engine in self.engines),
                "mixed": sum(engine.mixed for engine in self.engines),
                "dropped_at": [engine.dropped_at for engine in self.engines],
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storm.host", description=__doc__)
    for name in ("--name", "--controls", "--key-file", "--publish"):
        parser.add_argument(name, required=True)
    parser.add_argument("--weights", default="A", help="one letter")
    parser.add_argument("--pace-s", type=float, default=0.004)
    parser.add_argument("--idle", action="store_true", help="streams stand still after their first event")
    options = parser.parse_args()
    asyncio.run(Host(options).run(Path(options.publish)))


if __name__ == "__main__":
    main()
