"""The admin port: the verbs over HTTP, for all daemons that have announced an engine here.

    POST /admin/kv/lookup, pin, unpin, clear    bodies and reports: pdx.admin; 207 where some daemon did not answer
    GET  /admin/kv/stats, health, check
    …    /admin/drain, /admin/undrain           see drains
    GET  /metrics                               the router's, as at the front
    GET  /admin/metrics                         daemons' gauges and counters for Prometheus: see daemon_metrics
    GET  /dashboard                             the live page: it asks for the token, and holds nothing itself
    GET  /admin/live?run=RUN&since=CURSOR       live.values.Live: engines, daemons, requests that changed since
    GET  /admin/live/HANDOFF                    live.values.Journal: one request, layer by layer

A port of its own, because it is for operators: off loopback it wants a token made from the cluster key. On loopback it
needs none, and takes nothing that a web page could send there: only JSON, only to a loopback name.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from pdx import admin
from pdx.admin import (
    BlockNames,
    ClearRequest,
    DaemonReport,
    ForPrompt,
    LookupRequest,
    PinRequest,
    Prompt,
    Report,
    UnpinRequest,
)
from pdx.errors import Refused
from pdx.router.engines.daemons import Daemons
from pdx.router.engines.upstream import Upstream, UpstreamError
from pdx.router.front import daemon_metrics
from pdx.router.front.access import names_loopback
from pdx.router.front.answers import as_json, refusal
from pdx.router.front.drains import Drains
from pdx.router.live import dashboard
from pdx.router.live.feed import LiveFeed
from pdx.verbs import SpaceInfo
from pdx.wire import Ask

BODY_BYTES_MAX = 32 << 20  # a million token ids, as at the front
TOKENIZE_S = 5.0
DASHBOARD = "/dashboard"
QUESTIONS = {"stats": Ask(verb="stats"), "health": Ask(verb="health"), "check": Ask(verb="check")}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Admin:
    """The routes. `token`: what clients must know; empty: nothing, which is for loopback only."""

    def __init__(
        self, daemons: Daemons, upstream: Upstream, drains: Drains, live: LiveFeed, *, metrics: Handler, token: str
    ) -> None:
        """`metrics`: the front's page of that name."""
        self._daemons = daemons
        self._upstream = upstream
        self._drains = drains
        self._live = live
        self._router_metrics = metrics
        self._token = token

    def app(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES_MAX, middlewares=[_errors_as_json, self._guarded])
        app.router.add_post("/admin/kv/lookup", self._lookup)
        app.router.add_post("/admin/kv/pin", self._pin)
        app.router.add_post("/admin/kv/unpin", self._unpin)
        app.router.add_post("/admin/kv/clear", self._clear)
        app.router.add_get(f"/admin/kv/{{question:{'|'.join(QUESTIONS)}}}", self._question)
        app.router.add_get("/metrics", self._router_metrics)
        app.router.add_get("/admin/metrics", self._metrics)
        app.router.add_routes(self._drains.routes())
        app.router.add_get(DASHBOARD, self._dashboard)
        app.router.add_get("/admin/live", self._now)
        app.router.add_get("/admin/live/{handoff:[0-9a-f]{2,64}}", self._journal)
        return app

    async def _dashboard(self, client: web.Request) -> web.StreamResponse:
        page = dashboard.page()
        return web.Response(body=page.body, headers=page.headers)

    async def _now(self, client: web.Request) -> web.StreamResponse:
        since = client.query.get("since", "0")
        if not since.isdecimal() or len(since) > 18:
            return refusal(400, "?since= takes the number that the last answer gave as next")
        return as_json(await self._live.live(client.query.get("run", ""), int(since)))

    async def _journal(self, client: web.Request) -> web.StreamResponse:
        handoff = client.match_info["handoff"]
        journal = await self._live.journal(bytes.fromhex(handoff)) if len(handoff) % 2 == 0 else None
        return refusal(404, "no such handoff among the last requests") if journal is None else as_json(journal)

    async def _lookup(self, client: web.Request) -> web.StreamResponse:
        request = admin.parsed(await client.read(), LookupRequest)
        return await self._of_prompt(request, admin.lookups)

    async def _pin(self, client: web.Request) -> web.StreamResponse:
        request = admin.parsed(await client.read(), PinRequest)
        return await self._of_prompt(request, partial(admin.pins, request))

    async def _unpin(self, client: web.Request) -> web.StreamResponse:
        request = admin.parsed(await client.read(), UnpinRequest)
        return _reported(Report(daemons=await self._daemons.steered_alike(admin.unpin(request))))

    async def _clear(self, client: web.Request) -> web.StreamResponse:
        request = admin.parsed(await client.read(), ClearRequest)
        admin.check_clear(request)
        if request.given:
            return await self._of_prompt(request, partial(admin.prompt_clears, request), attached=False)
        meant: list[SpaceInfo] = []
        if request.model:
            infos, silent = await self._daemons.spaces()
            meant = _chosen(request.model, infos, silent, attached=False)
        reports = await self._daemons.steered_alike(admin.clear(request, meant))
        return _reported(Report(daemons=reports, model=request.model))

    async def _question(self, client: web.Request) -> web.StreamResponse:
        question = QUESTIONS[client.match_info["question"]]
        return _reported(Report(daemons=await self._daemons.asked(question)))

    async def _metrics(self, client: web.Request) -> web.StreamResponse:
        reports = await self._daemons.asked(Ask(verb="view"))
        body = await asyncio.to_thread(daemon_metrics.exposed, reports)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _of_prompt(self, request: Prompt, verbs: ForPrompt, *, attached: bool = True) -> web.StreamResponse:
        """To each daemon what is meant there, by the names that its own engines would give to the prompt's blocks."""
        admin.check_prompt(request)
        infos, silent = await self._daemons.spaces()
        if silent and not infos:
            return _reported(Report(daemons=silent))
        meant = _chosen(request.model, infos, silent, attached=attached)
        model, tokens = meant[0].content.model, await self._tokens(request, meant)
        names = BlockNames(tokens, request.cache_salt or "")
        # A million tokens are half a second of hashing: not on the loop that streams answers.
        if attached:
            asked = {
                daemon: await asyncio.to_thread(verbs, chosen, names)
                for daemon, each in infos.items()
                if (chosen := [info for info in each if info.content.model == model and info.attached])
            }
        else:  # all of them: a disk may have blocks of engines that this life of its daemon has not met
            kinds = list({(info.content, info.layout): info for info in meant}.values())
            everything = await asyncio.to_thread(verbs, kinds, names)
            asked = dict.fromkeys(infos, everything)
        reports = [*await self._daemons.steered(asked), *silent]
        return _reported(Report(daemons=reports, model=model, prompt_tokens=len(tokens)))

    async def _tokens(self, prompt: Prompt, infos: Sequence[SpaceInfo]) -> list[int]:
        if prompt.tokens is not None:
            return prompt.tokens
        url, body = admin.tokenizer(infos), admin.tokenize_body(prompt, infos[0].content.model)
        headers = {"Content-Type": "application/json"}
        async with asyncio.timeout(TOKENIZE_S), self._upstream.call(url, body, headers) as reply:
            answer = await reply.read()
        if reply.status != 200:
            raise Refused(f"{url} answers HTTP {reply.status}: {admin.reason_in(answer)}")
        return admin.tokens_in(answer)

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if (
            self._token
            and request.path != DASHBOARD
            and not hmac.compare_digest(given, f"Bearer {self._token}".encode())
        ):
            return refusal(401, "this port wants the token of the cluster key")
        if not self._token and not names_loopback(request.headers):
            return refusal(403, "this port is for names of the loopback only")
        if request.method == "POST" and request.content_type != "application/json":
            return refusal(415, "send JSON, and say so")
        return await handler(request)


def _chosen(
    model: str, infos: dict[str, list[SpaceInfo]], silent: Sequence[DaemonReport], *, attached: bool
) -> list[SpaceInfo]:
    try:
        return admin.chosen(model, _all(infos), attached=attached)
    except Refused as error:
        if not silent:
            raise
        raise Refused(f"{error}; {len(silent)} daemons have not said what they have") from error


def _all(infos: dict[str, list[SpaceInfo]]) -> list[SpaceInfo]:
    return [info for each in infos.values() for info in each]


def _reported(report: Report) -> web.Response:
    return as_json(report, status=207 if report.errors else 200)


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refused as error:
        return refusal(400, str(error))
    except (UpstreamError, TimeoutError) as error:
        return refusal(502, f"no engine has tokenized the text: {error or 'timeout'}")
    except web.HTTPException as error:
        return refusal(error.status, error.text or error.reason)
