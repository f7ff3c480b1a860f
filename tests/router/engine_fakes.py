"""Engines and daemons as the router meets them: real HTTP servers and ZeroMQ sockets, with failures on demand."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import aiohttp
import zmq
import zmq.asyncio
from aiohttp import web

from pdx.curve import lock
from pdx.handoff.handle import verify
from pdx.keys import ContentFingerprint, LayoutFingerprint
from pdx.router.front.app import Door
from pdx.router.outside import Outside
from pdx.router.request.settings import Settings
from pdx.router.service import Options, Published, running
from pdx.wire import TO_DAEMON, Announce, CancelHandoff, DaemonRef, EngineInfo, EngineLoad, Role, decoder_of, encode

KEY = b"k" * 32
MODEL = "smol"
DEADLINE_S = 10.0
CONTENT = ContentFingerprint(
    model=MODEL, weights="ab12", weight_epoch="", dtype="bfloat16", block_tokens=16, hash_algorithm="sha256_cbor"
)
LAYOUT = LayoutFingerprint(
    engine="vllm 0.32.0", attention="CPU_ATTN/vec", layers=2, page_bytes=4096, block_tokens=16, packing="LBHNC",
    kv_groups=1, ranks=1, chunk_blocks=1,
)  # fmt: skip


def engine_info(engine_id: str, role: Role, url: str = "http://127.0.0.1:1", **changed: Any) -> EngineInfo:
    given = {"model": MODEL, "content": CONTENT, "layout": LAYOUT, **changed}
    return EngineInfo(engine_id=engine_id, role=role, url=url, **given)


def daemon_ref(daemon_id: str = "d0", incarnation: int = 1) -> DaemonRef:
    return DaemonRef(daemon_id=daemon_id, incarnation=incarnation, control="tcp://127.0.0.1:7000", lanes=[])


def within(deadline_s: float) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., None]]:
    """Runs an async test on a loop of its own, for at most so long."""

    def decorate(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            async def bounded() -> None:
                async with asyncio.timeout(deadline_s):
                    await test(*args, **kwargs)

            asyncio.run(bounded())

        return run

    return decorate


async def until(
    condition: Callable[[], bool | Awaitable[bool]], what: str = "condition", deadline_s: float = DEADLINE_S
) -> None:
    """Waits for a condition of this process, or for one that must be asked for, at most so long."""
    try:
        async with asyncio.timeout(deadline_s):
            while not (await said if isinstance(said := condition(), Awaitable) else said):  # noqa: ASYNC110 - no events
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"never true: {what}") from None


async def metric(client: aiohttp.ClientSession, url: str, line: str) -> float:
    """What a router says at its page of metrics; 0 if it does not say it."""
    async with client.get(f"{url}/metrics") as reply:
        found = [row for row in (await reply.text()).splitlines() if row.startswith(f"{line} ")]
    return float(found[0].split()[-1]) if found else 0.0


async def reaches(
    client: aiohttp.ClientSession, url: str, line: str, value: float, deadline_s: float = DEADLINE_S
) -> None:
    """Until it says this very value: what is counted too often never does."""

    async def there() -> bool:
        return await metric(client, url, line) == value

    await until(there, f"{line} stands at {value:g}", deadline_s)


class FakeEngine:
    """vLLM's two endpoints, faithful in what the router reads, writes and passes on.

    `fault` is one of "", "400", "500", "hang", "reset", "bad_reply", "break" (after the first event), "stall" (the
    same, without an end), "part" (in the middle of the first event), "short" (an orderly end after the first event),
    "cut" (an orderly end within the second event, with `padding` in it), "error" and "late_error" (vLLM's: an error
    event, and [DONE], as the first or as the second event), "late" (it breaks when all has been said), "endless" (it
    goes on as fast as it is read) or another status, which comes with `fault_headers`.
    """

    def __init__(self, engine_id: str, role: Role, **changed: Any) -> None:
        self.engine_id = engine_id
        self.role = role
        self.changed = changed
        self.fault = ""
        self.healthy = True
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.dropped = 0
        self.fault_code = 500  # of "error" and "late_error"
        self.fault_headers: dict[str, str] = {}
        self.padding = ""  # of a whole answer's text, or of the event that is cut
        self.streamed = b""
        self.url = ""
        self.runner: web.AppRunner | None = None

    @property
    def info(self) -> EngineInfo:
        return engine_info(self.engine_id, self.role, self.url, **self.changed)

    async def start(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        app.router.add_post("/{rest:.+}", self._other)
        self.runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.05)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self.runner is not None:
            await self.runner.cleanup()
            self.runner = None

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 64}]})

    async def _other(self, request: web.Request) -> web.Response:
        raw = await request.read()
        self.requests.append({"path": request.path, "raw": raw})
        return web.json_response({"by": self.engine_id, "path": request.path})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.requests.append(body)
        self.headers.append(request.headers)
        try:
            return await self._answer(request, body)
        except asyncio.CancelledError:
            self.dropped += 1
            raise

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        match self.fault:
            case "400":
                return web.json_response({"error": {"message": "too long", "code": 400}}, status=400)
            case "500":
                return web.json_response({"error": {"message": "engine core died"}}, status=500)
            case code if code.isdigit():
                told = {"error": {"message": f"not now, or never: {self.engine_id}"}}
                return web.json_response(told, status=int(code), headers=self.fault_headers)
            case "bad_reply":
                return web.json_response({"choices": []})
            case "hang":
                await asyncio.Event().wait()
            case "reset":
                assert request.transport is not None
                request.transport.abort()
        if body.get("stream"):
            return await self._stream(request, body)
        return web.json_response(self._whole(request.path, body))

    def _whole(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        prompt = self._prompt_ids(path, body)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        answer: dict[str, Any] = {"id": "x", "model": MODEL, "choices": [choice], "usage": self._usage(prompt)}
        if (body.get("kv_transfer_params") or {}).get("do_remote_decode"):
            answer["kv_transfer_params"] = {"pdx": {"handoff": "00", "pages": 1}}
        if path.endswith("/chat/completions"):
            choice["message"] = {"role": "assistant", "content": f"by {self.engine_id}"}
            if body.get("return_token_ids"):
                answer["prompt_token_ids"] = prompt
        else:
            choice["text"] = f"by {self.engine_id}{self.padding}"
            if body.get("return_token_ids"):
                choice["prompt_token_ids"] = prompt
        return answer

    def _prompt_ids(self, path: str, body: dict[str, Any]) -> list[int]:
        given = (body.get("kv_transfer_params") or {}).get("prompt_token_ids")
        if given is not None and path.endswith("/chat/completions"):
            return given
        prompt = body.get("prompt", body.get("messages"))
        return prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], int) else [1, 2, 3, 4]

    def _usage(self, prompt: list[int]) -> dict[str, Any]:
        # As in vLLM, what came by handoff counts as cached to the decode engine.
        cached = 2 if self.role == "prefill" else len(prompt) - 1
        return {"prompt_tokens": len(prompt), "prompt_tokens_details": {"cached_tokens": cached}}

    def _events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        events = [{"id": "x", "choices": [{"index": 0, "text": f"{self.engine_id} {n}"}]} for n in range(3)]
        return [*events, {"id": "x", "choices": [], "usage": self._usage(self._prompt_ids(path, body))}]

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        events = [json.dumps(event, separators=(",", ":")) for event in self._events(request.path, body)]
        frames = [f"data: {event}\n\n".encode() for event in (*events, "[DONE]")]
        await response.prepare(request)
        if self.fault in ("error", "late_error"):
            told = b'data: {"error": {"message": "EngineCore has an issue", "code": %d}}\n\n' % self.fault_code
            frames = [*frames[: self.fault == "late_error"], told, b"data: [DONE]\n\n"]
        for number, frame in enumerate(frames):
            if self.fault == "part" or (self.fault == "break" and number == 1):
                await response.write(frame[:10])
                assert request.transport is not None
                request.transport.abort()
                return response
            if self.fault == "stall" and number == 1:
                await asyncio.Event().wait()
            if self.fault == "short" and number == 1:
                break
            if self.fault == "cut" and number == 1:
                frame = frame[:10] + self.padding.encode()
            await response.write(frame)
            self.streamed += frame
            if self.fault == "cut" and number == 1:
                break
            while self.fault == "endless":
                await response.write(frames[0] * 1000)
        if self.fault == "late":
            await asyncio.sleep(0.05)  # not in one packet with what was said
            assert request.transport is not None
            request.transport.abort()
            return response
        await response.write_eof()
        return response


class FakeDaemon:
    """Announces its engines, verifies what it hears."""

    def __init__(self, ref: DaemonRef, engines: list[FakeEngine], *, key: bytes = KEY) -> None:
        self.ref = ref
        self.engines = engines
        self.left = False
        self.loads: list[EngineLoad] = []
        self.heard: list[object] = []
        self._key = key

    @property
    def cancels(self) -> list[CancelHandoff]:
        return [message for message in self.heard if isinstance(message, CancelHandoff)]

    @asynccontextmanager
    async def announcing(self, control: str, *, every_s: float = 0.3) -> AsyncIterator[FakeDaemon]:
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.setsockopt(zmq.IDENTITY, f"{self.ref.daemon_id}/{self.ref.incarnation}".encode())
        lock(socket, self._key, server=False)
        socket.connect(control)
        self.socket = socket
        tasks = [asyncio.create_task(self._listen(socket)), asyncio.create_task(self._announce(socket, every_s))]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            socket.close(linger=0)
            context.term()

    async def announce(self, *, leaving: bool = False) -> None:
        self.left |= leaving  # and does not come back
        engines = [engine.info for engine in self.engines]
        message = Announce(daemon=self.ref, engines=engines, loads=self.loads, leaving=self.left)
        await self.socket.send(encode(message))

    async def _announce(self, socket: zmq.asyncio.Socket, every_s: float) -> None:
        while True:
            await self.announce()
            await asyncio.sleep(every_s)

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        decode = decoder_of(TO_DAEMON)
        while True:
            self.heard.append(decode(await socket.recv()))


class Fleet:
    """A running router with engines, and a client."""

    def __init__(
        self, published: Published, client: aiohttp.ClientSession, daemons: list[FakeDaemon], outside: Outside
    ) -> None:
        self.published = published
        self.outside = outside
        self.client = client
        self.daemons = daemons

    def post(self, path: str, body: object, **more: Any) -> Any:
        return self.client.post(self.published.http + path, json=body, **more)

    def get(self, path: str) -> Any:
        return self.client.get(self.published.http + path)

    async def ask(self, body: object, *, path: str = "/v1/completions", **more: Any) -> tuple[int, Any, Any]:
        """(status, JSON, headers)."""
        async with self.post(path, body, **more) as reply:
            return reply.status, json.loads(await reply.read()), reply.headers

    async def metric(self, line: str) -> float:
        return await metric(self.client, self.published.http, line)

    async def reaches(self, line: str, value: float) -> None:
        """Waits until a metric has this very value."""
        await reaches(self.client, self.published.http, line, value)

    async def readyz(self) -> Any:
        async with self.get("/readyz") as reply:
            return await reply.json()

    async def seen(self, count: int) -> None:
        """Waits until so many engines are routable."""

        async def all_there() -> bool:
            return len((await self.readyz())["engines"]) == count

        await until(all_there, f"{count} engines are routable")


@asynccontextmanager
async def fleet(*engines: FakeEngine, hosts: int = 1, **changed: Any) -> AsyncIterator[Fleet]:
    """Engines spread over `hosts` daemons, announced to a router and ready; `changed` are Options and Settings."""
    names = ("policy", "journey", "prefill_timeout_s", "max_waiting", "max_wait_s", "max_in_flight_prefill",
             "max_in_flight_decode", "retries")  # fmt: skip
    settings = {"journey": "after"} | {name: changed.pop(name) for name in names if name in changed}
    door = Door(**{name: changed.pop(name) for name in Door.__struct_fields__ if name in changed})
    where = {"port": 0, "control": "tcp://127.0.0.1:0"}
    options = Options(settings=Settings(cluster_key=KEY, **settings), door=door, **where, **changed)
    async with AsyncExitStack() as stack:
        router = await stack.enter_async_context(running(options))
        published = router.published
        client = await stack.enter_async_context(aiohttp.ClientSession())
        for engine in engines:
            await engine.start()
            stack.push_async_callback(engine.stop)
        daemons = [FakeDaemon(daemon_ref(f"d{n}"), list(engines[n::hosts])) for n in range(hosts)]
        for daemon in daemons:
            await stack.enter_async_context(daemon.announcing(published.control))
        running_fleet = Fleet(published, client, daemons, router.outside)
        await running_fleet.seen(len(engines))
        yield running_fleet


def handle_of(body: dict[str, Any]) -> str:
    return body["kv_transfer_params"]["pdx_handle"]


def verified(body: dict[str, Any], now_unix_s: float) -> Any:
    return verify(handle_of(body), KEY, now_unix_s=now_unix_s)
