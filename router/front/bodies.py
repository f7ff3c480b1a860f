"""Clients' JSON, decoded within bounds.

A body of a few MiB can be millions of empty objects: to make them takes seconds and a gigabyte, and whatever looks
through them afterwards takes longer. So they are counted before it is decoded.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

CONTAINERS_MAX = 100_000  # lists and objects: of chats, tools and schemas
STRINGS_MAX = 400_000
ITEMS_MAX = 2_200_000  # of all lists and objects together: two million token ids
# Nothing is tried twice: of a body of nothing but escapes too.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def decoded(raw: bytes) -> dict[str, Any]:
    """Raises ValueError, in words for the client."""
    _check_parts(raw)
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError("the body must be a JSON object")
    return body


def _check_parts(raw: bytes) -> None:
    if (raw.count(b'"') - raw.count(b'\\"')) // 2 > STRINGS_MAX:
        raise ValueError(f"the body has more than {STRINGS_MAX:,} strings")
    if _containers(raw) <= CONTAINERS_MAX and raw.count(b",") <= ITEMS_MAX:
        return
    bare = _STRING.sub(b"", raw)  # a prompt may be a JSON document itself
    if _containers(bare) > CONTAINERS_MAX:
        raise ValueError(f"the body has more than {CONTAINERS_MAX:,} lists and objects")
    if bare.count(b",") > ITEMS_MAX:
        raise ValueError(f"the body's lists and objects have more than {ITEMS_MAX:,} items")


def _containers(raw: bytes) -> int:
    return raw.count(b"{") + raw.count(b"[")
