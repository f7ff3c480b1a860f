"""How long and how urgently a request waits, and for whom: read from its headers and its body.

    x-pdx-priority: -100 … 100      lower goes first; without it the body's `priority`, which engines see too
    x-pdx-ttl-secs: 2.5             504 if no engine has room by then; the router's --queue-timeout-secs if shorter

Who waits for whom is told by the API key, or else, where nobody needs one, by the credentials for engines or by the
`cache_salt`: tenants take turns. These two are clients' own words, as the priority is; a router that is open to
strangers should not be open without keys.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from pdx.router.front.access import Caller
from pdx.router.line.admission import PRIORITIES, Wish

PRIORITY_HEADER = "x-pdx-priority"
TTL_HEADER = "x-pdx-ttl-secs"


def wish_of(
    headers: Mapping[str, str], body: Mapping[str, Any], *, size_bytes: int, caller: Caller | None = None
) -> Wish:
    """Raises ValueError, in words for the client, if a header is not what it should be.

    With a `caller` the tenant is its key's, or the key itself: no way to write a header makes two of one.
    """
    tenant = (caller.tenant or caller.name) if caller is not None else _tenant(headers, body)
    return Wish(tenant=tenant, priority=_priority(headers, body), ttl_s=_ttl_s(headers),
                size_bytes=size_bytes)  # fmt: skip


def _priority(headers: Mapping[str, str], body: Mapping[str, Any]) -> int:
    least, most = PRIORITIES
    text = headers.get(PRIORITY_HEADER)
    if text is None:
        given = body.get("priority")  # vLLM's range is larger; what it does not take it says itself
        return max(least, min(most, given)) if isinstance(given, int) else 0
    if not (text.removeprefix("-").isdecimal() and len(text) <= 4 and least <= int(text) <= most):
        raise ValueError(f"{PRIORITY_HEADER} is a whole number from {least} to {most}")
    return int(text)


def _ttl_s(headers: Mapping[str, str]) -> float:
    text = headers.get(TTL_HEADER)
    if text is None:
        return math.inf
    try:
        ttl_s = float(text)
    except ValueError:
        ttl_s = math.nan
    if not 0 < ttl_s < math.inf:
        raise ValueError(f"{TTL_HEADER} is a positive number of seconds")
    return ttl_s


def _tenant(headers: Mapping[str, str], body: Mapping[str, Any]) -> str:
    """Nobody's secret: a digest tells tenants apart as well."""
    told = headers.get("Authorization") or headers.get("x-api-key")
    if not told:
        salt = body.get("cache_salt")
        told = salt if isinstance(salt, str) else ""
    return hashlib.blake2b(told.encode(errors="replace"), digest_size=8).hexdigest() if told else ""
