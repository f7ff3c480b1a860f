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
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from pdx.handoff.handle import HANDOFF_ID_BYTES
from pdx.router.choice.policy import Asked, Snapshot, choose_pair, serving
from pdx.router.choice.prompts import Reading
from pdx.router.front.access import ApiKeys, Caller, Origins, names_loopback
from pdx.router.front.answers import as_json, refusal
from pdx.router.front.bodies import Budget, NoRoom, Share, decoded
from pdx.router.front.forms import field_of
from pdx.router.front.replies import REFUSALS
from pdx.router.line.admission import Wish
from pdx.router.line.wishes import wish_of
from pdx.router.outside import Outside
from pdx.router.request.actions import Begin
from pdx.router.request.conductor import Conductor
from pdx.router.request.journey import Journey
from pdx.router.request.request import Request
from pdx.router.request.servable import CHAT, COMPLETIONS, without_private
from pdx.router.request.settings import Settings
from pdx.router.request_log import refused_line
from pdx.router.workers.texts import read_text

BODY_BYTES_MAX = 32 << 20  # a million token ids as JSON are 8 MiB; images travel as base64 in chat messages
BODIES_BYTES_MAX = 1 << 30  # of all requests under way
BODY_S = 60.0  # 32 MiB at 5 Mbit/s
MOMENT_S = 0.001  # for so long engines stay as they were seen, if no request comes or ends
# Administration of single engines: through a router it would reach one of many, by chance.
FORBIDDEN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
ROOT_PATHS = frozenset({"/tokenize", "/detokenize"})  # engines serve these outside /v1
RESPONSES = "/v1/responses"
MODELS_PATH = "/v1/models"
OPEN_PATHS = frozenset({"/health", "/readyz", "/metrics"})  # for probes and scrapers: they bring no key
SESSION_HEADER = "x-session-id"
SESSION_FIELDS = ("prompt_cache_key", "user")
SESSION_CHARS_MAX = 1024
# What a client says to the engine. Everything else stays here: x-data-parallel-rank steers, cookies are not ours.
PASSED_HEADERS = ("Content-Type", "tracestate", SESSION_HEADER)
# What the engine is to check, if this router does not; in the two ways of the two kinds of clients.
KEY_HEADERS = ("Authorization", "x-api-key")

# What is passed on: no "..", no escapes, nothing that an engine's server could read as another page.
_ENGINE_PATH = re.compile(r"/v1(/[A-Za-z0-9_-][A-Za-z0-9._:-]*)+")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_log = logging.getLogger(__name__)

Page = Callable[[web.BaseRequest], Awaitable[web.Response]]


class Door(msgspec.Struct, frozen=True, kw_only=True):
    """Whom the front lets in, and how long and how much it listens to one of them."""

    keys: ApiKeys = ApiKeys({})
    pass_keys: bool = False  # to the engines, although this router has checked them
    origins: Origins = Origins(())
    body_bytes_max: int = BODY_BYTES_MAX
    bodies_bytes_max: int = BODIES_BYTES_MAX  # together; one of the largest always has room
    request_timeout_s: float = 600.0
    public_metrics: bool = True  # /metrics at the front too


