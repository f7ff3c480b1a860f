"""One field of a form that a client uploads, found in its body without taking that apart: it goes on as it came.

Parts are found by their boundary, and the standard library reads their heads. Where that finds none although an engine
would, the client is told to name a model, and nothing worse happens.
"""

from __future__ import annotations

from email.message import Message
from email.parser import BytesHeaderParser

PARTS_MAX = 64  # a form of vLLM's has some 20 fields
HEAD_BYTES_MAX = 1024  # of one part; of a longer one the name is not looked at: that takes time by its square


def field_of(raw: bytes, content_type: str, name: str) -> str | None:
    """The first of this name. Never raises for what a client says."""
    boundary = _boundary_of(content_type)
    delimiter = b"\r\n--" + boundary
    if not boundary or not raw.startswith(delimiter[2:]):
        return None
    at = len(delimiter) - 2  # no line lies before the first
    for _ in range(PARTS_MAX):
        head_ends = raw.find(b"\r\n\r\n", at)
        if head_ends < 0:
            return None
        value_at = head_ends + 4
        value_ends = raw.find(delimiter, value_at)
        if value_ends < 0:
            return None
        if head_ends - at <= HEAD_BYTES_MAX and _name_in(raw[at:head_ends].lstrip()) == name:
            return raw[value_at:value_ends].decode(errors="replace")
        at = value_ends + len(delimiter)
    return None


def _boundary_of(content_type: str) -> bytes:
    head = Message()
    head["Content-Type"] = content_type if len(content_type) <= HEAD_BYTES_MAX else ""
    return (head.get_boundary() or "").encode(errors="replace")


def _name_in(head: bytes) -> object:
    return BytesHeaderParser().parsebytes(head).get_param("name", header="content-disposition")
