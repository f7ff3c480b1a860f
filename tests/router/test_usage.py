"""Streams cut into events, and the numbers that are rewritten."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdx.router.request.usage import EVENT_BYTES_MAX, Cached, EventStream, with_cached

USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8, "x": 1}}}
DELTA = b'data: {"choices":[{"text":"say \\"cached_tokens\\" \xf0\x9f\x99\x82"}]}\n\n'
STREAM = DELTA + b": ping\n\n" + b"data: " + json.dumps(USAGE).encode() + b"\n\ndata: [DONE]\n\n"


def cut(data: bytes, seed: int) -> list[bytes]:
    chance = random.Random(seed)
    places = sorted(chance.randrange(len(data)) for _ in range(12))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def passed(stream: EventStream, chunks: list[bytes]) -> bytes:
    return b"".join(stream.feed(chunk) for chunk in chunks) + stream.finish()


@given(st.integers(0, 10_000))
def test_bytes_pass_unchanged_however_they_come(seed: int) -> None:
    assert passed(EventStream(None), cut(STREAM, seed)) == STREAM
    assert passed(EventStream(Cached(8)), cut(STREAM, seed)) == STREAM  # the number is right already


@given(st.integers(0, 10_000))
def test_only_the_number_changes(seed: int) -> None:
    events = passed(EventStream(Cached(5)), cut(STREAM, seed)).split(b"\n\n")
    theirs = STREAM.split(b"\n\n")
    assert [events[0], events[1], events[3], events[4]] == [theirs[0], theirs[1], theirs[3], theirs[4]]
    USAGE_5 = {"choices": [], "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 5, "x": 1}}}
    assert json.loads(events[2][6:]) == USAGE_5


def test_a_part_of_an_event_is_held_back() -> None:
    stream = EventStream(None)
    assert stream.feed(b"data: 1\n\ndata: 2") == b"data: 1\n\n"
    assert stream.feed(b"\n") == b""
    assert stream.feed(b"\n") == b"data: 2\n\n"
    assert stream.feed(b"rest") == b""
    assert stream.finish() == b"rest"


def test_an_endless_event_is_passed_on() -> None:
    stream = EventStream(Cached(5))
    assert stream.feed(b"x" * EVENT_BYTES_MAX) == b""
    assert stream.feed(b"y") == b"x" * EVENT_BYTES_MAX + b"y"


def test_events_of_many_pieces_are_whole() -> None:
    """Whoever copies and searches all that he holds at each piece doesn't come to an end here."""
    stream, event = EventStream(None), b"data: " + b"x" * (EVENT_BYTES_MAX - 8) + b"\n\n"
    for _ in range(2):
        assert not any(stream.feed(event[at : at + 1]) for at in range(len(event) - 1))
        assert stream.feed(b"\n") == event


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_what_of_ours_follows_a_part_of_an_event_begins_anew(end: bytes) -> None:
    stream = EventStream(None)
    assert stream.before_ours() == b""
    stream.feed(b"data: 1" + end + b"data: 2")
    assert stream.before_ours() == b"", "the part is held back"
    stream.feed(b"x" * EVENT_BYTES_MAX)
    assert stream.before_ours() == b"\n\n"
    assert stream.feed(b"y") == b""
    assert stream.before_ours() == b"\n\n"
    stream.feed(end + b"z")
    assert stream.before_ours() == b""
    assert stream.finish() == b"z"
    assert stream.before_ours() == b"\n\n"


def test_answers_of_another_shape_stay() -> None:
    for body in (b"", b"[]", b"{", b'{"usage":null}', b'{"usage":{"prompt_tokens_details":null}}', b'{"usage":{}}'):
        assert with_cached(body, Cached(5)) == body
    changed = json.loads(with_cached(json.dumps(USAGE).encode(), Cached(0)))
    assert changed["usage"]["prompt_tokens_details"] == {"cached_tokens": 0, "x": 1}


@pytest.mark.parametrize(
    ("chunks", "done"),
    [
        ([b"data: 1\n\ndata: [DONE]\n\n"], True),
        ([b"data: 1\n\n", b"data: [DO", b"NE]\n\n"], True),
        ([b"data: 1\n\ndata: [DONE]"], False),
        ([b'data: {"text":"data: [DONE]"}\n\n'], False),
        ([b"id: data: [DONE]\n\n"], False),
    ],
)
def test_a_stream_that_is_done(chunks: list[bytes], done: bool) -> None:
    stream = EventStream(None)
    for chunk in chunks:
        stream.feed(chunk)
    assert stream.done is done


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
@pytest.mark.parametrize("done", [b"data: [DONE]", b"data:[DONE]"])
def test_streams_of_other_servers(end: bytes, done: bytes) -> None:
    """They may end lines with CR LF, and leave the space out."""
    events = b'data: {"a": 1}' + end + b'data:{"b": 2}' + end + done + end
    for seed in range(20):
        stream, seen = EventStream(Cached(3)), []
        for chunk in cut(events, seed):
            seen.append(stream.feed(chunk))
            assert not seen[-1] or seen[-1].endswith(end), "whole events only"
        assert b"".join(seen) == events
        assert stream.done


