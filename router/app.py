"""The HTTP front: reads and checks requests, hands generation to conductors, answers the router's own pages.

Knows paths, bodies and headers; which engine serves what is decided in `policy` and `journey`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from pdx.handoff.handle import HANDOFF_ID_BYTES
from pdx.router.actions import Begin
from pdx.router.admission import Wish
from pdx.router.conductor import Conductor
from pdx.router.journey import Journey, Request, Settings
from pdx.router.outside import Outside
from pdx.router.policy import Asked, Snapshot, choose_pair, serving
from pdx.router.prompt import Prompt
from pdx.router.replies import REFUSALS, error_body
from pdx.router.servable import CHAT, COMPLETIONS, without_private
from pdx.router.wishes import wish_of

BODY_BYTES_MAX = 32 << 20  # a million token ids as JSON are 8 MiB; images travel as base64 in chat messages
BODY_S = 60.0  # 32 MiB at 5 Mbit/s
HEADER_BYTES_MAX = 16 << 10
# Administration of single engines: through a router it would reach one of many, by chance.
FORBIDDEN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
ROOT_PATHS = ("/tokenize", "/detokenize")  # engines serve these outside /v1
# What a client says to the engine. Everything else stays here: x-data-parallel-rank steers, cookies are not ours.
SESSION_HEADER = "x-session-id"
SESSION_FIELDS = ("prompt_cache_key", "user")
SESSION_CHARS_MAX = 1024
PASSED_HEADERS = ("Authorization", "Content-Type", "traceparent", "tracestate", "x-session-id")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Front:
    """The routes of one router."""

    def __init__(self, outside: Outside, settings: Settings, *, request_timeout_s: float) -> None:
        self._outside = outside
        self._settings = settings
        self._request_timeout_s = request_timeout_s
        self._turn = 0
        self._stripped_logged = False

    def app(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[_errors_as_json])
        app.router.add_get("/health", self._health)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/{rest:.+}", self._serve)
        for path in ROOT_PATHS:
            app.router.add_post(path, self._serve)
        return app

    def snapshot(self) -> Snapshot:
        """The routable engines with this router's own load counted in."""
        return self._outside.snapshot()

    # --- generation -------------------------------------------------------------------------------------------

    async def _serve(self, client: web.Request) -> web.StreamResponse:
        if client.path in FORBIDDEN_PATHS:
            return self._refuse(403, "adapters are loaded at the engines themselves")
        if self._outside.gate.queue.draining:
            return self._refuse(*REFUSALS["draining"])
        self._outside.metrics.in_flight.inc()
        self._outside.under_way += 1
        try:
            raw = await self._read(client)
            body = self._read_body(client, raw)
            model = self._model_of(body)
            request = self._public_request(client, body, raw, model)
            wish = self._wish(client, body, raw)
        except _Refused as refused:
            return self._refuse(refused.status, str(refused))
        else:
            headers = {name: client.headers[name] for name in PASSED_HEADERS if name in client.headers}
            headers.setdefault("Content-Type", "application/json")
            headers["X-Request-Id"] = _request_id(client)
            self._outside.retry_budget.on_request()
            session = client.headers.get(SESSION_HEADER, "") or session_of(request.body)
            prompt = await self._prompt(request, headers)
            journey = Journey(request, self._settings, self._outside.retry_budget)
            conductor = Conductor(
                journey,
                self._outside,
                client,
                model=model,
                headers=headers,
                begins=partial(self._begin, model, session, prompt),
                wish=wish,
            )
            return await conductor.play(timeout_s=self._request_timeout_s)
        finally:
            self._outside.metrics.in_flight.dec()
            self._outside.under_way -= 1

    async def _prompt(self, request: Request, headers: dict[str, str]) -> Prompt | None:
        if self._settings.policy != "prefix":
            return None
        outside, turn = self._outside, self._turn
        prompt = await outside.prompts.read(
            request.path, request.body, request.model, self.snapshot(), turn=turn, headers=headers, now=time.monotonic()
        )
        return await outside.brought(prompt, request, self.snapshot(), turn)

    def _begin(self, model: str, session: str, prompt: Prompt | None) -> Begin:
        self._turn += 1
        seen = prompt and self._outside.prompts.refreshed(prompt, time.monotonic())
        asked = Asked(draws=_draws(), session=session, prompt=seen)
        return Begin(
            snapshot=self.snapshot(),
            behind=self._outside.gate.queue.needs,
            retry_after_s=self._outside.retry_after_s(model),
            turn=self._turn,
            handoff_id=secrets.token_bytes(HANDOFF_ID_BYTES),
            now_unix_s=time.time(),
            asked=asked,
        )

    async def _read(self, client: web.Request) -> bytes:
        """The whole body. A client that stops in the middle must not stay for ever."""
        try:
            async with asyncio.timeout(min(BODY_S, self._request_timeout_s)):
                return await client.read()
        except TimeoutError:
            raise _Refused(408, "the body did not arrive in time") from None

    def _read_body(self, client: web.Request, raw: bytes) -> dict[str, Any]:
        if client.path not in (COMPLETIONS, CHAT) and client.content_type.startswith("multipart/"):
            return {}
        try:
            body = msgspec.json.decode(raw)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise _Refused(400, f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise _Refused(400, "the body must be a JSON object")
        return body

    def _model_of(self, body: dict[str, Any]) -> str:
        models = self._outside.directory.models()
        model = body.get("model")
        if not models:
            raise _Refused(503, "no engine has joined this router yet")
        if model is None and len(models) == 1:
            return models[0]
        if not isinstance(model, str):
            raise _Refused(400, f"name a model; known here: {', '.join(models)}")
        if model not in models:
            raise _Refused(404, f"the model {model!r} does not exist; known here: {', '.join(models)}")
        return model

    def _public_request(self, client: web.Request, body: dict[str, Any], raw: bytes, model: str) -> Request:
        public, stripped = without_private(body)
        if stripped:
            self._outside.metrics.stripped.inc()
            if not self._stripped_logged:
                self._stripped_logged = True
                _log.warning("a client sent kv_transfer_params; stripped, as always from now on (see the metrics)")
            raw = msgspec.json.encode(public)
        return Request(path=client.path, model=model, body=public, raw=raw)

    def _wish(self, client: web.Request, body: dict[str, Any], raw: bytes) -> Wish:
        try:
            return wish_of(client.headers, body, size_bytes=len(raw))
        except ValueError as error:
            raise _Refused(400, str(error)) from error

    def _refuse(self, status: int, message: str) -> web.Response:
        self._outside.metrics.requests.labels(model="", code=str(status)).inc()
        return _error(status, message)

    # --- the router's own pages -------------------------------------------------------------------------------

    async def _health(self, client: web.Request) -> web.StreamResponse:
        return web.Response()

    async def _readyz(self, client: web.Request) -> web.StreamResponse:
        """200 when some model can be served; with ?engines=N, when in addition N engines are routable."""
        snapshot, directory = self.snapshot(), self._outside.directory
        reasons = [
            *self._outside.reasons(),
            *(f"waiting for /health of {engine_id}" for engine_id in directory.joining()),
        ]
        models = {}
        for model in directory.models():
            alone = bool(serving(snapshot, model, "decode"))
            paired = choose_pair(snapshot, model, policy=self._settings.policy, turn=0) is not None
            models[model] = {"serves": alone, "pairs": paired}
            if not alone:
                reasons.append(f"no decode engine is ready for {model}")
            elif not paired:
                reasons.append(f"no prefill engine fits a decode engine for {model}: requests are served whole")
        if not models:
            reasons.append("no engine has joined")
        wanted = client.query.get("engines", "0")
        if not wanted.isdecimal() or len(wanted) > 6:
            return _error(400, "?engines= takes a number")
        if len(snapshot) < int(wanted):
            reasons.append(f"{len(snapshot)} of {int(wanted)} engines are routable")
        serves = any(state["serves"] for state in models.values())
        ready = serves and len(snapshot) >= int(wanted) and not self._outside.gate.queue.draining
        engines = [
            {
                "engine_id": c.engine_id,
                "role": c.info.role,
                "model": c.info.model,
                "in_flight": c.in_flight,
                "tokens_per_s": c.told_tokens_per_s,
            }
            for c in sorted(snapshot, key=lambda candidate: candidate.engine_id)
        ]
        page = {"ready": ready, "reasons": reasons, "models": models, "engines": engines}
        return _json(page, status=200 if ready else 503)

    async def _metrics(self, client: web.Request) -> web.StreamResponse:
        outside = self._outside
        text = outside.metrics.render(self.snapshot(), outside.directory.reservations_waiting(), len(outside.knowledge))
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _models(self, client: web.Request) -> web.StreamResponse:
        snapshot = self._outside.directory.snapshot()
        models = sorted({model for candidate in snapshot for model in candidate.info.models})
        data = [{"id": model, "object": "model", "created": 0, "owned_by": "pdx"} for model in models]
        return _json({"object": "list", "data": data})


def session_of(body: Mapping[str, Any]) -> str:
    """By which a client says what belongs together, if it does."""
    keys = (body.get(field) for field in SESSION_FIELDS)
    return next((key[:SESSION_CHARS_MAX] for key in keys if isinstance(key, str) and key), "")


def _draws() -> tuple[float, float, float, float]:
    return random.random(), random.random(), random.random(), random.random()  # noqa: S311 - it only spreads load


class _Refused(Exception):
    """A request that goes nowhere, with the status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _error(error.status, error.text or error.reason)
    except Exception:  # noqa: BLE001 - the top of a request's task
        _log.exception("request failed in the router")
        return _error(500, "the router failed; its log says how")


def _error(status: int, message: str) -> web.Response:
    headers = {"Content-Type": "application/json"}
    if status == 503:
        headers["Retry-After"] = "1"
    return web.Response(status=status, body=error_body(status, message), headers=headers)


def _json(page: object, *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(page), headers={"Content-Type": "application/json"})


def _request_id(client: web.Request) -> str:
    given = client.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