class Front:
    """The pages of one router."""

    def __init__(
        self,
        outside: Outside,
        settings: Settings,
        door: Door,
        *,
        missing: Callable[[], list[str]] = list,
        all_metrics: str = "",
        on_loopback: bool = False,
    ) -> None:
        """`missing`: what /readyz says of engines that are expected; `all_metrics`: where those of all workers are;
        `on_loopback`: only this host reaches it, so that without keys it answers to names of the loopback only."""
        self.metrics = outside.metrics
        self._outside = outside
        self._settings = settings
        self._door = door
        self._missing = missing
        self._all_metrics = all_metrics
        self._local_only = on_loopback and not door.keys
        self._bodies = Budget(max(door.bodies_bytes_max, door.body_bytes_max))
        self._turn = 0
        self._stripped_logged = False
        self._passed = PASSED_HEADERS if door.keys and not door.pass_keys else (*PASSED_HEADERS, *KEY_HEADERS)
        self._pages: Mapping[str, Page] = {
            "/health": self._health,
            "/readyz": self._readyz,
            **({"/metrics": self.metrics_page} if door.public_metrics else {}),
            MODELS_PATH: self._models,
        }

    async def handle(self, client: web.BaseRequest) -> web.StreamResponse:
        """The answer to one request; what goes wrong on the way is an answer too."""
        shown = self._door.origins.headers(client.headers.get("Origin", ""))
        try:
            return await self._answer(client, shown)
        except _Refused as refused:
            reason, answer = refused.reason, refusal(refused.status, str(refused), refused.headers)
        except web.HTTPRequestEntityTooLarge as error:
            reason, answer = "too_large", refusal(error.status, error.text or error.reason)
        except web.RequestPayloadError:
            reason, answer = "broken_body", refusal(400, "the body is not encoded, or not framed, as its headers say")
            answer.force_close()
        except Exception:  # noqa: BLE001 - the top of a request's task
            _log.exception("request failed in the router")
            reason, answer = "", refusal(500, "the router failed; its log says how")
        answer.headers.update(shown)
        self._turned_away(client, answer.status, reason)
        return answer

    def _turned_away(self, client: web.BaseRequest, code: int, reason: str) -> None:
        """`reason`: empty if it is not the client's fault."""
        metrics, log = self._outside.metrics, self._outside.request_log
        if reason:
            metrics.refused.labels(reason=reason).inc()
        metrics.requests.labels(model="", code=str(code)).inc()
        if log is not None:
            log.add(refused_line(request_id=_request_id(client), path=client.path, code=code, reason=reason))

    async def _answer(self, client: web.BaseRequest, shown: Mapping[str, str]) -> web.StreamResponse:
        path, method = client.path, client.method
        generates = path in ROOT_PATHS or _ENGINE_PATH.fullmatch(path) is not None
        if method == "OPTIONS" and "Origin" in client.headers:
            return self._preflight(client)
        caller = self._caller(client, path)
        page = self._models if path.startswith(f"{MODELS_PATH}/") else self._pages.get(path)
        if method in ("GET", "HEAD") and page is not None:
            answer = await page(client)
            answer.headers.update(shown)
            return answer
        if path.startswith(f"{RESPONSES}/"):
            raise _Refused(404, "state", "responses are not kept here")
        if page is not None or (generates and method != "POST"):
            raise _Refused(405, "method", "this page does not know that method")
        if not generates:
            raise _Refused(404, "path", "there is no such page")
        return await self._serve(client, caller, shown)

    def _caller(self, client: web.BaseRequest, path: str) -> Caller | None:
        """None where nobody needs a key."""
        keys = self._door.keys
        if path in OPEN_PATHS:
            return None
        if self._local_only and not names_loopback(client.headers):
            raise _Refused(403, "host", "without API keys (--api-key) this router answers to localhost only")
        if not self._door.origins.may_ask(client.headers):
            raise _Refused(403, "origin", "pages of this origin may not ask (--cors-origin)")
        if not keys:
            return None
        caller = keys.caller(client.headers)
        if caller is None:
            headers = {"WWW-Authenticate": "Bearer"}
            raise _Refused(401, "key", "this router wants an API key, and yours is none of its keys", headers)
        self._outside.metrics.key_requests.labels(key=caller.name).inc()
        return caller

    def _preflight(self, client: web.BaseRequest) -> web.Response:
        wanted = client.headers.get("Access-Control-Request-Headers", "")
        headers = self._door.origins.preflight(client.headers["Origin"], wanted)
        if not headers:
            raise _Refused(403, "origin", "pages of this origin may not ask (--cors-origin)")
        return web.Response(status=204, headers=headers)

    def snapshot(self) -> Snapshot:
        """The routable engines with this router's own load counted in."""
        return self._outside.snapshot()

    # --- generation -------------------------------------------------------------------------------------------

    async def _serve(
        self, client: web.BaseRequest, caller: Caller | None, shown: Mapping[str, str]
    ) -> web.StreamResponse:
        if client.path in FORBIDDEN_PATHS:
            raise _Refused(403, "forbidden", "adapters are loaded at the engines themselves")
        if self._outside.gate.queue.draining:
            raise _Refused(REFUSALS["draining"][0], "draining", REFUSALS["draining"][1])
        self._outside.metrics.in_flight.inc()
        self._outside.under_way += 1
        ends_at = time.monotonic() + self._door.request_timeout_s
        reading: Reading | None = None
        share = Share(self._bodies)
        try:
            raw = await self._read(client, share)
            body, named = self._read_body(client, raw)
            _refuse_state(client.path, body)
            model = self._model_of(named)
            request = self._public_request(client, body, raw, model, caller)
            wish = self._wish(client, request.body, raw, caller)
            headers = {name: client.headers[name] for name in self._passed if name in client.headers}
            headers.setdefault("Content-Type", "application/json")
            headers["X-Request-Id"] = _request_id(client) or secrets.token_hex(16)
            if request.traceparent:
                headers["traceparent"] = request.traceparent
            seen = self._look()
            reading = self._ask(request, headers, seen.engines)  # the rest can be done while an engine reads it
            self._outside.retry_budget.on_request()
            session = client.headers.get(SESSION_HEADER, "") or session_of(request.body)
            journey = Journey(request, self._settings, self._outside.retry_budget)
            conductor = Conductor(
                journey,
                self._outside,
                client,
                model=model,
                headers=headers,
                shown=shown,
                begins=partial(self._begin, request, session, reading, seen),
                wish=wish,
            )
            return await conductor.play(timeout_s=ends_at - time.monotonic())
        finally:
            if reading is not None:
                reading.drop()
            share.give_back()
            self._outside.metrics.in_flight.dec()
            self._outside.under_way -= 1

    def _look(self) -> _Look:
        return _Look(self.snapshot(), self._outside.changes, time.monotonic())

    def _ask(self, request: Request, headers: dict[str, str], snapshot: Snapshot) -> Reading | None:
        if self._settings.policy != "prefix":
            return None
        return self._outside.prompts.ask(
            request.path, request.body, request.model, snapshot, turn=self._turn, headers=headers
        )

    async def _begin(self, request: Request, session: str, reading: Reading | None, seen: _Look) -> Begin:
        """`seen`: by which the prompt is read; looked at anew unless nothing has happened since."""
        outside, prompt = self._outside, None
        if reading is not None:
            prompt = reading.prompt  # of the last time: it has waited in a line
            if prompt is None:
                prompt = await outside.prompts.read(reading, time.monotonic())
                await outside.brought(prompt, request, seen.engines, self._turn)
                reading.prompt = prompt
        self._turn += 1
        now = time.monotonic()
        same = seen.changes == outside.changes and now - seen.at < MOMENT_S
        known = prompt and outside.prompts.refreshed(prompt, now)
        asked = Asked(draws=_draws(), session=session, prompt=known)
        return Begin(
            snapshot=seen.engines if same else self.snapshot(),
            behind=outside.gate.queue.needs,
            retry_after_s=outside.retry_after_s(request.model),
            turn=self._turn,
            handoff_id=secrets.token_bytes(HANDOFF_ID_BYTES),
            now_unix_s=time.time(),
            asked=asked,
        )

    async def _read(self, client: web.BaseRequest, share: Share) -> bytes:
        """The whole body. A client that stops in the middle must not stay for ever."""
        try:
            if client.content.is_eof():
                return await share.read(client)
            async with asyncio.timeout(min(BODY_S, self._door.request_timeout_s)):
                if client.headers.get("Expect", "").lower() == "100-continue":
                    await client.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    client.writer.output_size = 0  # no byte of the answer yet
                return await share.read(client)
        except TimeoutError:
            raise _Refused(408, "slow_body", "the body did not arrive in time") from None
        except NoRoom:
            raise _Refused(503, "no_room", "the bodies of other requests fill this router; ask again later") from None

    def _read_body(self, client: web.BaseRequest, raw: bytes) -> tuple[dict[str, Any], object]:
        """And the model that it names. An upload's is empty, but for that."""
        if client.path not in (COMPLETIONS, CHAT) and client.content_type.startswith("multipart/"):
            return {}, field_of(raw, client.headers["Content-Type"], "model")
        try:
            body = decoded(raw)
        except ValueError as error:
            raise _Refused(400, "not_json", str(error)) from error
        return body, body.get("model")

    def _model_of(self, model: object) -> str:
        models = self._outside.directory.models()
        if not models:
            raise _Refused(503, "no_engine", "no engine has joined this router yet")
        if model is None and len(models) == 1:
            return models[0]
        if not isinstance(model, str):
            raise _Refused(400, "model", f"name a model; known here: {', '.join(models)}")
        if model not in models:
            raise _Refused(404, "model", f"the model {model!r} does not exist; known here: {', '.join(models)}")
        return model

    def _public_request(
        self, client: web.BaseRequest, body: dict[str, Any], raw: bytes, model: str, caller: Caller | None
    ) -> Request:
        public, changed = without_private(body)
        if changed:
            self._outside.metrics.stripped.inc()
            if not self._stripped_logged:
                self._stripped_logged = True
                _log.warning("a client sent kv_transfer_params; stripped, as always from now on (see the metrics)")
        if caller is not None:
            if caller.tenant and not body:
                raise _Refused(403, "tenant", "your key has a tenant, and uploads can't be kept apart by tenant")
            changed |= caller.salted(public)
        given = client.headers.get("traceparent", "")
        return Request(
            path=client.path,
            model=model,
            body=public,
            raw=msgspec.json.encode(public) if changed else raw,
            traceparent=given if _TRACEPARENT.fullmatch(given) else "",
        )

    def _wish(self, client: web.BaseRequest, body: dict[str, Any], raw: bytes, caller: Caller | None) -> Wish:
        try:
            return wish_of(client.headers, body, size_bytes=len(raw), caller=caller)
        except ValueError as error:
            raise _Refused(400, "wish", str(error)) from error

    # --- the router's own pages -------------------------------------------------------------------------------

    async def _health(self, client: web.BaseRequest) -> web.Response:
        return web.Response()

    async def _readyz(self, client: web.BaseRequest) -> web.Response:
        """200 when some model can be served; with ?engines=N, when in addition N engines are routable."""
        snapshot, directory = self.snapshot(), self._outside.directory
        reasons = [
            *self._outside.reasons(),
            *(f"waiting for /health of {engine_id}" for engine_id in directory.joining()),
            *self._missing(),
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
            return refusal(400, "?engines= takes a number")
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
        return as_json(page, status=200 if ready else 503)

    async def metrics_page(self, client: web.BaseRequest) -> web.Response:
        text = await read_text(Path(self._all_metrics)) if self._all_metrics else b""
        text = text or self.own_metrics()
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    def own_metrics(self) -> bytes:
        """Of this worker."""
        return self.metrics.render(self._outside.moment())

    async def _models(self, client: web.BaseRequest) -> web.Response:
        """What vLLM says of its models, as far as engines tell it."""
        found = {}
        for info in (candidate.info for candidate in self._outside.directory.snapshot()):
            for model in info.models:
                parent = None if model == info.model else info.model
                found[model] = {
                    "id": model, "object": "model", "created": 0, "owned_by": "pdx", "root": model, "parent": parent,
                    "max_model_len": info.context_tokens or None,
                }  # fmt: skip
        if client.path == MODELS_PATH:
            return as_json({"object": "list", "data": [found[model] for model in sorted(found)]})
        model = client.path.removeprefix(f"{MODELS_PATH}/")
        if model not in found:
            raise _Refused(404, "model", f"the model {model!r} does not exist; known here: {', '.join(sorted(found))}")
        return as_json(found[model])


def session_of(body: Mapping[str, Any]) -> str:
    """By which a client says what belongs together, if it does."""
    keys = (body.get(field) for field in SESSION_FIELDS)
    return next((key[:SESSION_CHARS_MAX] for key in keys if isinstance(key, str) and key), "")


def _draws() -> tuple[float, float, float, float]:
    return random.random(), random.random(), random.random(), random.random()  # noqa: S311 - it only spreads load


class _Look(NamedTuple):
    engines: Snapshot
    changes: int  # as `Outside.changes`
    at: float


class _Refused(Exception):
    """A request that goes nowhere: with the status and the words that say so, and the reason that is counted."""

    def __init__(self, status: int, reason: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.headers = headers or {}


def _refuse_state(path: str, body: Mapping[str, Any]) -> None:
    """An engine that keeps responses keeps them for itself: the next request may reach another."""
    if path == RESPONSES and (body.get("previous_response_id") or body.get("background")):
        raise _Refused(
            400, "state", "responses are not kept here: send the whole conversation, and wait for its answer"
        )


def _request_id(client: web.BaseRequest) -> str:
    """As the client gives it, if it gives one that can be one."""
    given = client.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else ""