def anthropic(cached: int) -> bytes:
    usage = {"input_tokens": 10 - cached, "cache_read_input_tokens": cached, "output_tokens": 3}
    text = {"type": "text_delta", "text": 'data: {"usage": {"cache_read_input_tokens": 9}}'}
    events = [
        {"type": "message_start", "message": {"usage": {"input_tokens": 0, "output_tokens": 0}}},
        {"type": "content_block_delta", "index": 0, "delta": text},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage},
        {"type": "message_stop"},
    ]
    return b"".join(b"event: %b\ndata: %b\n\n" % (e["type"].encode(), msgspec.json.encode(e)) for e in events)


@given(st.integers(0, 10_000))
def test_anthropics_usage(seed: int) -> None:
    assert passed(EventStream(Cached(2)), cut(anthropic(9), seed)) == anthropic(2)
    whole = {"usage": {"input_tokens": 1, "cache_read_input_tokens": 9}}
    assert json.loads(with_cached(json.dumps(whole).encode(), Cached(0)))["usage"] == {
        "input_tokens": 10, "cache_read_input_tokens": 0
    }  # fmt: skip


def test_what_went_into_the_cache_is_prefills_number_too() -> None:
    """Decode has computed the prompt of 100 itself; of prefill's numbers, all that decode tells is shown."""

    def shown(usage: dict[str, Any], cached: Cached) -> Any:
        body = json.dumps({"usage": usage}).encode()
        whole = json.loads(with_cached(body, cached))["usage"]
        event = b"event: message_delta\ndata: " + body + b"\n\n"
        assert json.loads(EventStream(cached).feed(event).partition(b"data: ")[2])["usage"] == whole
        return whole

    told = {"input_tokens": 4, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 96}
    for cached, numbers in (
        (Cached(96, 0), (4, 96, 0)),
        (Cached(32, 64), (4, 32, 64)),
        (Cached(96), (4, 96, None)),
        (Cached(96, 9), (0, 96, 9)),  # more than there is
    ):
        assert tuple(shown(told, cached)[key] for key in told) == numbers
        details = {"cached_tokens": 0, "created_cache_tokens": 96}
        usage = shown({"prompt_tokens": 100, "prompt_tokens_details": details}, cached)
        assert usage["prompt_tokens"] == 100
        assert tuple(usage["prompt_tokens_details"][key] for key in details) == numbers[1:]
    silent = {"input_tokens": 100, "cache_read_input_tokens": 0}
    assert shown(silent, Cached(32, 64)) == {"input_tokens": 68, "cache_read_input_tokens": 32}
    assert shown({"prompt_tokens_details": {"cached_tokens": 0}}, Cached(32, 64)) == {
        "prompt_tokens_details": {"cached_tokens": 32}
    }  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        b'data: {"error": {"message": "EngineCore encountered an issue", "code": 500}}\n\n',
        b'data:{"error":{"message":"x"}}\n\n',
        b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"x"}}\n\n',
    ],
)
@pytest.mark.parametrize("before", [b"", DELTA], ids=["at once", "later"])
@pytest.mark.parametrize("seed", range(20))
def test_an_error_in_the_stream_ends_it_and_no_done_follows(error: bytes, before: bytes, seed: int) -> None:
    """vLLM says [DONE] after it, as after a whole answer."""
    stream = EventStream(None)
    assert passed(stream, cut(before + error + b"data: [DONE]\n\n", seed)) == before
    assert stream.error is not None and not stream.done


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[{"text":"data: {\\"error\\": 1}"}]}\n\n',
        b'data: {"error": null, "choices": []}\n\n',
        b'data: {"choices":[],"error":{"x":1}}\n\n',
    ],
)
def test_what_only_looks_like_an_error_passes(event: bytes) -> None:
    stream = EventStream(None)
    assert passed(stream, [event + b"data: [DONE]\n\n"]) == event + b"data: [DONE]\n\n"
    assert stream.done and stream.error is None


def test_comments_before_the_first_event_are_no_beginning() -> None:
    """An engine that keeps its clients waiting has not begun to answer: another one can still be asked."""
    stream = EventStream(None)
    assert stream.feed(b": keep-alive\n\n: keep-alive\n\n") == b""
    assert stream.feed(DELTA) == DELTA
    assert stream.feed(b": keep-alive\n\n") == b": keep-alive\n\n"


@pytest.mark.parametrize("at_once", [True, False])
def test_many_comments_before_the_first_event(at_once: bool) -> None:
    """Whoever can read such a line in two ways doesn't come to an end here."""
    stream, lines = EventStream(None), [b": ping\r\n"] * 5000
    told = [stream.feed(chunk) for chunk in ([b"".join(lines) + DELTA] if at_once else [*lines, DELTA])]
    assert told == [b""] * (len(told) - 1) + [b"".join(lines) + DELTA]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (b'data: {"error": {"message": "m", "code": 400}}', 400),
        (b'data: {"error": {"message": "m", "code": 503}}', 503),
        (b'data: {"error": {"message": "m", "code": "x"}}', 500),
        (b'data: {"error": "m"}', 500),
        (b'event: error\ndata: {"type":"error","error":{"type":"invalid_request_error"}}', 400),
        (b"event: error\ndata: nonsense", 500),
    ],
)
def test_whose_fault_it_is(error: bytes, code: int) -> None:
    stream = EventStream(None)
    assert stream.feed(error + b"\n\n") == b""
    assert stream.error is not None
    assert (stream.error.code, stream.error.body) == (code, error.rpartition(b"data: ")[2])
