"""Clients' bodies: read within a budget of all requests together, and their JSON decoded within bounds.

A body of a few MiB can be millions of empty objects: to make them takes seconds and a gigabyte, and whatever looks
through them afterwards takes longer. So they are counted before it is decoded.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
from aiohttp import web

CONTAINERS_MAX = 100_000  # lists and objects: of chats, tools and schemas
STRINGS_MAX = 400_000
BUFFERED_BYTES = 1 << 20  # of one body, before it is counted: the larger, the fewer pauses
ITEMS_MAX = 2_200_000  # of all lists and objects together: two million token ids
# Nothing is tried twice: of a body of nothing but escapes too.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


class NoRoom(Exception):
    """The bodies of requests under way are as much as they may be."""


class Budget:
    """How many bytes the bodies of all requests under way may have together. Belongs to the event loop's thread."""

    def __init__(self, bytes_max: int) -> None:
        self.free = bytes_max


class Share:
    """What one request has of it, until it gives that back."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._taken = 0

    async def read(self, client: web.BaseRequest) -> bytes:
        """The whole body, paid for as it comes. Raises NoRoom, and HTTPRequestEntityTooLarge."""
        client.content.set_read_chunk_size(BUFFERED_BYTES)
        body = bytearray()  # a list of parts would cost 40 bytes for each, which may have one
        while part := await client.content.readany():
            if len(body) + len(part) > client.client_max_size:
                raise web.HTTPRequestEntityTooLarge(client.client_max_size)
            if len(part) > self._budget.free:
                raise NoRoom
            self._budget.free -= len(part)
            self._taken += len(part)
            body += part
        return bytes(body)

    def give_back(self) -> None:
        self._budget.free += self._taken
        self._taken = 0


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
