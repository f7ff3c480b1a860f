"""What a client asked. A value, made by the front."""

from __future__ import annotations

from typing import Any

import msgspec


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the client asked, without its private fields."""

    path: str
    model: str
    body: dict[str, Any]  # empty for uploads, which only pass through
    traceparent: str = ""  # the client's trace, as W3C writes it
    raw: bytes  # what one engine alone gets: the body as it came, or encoded anew if something was stripped
