"""The router's own pages and refusals: JSON that no cache keeps and that no browser takes for anything else."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from aiohttp import web

from pdx.router.front.replies import error_body

_HEADERS = {"Content-Type": "application/json", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def as_json(page: object, *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(page), headers=_HEADERS)


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """An error object; of a 503 with when to come again, unless `headers` say so."""
    given = {**_HEADERS, **({"Retry-After": "1"} if status == 503 else {}), **(headers or {})}
    return web.Response(status=status, body=error_body(status, message), headers=given)
