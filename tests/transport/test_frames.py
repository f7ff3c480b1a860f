"""The tcp lane's bytes: pinned, and decoders that survive anything."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdx.errors import VersionMismatch, WireError
from pdx.transport.api import Span
from pdx.transport.frames import (
    CHALLENGE,
    FRAME_BYTES_MAX,
    GREETING_BYTES,
    HEAD_BYTES,
    HELLO,
    LANE_VERSION,
    NOTICE_BYTES_MAX,
    PROOF,
    SPAN_BYTES,
    SPANS_MAX,
    Greeting,
    Head,
    decode_greeting,
    decode_head,
    decode_spans,
    encode_frame_start,
    encode_greeting,
)

HEAD = Head(is_last=True, window=0x1122334455667788, ticket=7, span_count=2, payload_bytes=0x30000, notice_bytes=5)
SPANS = [Span(0x10000, 0x20000), Span(0xABCDEF0123, 0x10000)]
# Changing these bytes means a new LANE_VERSION.
GOLDEN_LAST = (
    "5044584c 02 05 0200 00000300 05000000 8877665544332211 0700000000000000"
    "0000010000000000 00000200  2301efcdab000000 00000100"
)
GOLDEN_HELLO = "5044584c 02 01 0100" + "ab" * 32


def test_golden_put() -> None:
    raw = encode_frame_start(HEAD, SPANS)
    assert raw == bytes.fromhex(GOLDEN_LAST)
    assert decode_head(raw[:HEAD_BYTES]) == HEAD
    assert decode_spans(raw[HEAD_BYTES:], HEAD) == SPANS


def test_golden_hello() -> None:
    greeting = Greeting(HELLO, True, b"\xab" * 32)
    assert encode_greeting(greeting) == bytes.fromhex(GOLDEN_HELLO)
    assert decode_greeting(bytes.fromhex(GOLDEN_HELLO), kind=HELLO) == greeting


def test_version_comes_before_everything_else() -> None:
    for size in (HEAD_BYTES, GREETING_BYTES):
        foreign = b"PDXL" + bytes([LANE_VERSION + 1]) + b"\xff" * (size - 5)
        with pytest.raises(VersionMismatch):
            decode_head(foreign) if size == HEAD_BYTES else decode_greeting(foreign, kind=HELLO)


@pytest.mark.parametrize(
    "head",
    [
        Head(True, 1, 1, SPANS_MAX + 1, 1, 0),
        Head(True, 1, 1, 1, FRAME_BYTES_MAX + 1, 0),
        Head(True, 1, 1, 1, 1, NOTICE_BYTES_MAX + 1),
        Head(False, 1, 1, 1, 1, 1),
        Head(False, 1, 1, 0, 0, 0),
    ],
    ids=["spans", "payload", "notice", "notice in part", "empty part"],
)
def test_head_out_of_bounds(head: Head) -> None:
    with pytest.raises(WireError):
        decode_head(encode_frame_start(head, []))


@pytest.mark.parametrize(
    "spans",
    [[Span(0, 0x30000), Span(0, 0)], [Span(0, 1), Span(1, 1)], [Span((1 << 64) - 1, 0x20000), Span(0, 0x10000)]],
    ids=["empty", "sum", "overflow"],
)
def test_bad_spans(spans: list[Span]) -> None:
    with pytest.raises(WireError):
        decode_spans(encode_frame_start(HEAD, spans)[HEAD_BYTES:], HEAD)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(st.binary(max_size=HEAD_BYTES + 8), st.booleans())
def test_head_of_any_bytes(data: bytes, is_prefixed: bool) -> None:
    """Whatever comes in: a bounded Head or a WireError."""
    if is_prefixed:
        data = (bytes.fromhex(GOLDEN_LAST)[:6] + data)[:HEAD_BYTES]
    try:
        head = decode_head(data)
    except WireError:
        return
    assert head.span_count <= SPANS_MAX
    assert head.payload_bytes <= FRAME_BYTES_MAX
    assert head.notice_bytes <= NOTICE_BYTES_MAX


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.binary(max_size=4 * SPAN_BYTES), st.integers(0, 4), st.integers(0, FRAME_BYTES_MAX))
def test_spans_of_any_bytes(data: bytes, span_count: int, payload_bytes: int) -> None:
    head = Head(True, 1, 1, span_count, payload_bytes, 0)
    try:
        spans = decode_spans(data, head)
    except WireError:
        return
    assert sum(span.length for span in spans) == payload_bytes


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.binary(max_size=GREETING_BYTES + 4), st.sampled_from([HELLO, CHALLENGE, PROOF]))
def test_greeting_of_any_bytes(data: bytes, kind: int) -> None:
    for candidate in (data, (bytes([*b"PDXL", LANE_VERSION]) + data)[:GREETING_BYTES]):
        try:
            assert len(decode_greeting(candidate, kind=kind).secret) == 32
        except WireError:
            pass


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.lists(st.tuples(st.integers(0, 1 << 62), st.integers(1, 1000)), min_size=1, max_size=SPANS_MAX),
)
def test_round_trip(window: int, ticket: int, pairs: list[tuple[int, int]]) -> None:
    spans = [Span(offset, length) for offset, length in pairs]
    head = Head(False, window, ticket, len(spans), sum(length for _, length in pairs), 0)
    raw = encode_frame_start(head, spans)
    assert decode_head(raw[:HEAD_BYTES]) == head
    assert decode_spans(raw[HEAD_BYTES:], head) == spans
