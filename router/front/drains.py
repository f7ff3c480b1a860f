"""The admin port's pages for draining: what is to end here, and how far it has got.

    POST /admin/drain, undrain    {"engine_id": "d0"}, or {} for the whole router
    GET  /admin/drain

A drained engine gets nothing new and ends what it has; what was to come to it goes elsewhere. A drained router answers
503 with Retry-After. Both hold for this router only, and an engine's drain ends when the engine leaves. Workers of one
router share no drains, so that with several this port refuses to promise any.
"""

from __future__ import annotations

from aiohttp import web

from pdx import admin
from pdx.admin import Drained, DrainedEngine, DrainRequest
from pdx.errors import Refused
from pdx.router.front.answers import as_json
from pdx.router.outside import Outside


class Drains:
    """The pages. Owned by the event loop's thread."""

    def __init__(self, outside: Outside, *, workers: int) -> None:
        self._outside = outside
        self._workers = workers

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/admin/drain", self._drain),
            web.post("/admin/undrain", self._undrain),
            web.get("/admin/drain", self._shown),
        ]

    async def _drain(self, client: web.Request) -> web.StreamResponse:
        engine_id = await self._named(client)
        if not engine_id:
            self._outside.gate.drain()
        elif engine_id in self._outside.directory.engines():
            self._outside.standing.drained.add(engine_id)
        else:
            raise Refused(f"no engine {engine_id!r} has joined this router")
        return self._report()

    async def _undrain(self, client: web.Request) -> web.StreamResponse:
        engine_id = await self._named(client)
        if not engine_id:
            self._outside.gate.queue.resume()
        elif engine_id in self._outside.standing.drained:
            self._outside.standing.drained.remove(engine_id)
            self._outside.gate.stir()
        else:
            raise Refused(f"engine {engine_id!r} is not drained")
        return self._report()

    async def _named(self, client: web.Request) -> str:
        if self._workers > 1:
            raise Refused(f"one of this router's {self._workers} workers can't drain for the others: use --workers 1")
        return admin.parsed(await client.read(), DrainRequest).engine_id

    async def _shown(self, client: web.Request) -> web.StreamResponse:
        return self._report()

    def _report(self) -> web.Response:
        outside = self._outside
        engines = [
            DrainedEngine(engine_id=engine_id, in_flight=outside.in_flight[engine_id])
            for engine_id in sorted(outside.standing.drained)
        ]
        report = Drained(router=outside.gate.queue.draining, under_way=outside.under_way, engines=engines)
        return as_json(report)
