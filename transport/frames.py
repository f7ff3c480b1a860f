"""The bytes of the tcp lane: what a frame looks like, and nothing of sockets, windows or memory.

All integers are little-endian. Every frame begins with magic, version, kind, in every version to come.

    HELLO      connector -> acceptor   40 bytes: prefix, is_keyed, nonce
    CHALLENGE  acceptor -> connector   40 bytes: prefix, is_keyed, nonce
    PROOF      both, if keyed          40 bytes: prefix, 0, HMAC-SHA256 (see handshake)
    PART       connector -> acceptor   head (32 bytes), spans (12 bytes each), payload
    LAST       connector -> acceptor   head, spans, payload, notice: the put is complete

Decoders take bytes from anybody: they raise WireError (VersionMismatch among them) and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import msgspec

from pdx.errors import VersionMismatch, WireError
from pdx.transport.api import Span

LANE_VERSION = 2
MAGIC = b"PDXL"

HELLO, CHALLENGE, PROOF, PART, LAST = 1, 2, 3, 4, 5

# How large frames are their sender decides (see pace).
FRAME_BYTES_MAX = 1 << 20
# Below Linux's IOV_MAX of 1024, leaving room for head, spans and notice; 3 KiB of spans at most.
SPANS_MAX = 256
# A notice names a handoff and carries 8 bytes (40 in digest mode) a page: 64 KiB are over 1,500 pages.
NOTICE_BYTES_MAX = 64 << 10
NONCE_BYTES = 32

_PREFIX = struct.Struct("<4sBB")
_GREETING = struct.Struct("<4sBBH32s")
_HEAD = struct.Struct("<4sBBHIIQQ")
_SPAN = struct.Struct("<QI")
GREETING_BYTES = _GREETING.size
HEAD_BYTES = _HEAD.size
SPAN_BYTES = _SPAN.size

U64_MAX = (1 << 64) - 1


class Greeting(msgspec.Struct, frozen=True):
    """HELLO, CHALLENGE or PROOF; `secret` is a nonce or a MAC."""

    kind: int
    is_keyed: bool
    secret: bytes


class Head(msgspec.Struct, frozen=True):
    """The fixed part of PART and LAST."""

    is_last: bool
    window: int
    ticket: int  # the sender's, for its logs and ours
    span_count: int
    payload_bytes: int
    notice_bytes: int


def encode_greeting(greeting: Greeting) -> bytes:
    return _GREETING.pack(MAGIC, LANE_VERSION, greeting.kind, greeting.is_keyed, greeting.secret)


def decode_greeting(data: bytes | bytearray | memoryview, *, kind: int) -> Greeting:
    """The greeting of this kind. Raises WireError, or VersionMismatch before it looks beyond the version."""
    if len(data) != GREETING_BYTES:
        raise WireError(f"a greeting has {GREETING_BYTES} bytes, not {len(data)}")
    _check_prefix(data)
    _, _, got_kind, is_keyed, secret = _GREETING.unpack(data)
    if got_kind != kind or is_keyed > 1:
        raise WireError(f"expected greeting {kind}, got {got_kind} with flag {is_keyed}")
    return Greeting(kind, bool(is_keyed), secret)


def encode_frame_start(head: Head, spans: Iterable[Span]) -> bytes:
    """Head and spans; payload and notice follow straight from memory."""
    kind = LAST if head.is_last else PART
    start = _HEAD.pack(
        MAGIC, LANE_VERSION, kind, head.span_count, head.payload_bytes, head.notice_bytes, head.window, head.ticket
    )
    return start + b"".join([_SPAN.pack(span.offset, span.length) for span in spans])


def decode_head(data: bytes | bytearray | memoryview) -> Head:
    """Raises WireError unless this is a head whose every length is within bounds."""
    if len(data) != HEAD_BYTES:
        raise WireError(f"a head has {HEAD_BYTES} bytes, not {len(data)}")
    _check_prefix(data)
    _, _, kind, span_count, payload_bytes, notice_bytes, window, ticket = _HEAD.unpack(data)
    if kind != LAST and kind != PART:
        raise WireError(f"expected a put, got frame kind {kind}")
    if span_count > SPANS_MAX or payload_bytes > FRAME_BYTES_MAX or notice_bytes > NOTICE_BYTES_MAX:
        raise WireError(f"frame of {span_count} spans, {payload_bytes} + {notice_bytes} bytes is over the limits")
    if kind == PART and (notice_bytes or not span_count):
        raise WireError("only the last frame of a put carries a notice or no spans")
    return Head(kind == LAST, window, ticket, span_count, payload_bytes, notice_bytes)


def decode_spans(data: bytes | bytearray | memoryview, head: Head) -> list[Span]:
    """Raises WireError unless these are the head's spans and add up to its payload."""
    if len(data) != head.span_count * SPAN_BYTES:
        raise WireError(f"{head.span_count} spans do not have {len(data)} bytes")
    spans: list[Span] = []
    total_bytes = 0
    for offset, length in _SPAN.iter_unpack(data):
        if length == 0 or offset + length > U64_MAX:
            raise WireError("a span is empty or ends beyond 2^64")
        total_bytes += length
        spans.append(Span(offset, length))
    if total_bytes != head.payload_bytes:
        raise WireError(f"spans of {total_bytes} bytes for a payload of {head.payload_bytes}")
    return spans


def _check_prefix(data: bytes | bytearray | memoryview) -> None:
    magic, version, _ = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise WireError("these bytes are no frame of a pdx lane")
    if version != LANE_VERSION:
        raise VersionMismatch(f"peer's lane speaks version {version}, this one {LANE_VERSION}")
